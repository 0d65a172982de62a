"""Pictures to draw of several sizes: places by line and column, which size comes when, and the commands."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from tests.conftest import png, smooth_picture, write_shard
from tests.uniflow.test_cli import fails, ok
from tests.uniflow.unifluid.test_cli import CONFIG, last, log, no_bars, place, run_file, write_folder  # noqa: F401
from uniflow.pictures import PictureError, center_crop, picture_size, to_tensor
from uniflow.unifluid import UniFluid, UniFluidConfig
from uniflow.unifluid.captions import CaptionedPictures, CaptionFolder, CaptionShards, Drawings
from uniflow.unifluid.drawing import draw_pictures, draw_tokens
from uniflow.unifluid.objective import UniFluidObjective
from uniflow.unifluid.orders import draw_groups, draw_orders
from uniflow.unifluid.places import GridEmbedding
from uniflow.unifluid.sizes import DrawingSize, Turns, nearest_size
from uniflow.unifluid.slots import TOKENS, picture_slots
from uniflow.unifluid.tokens import UniFlowTokens

GRIDS = ((3, 4), (2, 6), (5, 1))


# places


def test_a_place_is_its_line_its_column_and_its_grid():
    embedding = GridEmbedding(GRIDS, 8)
    embedding.start(2.0)
    assert [tuple(table.shape) for table in (embedding.lines, embedding.columns, embedding.grids)] == [
        (5, 8),
        (6, 8),
        (3, 8),
    ]
    for number, (lines, columns) in enumerate(GRIDS):
        found = embedding(torch.arange(lines * columns).view(1, -1), (lines, columns))[0]
        for line in range(lines):
            for column in range(columns):
                expected = embedding.lines[line] + embedding.columns[column] + embedding.grids[number]
                assert torch.equal(found[line * columns + column], expected)
    wide = GridEmbedding([(40, 40)], 64)
    wide.start(2.0)
    assert wide(torch.arange(1600), (40, 40)).std().item() == pytest.approx(2.0, rel=0.1)


@pytest.fixture
def several(make_model):
    return make_model(grid=GRIDS[0], grids=GRIDS, sources="tokens")


def with_table(model, grid):
    """A model of one grid with the same weights, and what stands for its places in a table."""
    config = dataclasses.replace(model.config, grid=grid, grids=None)
    other = UniFluid(config, model.text_tokenizer).eval()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("place_embedding")}
    table = model.placed(torch.arange(grid[0] * grid[1]), grid).detach()
    other.load_state_dict({**state, "place_embedding": table})
    return other


@pytest.mark.parametrize("grid", GRIDS)
def test_each_grid_is_what_a_model_of_one_grid_makes_of_it(several, texts, grid):
    """In training and in drawing, with a source of the same size."""
    alone, count = with_table(several, grid), grid[0] * grid[1]
    ids, real = (
        torch.cat([torch.full((2, count), before), part], 1) for before, part in zip((TOKENS, True), texts, strict=True)
    )
    generator = torch.Generator().manual_seed(0)
    tokens, clean = (torch.randn(2, count, 5, generator=generator) for _ in range(2))
    order = draw_orders(2, count, "random", ids.device, generator)
    groups = draw_groups(2, count, ids.device)
    given = (tokens, ids, real, order, groups, None, clean)
    found = several.draw_states(*given, grid=grid)
    assert torch.equal(found, alone.draw_states(*given))
    others = [other for other in GRIDS if other[0] * other[1] == count and other != grid]
    for other in others:  # as many tokens, but of another shape
        assert not torch.allclose(found, several.draw_states(*given, grid=other), atol=1e-3)
    drawn = [
        draw_tokens(model, *texts, 3, head_steps=2, cfg=2.0, generator=torch.Generator().manual_seed(1), **where)
        for model, where in ((several, {"grid": grid}), (alone, {}))
    ]
    assert drawn[0].shape == (2, count, 5)
    assert torch.equal(*drawn)


def test_the_config_knows_its_grids(several, make_model, texts, tmp_path):
    assert several.config.tokens == 12
    several.save_pretrained(tmp_path)
    again = UniFluid.from_pretrained(tmp_path)
    assert again.config.grids == GRIDS
    assert torch.equal(again.placed(torch.arange(5), (5, 1)), several.placed(torch.arange(5), (5, 1)))
    with pytest.raises(ValueError, match="grid: expected tokens of 3x4, 2x6, 5x1, as in training, got 4x3"):
        draw_tokens(several, *texts, grid=(4, 3))
    for grids, message in (
        ((), "grids: expected a list of 1 to 1024"),
        (7, "grids: expected a list of 1 to 1024"),
        (((3, 4), (3, 4)), "grids: expected different ones, the first of them"),
        (((2, 6), (3, 4)), "grids: expected different ones, the first of them"),
        (((3, 4), (3,)), "grids: expected lines and tokens a line"),
        (((3, 4), (3, 2000)), "grids: expected lines and tokens a line, both from 1 to 1024"),
    ):
        with pytest.raises(ValueError, match=message):
            make_model(grids=grids)


def test_checkpoints_of_before_are_as_they_were(make_model, texts, tmp_path):
    """Of one grid: the same keys, and a config.json without the fields that came since."""
    model = make_model()
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values.pop("grids"), values.pop("packing")) == (None, 1)
    (tmp_path / "config.json").write_text(json.dumps(values))
    again = UniFluid.from_pretrained(tmp_path)
    assert again.state_dict()["place_embedding"].shape == (12, 32)
    drawn = [
        draw_tokens(each, *texts, 2, head_steps=1, generator=torch.Generator().manual_seed(0))
        for each in (model, again)
    ]
    torch.testing.assert_close(*drawn)


def test_the_objective_takes_pictures_of_each_size(tiny, make_model, texts):
    """And trains what stands for the size alone; its loss is that of the tokenizer at that size."""
    tokenizer = UniFlowTokens(tiny(), image_size=(8, 12))
    model = make_model(token_channels=8, grid=(2, 3), grids=((2, 3), (1, 5)), vision_channels=None)
    objective = UniFluidObjective(model, tokenizer)
    none = (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(0, 1, dtype=torch.int64))
    readings = (*none, torch.zeros(0, 1, dtype=torch.bool), torch.zeros(0, 1, dtype=torch.bool))
    for size, lines, grid in (((8, 12), [True, True], 0), ((4, 20), [True, False], 1)):
        images = torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        model.zero_grad()
        objective(Drawings(images, *texts), readings).total.backward()
        gradient = model.place_embedding
        assert gradient.lines.grad.any(1).tolist() == lines
        assert gradient.grids.grad.any(1).tolist() == [number == grid for number in range(2)]
    pictures = draw_pictures(model, tokenizer.at_size((4, 20)), ["a seven"], steps=2, head_steps=1)
    assert pictures.shape == (1, 3, 4, 20)
    assert tokenizer.image_size == (8, 12)
    with pytest.raises(ValueError, match="grid: expected tokens of 2x3, 1x5, as in training, got 2x5"):
        objective(Drawings(torch.zeros(2, 3, 8, 20, dtype=torch.uint8), *texts), readings)


# which size


def test_the_nearest_size():
    sizes = [(256, 256), (192, 320), (320, 192), (512, 512)]
    for size, expected in (
        ((100, 100), 0),
        ((60, 100), 1),
        ((100, 70), 2),
        ((90, 100), 0),
        ((600, 610), 3),
        ((1, 50), 1),
    ):
        assert nearest_size(size, sizes) == expected


@pytest.mark.parametrize("counts", [(5,), (3, 1), (500, 7, 0, 300), (1, 10**6), (1, 1, 1)])
def test_turns_have_the_shares_of_the_pictures(counts):
    turns = Turns(counts)
    seen = Counter()
    for run in range(2500):
        size, earlier = turns.of(run)
        assert earlier == seen[size]  # no turn of a size's stream is left out or comes twice
        seen[size] += 1
    for size, count in enumerate(counts):
        assert seen[size] / 2500 == pytest.approx(count / sum(counts), abs=0.005)
        assert (seen[size] > 0) == (count > 0)


@pytest.fixture
def mixed(tmp_path):
    """Six wide pictures, the last as its EXIF says, three high ones and a damaged one; a question about a wide one."""
    lines = []
    for number in range(9):
        picture = smooth_picture((40, 20) if number < 6 else (21, 40), number)
        if number == 5:  # stored high, to be turned to the right
            picture, exif = picture.transpose(Image.Transpose.ROTATE_90), Image.Exif()
            exif[ExifTags.Base.Orientation] = 6
            picture.save(tmp_path / "5.png", exif=exif)
        else:
            picture.save(tmp_path / f"{number}.png")
        lines.append({"image": f"{number}.png", "caption": f"picture {number}"})
    lines[7]["source"] = "0.png"
    (tmp_path / "9.png").write_text("no picture")
    lines += [{"image": "9.png", "caption": "nine"}, {"image": "0.png", "question": "which?", "answer": "seven"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


SIZES = {
    "drawing_size": (8, 16),
    "reading_size": (4, 4),
    "max_text": 40,
    "tokens": 2,
    "source": picture_slots(tokens=2),
}
HIGH = DrawingSize((16, 8), 3, tuple(picture_slots(tokens=3)))


def test_neighbours_have_pictures_of_one_size(mixed, text_tokenizer):
    assert picture_size(mixed / "5.png") == (20, 40)
    samples = CaptionedPictures(
        CaptionFolder(mixed), text_tokenizer, **SIZES, others=[HIGH], together=4, reading_share=0.25
    )
    assert (samples.count(0), samples.count(1)) == (7, 3)  # the damaged one is taken for one of the first size
    seen, sizes = Counter(), Counter()
    for first in range(0, 400, 4):
        taken = [samples[position] for position in range(first, first + 4)]
        drawings, readings = samples.collate([sample.value for sample in taken])
        assert (len(drawings.images), len(readings.images)) == (3, 1)
        sizes[tuple(drawings.images.shape[2:])] += 1
        for sample in taken:
            if sample.value.kind == "drawing":
                seen[sample.name.rpartition("(")[2][:1]] += 1
                wide = sample.value.pixels.shape[-1] == 16
                assert (int(sample.name.rpartition("(")[2][0]) < 6) == wide
                if len(sample.value.sources):
                    assert sample.value.sources.shape[2:] == (16, 8)
                    assert sample.value.ids.tolist()[:3] == [TOKENS] * 3
                    assert sample.value.ids.tolist()[3] >= 0
    assert sizes[8, 16] / 100 == pytest.approx(0.7, abs=0.02)
    assert seen["9"] == 0
    counts = [seen[str(number)] for number in range(6, 9)]
    assert sum(counts) == 3 * sizes[16, 8]
    assert max(counts) - min(counts) <= 1  # every epoch of a size shows each of its pictures once
    whole = samples.whole("drawing", 8).pixels[0]
    assert torch.equal(whole, to_tensor(center_crop(Image.open(mixed / "8.png").convert("RGB"), (16, 8))))
    with pytest.raises(ValueError, match=r"batch: expected drawings of one size, got \(3, 8, 16\) and \(3, 16, 8\)"):
        samples.collate([samples.whole("drawing", number) for number in (0, 8)])


def test_one_size_is_as_without_sizes(mixed, text_tokenizer):
    examples = CaptionFolder(mixed)
    plain, together = (CaptionedPictures(examples, text_tokenizer, **SIZES, together=number) for number in (1, 4))
    for position in range(24):
        one, other = plain[position], together[position]
        assert one.name == other.name
        assert torch.equal(one.value.pixels, other.value.pixels)


@pytest.mark.parametrize("header", [1 << 16, 20])
def test_sizes_of_pictures_in_shards(tmp_path, monkeypatch, header):
    """Of large ones by what they begin with; of others too, whose size stands further behind."""
    monkeypatch.setattr("uniflow.data._HEADER", header)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8))
    assert len(png(noise)) > 1 << 17
    members = {"a.png": png(noise), "a.txt": b"a", "b.png": b"no picture" * 9, "b.txt": b"b"}
    shards = CaptionShards([write_shard(tmp_path / "x.tar", members)], (".png",))
    read, sizes = shards._read, []
    monkeypatch.setattr(shards, "_read", lambda *which: sizes.append(len(read(*which))) or read(*which))
    assert shards.size(0) == (200, 300)
    assert sizes == ([1 << 16] if header > 20 else [20, len(png(noise))])
    with pytest.raises(PictureError, match=r"x\.tar:b\.png is not a picture"):
        shards.size(1)


# the commands


def test_train_and_generate_pictures_of_several_sizes(capsys, run_file, place):  # noqa: F811
    for number, size in enumerate([(9, 8), (16, 7), (15, 8), (8, 8)] * 2):
        smooth_picture(size, number).save(place / "data" / f"{number}.png")
    recipe = (
        "{stages: [{steps: 2, warmup_steps: 0}], batch_size: 4, micro_batch_size: 2, log_every: 1, validate_every: 2}"
    )
    ok(capsys, "unifluid", "train", run_file(sizes="[[8, 8], [8, 16]]", recipe=recipe))
    config = UniFluidConfig.from_pretrained(last(place / "run"))
    assert (config.grid, config.grids) == ((2, 2), ((2, 2), (2, 4)))
    assert all(line["image"] > 0 for line in log(place / "run") if "loss" in line)
    assert Image.open(place / "run" / "samples" / "step-00000002.png").size == (16, 8)  # two captions of the first size
    command = ["unifluid", "generate", "a red square", "--checkpoint", last(place / "run"), "--head-steps", 2]
    command += ["--tokenizer", place / "tokenizer", "--count", 1]
    for more, width in (([], 8), (["--size", "8x16"], 16)):
        ok(capsys, *command, "--out", place / f"{width}", *more)
        assert Image.open(place / f"{width}" / "a-red-square-0.png").size == (width, 8)
    wrong = fails(capsys, *command, "--out", place / "none", "--size", "8x12")
    assert "--size: expected one that the model draws, 8x8, 8x16; got '8x12'" in wrong
    for changes, message in (
        ({"sizes": "[[8, 8], [4, 64]]"}, "sizes: no picture of the data is nearest to 4x64"),
        ({"sizes": "[[8, 8], [8, 6]]"}, "image_size: expected multiples of 4 pixels, the side of a token, got 8x6"),
        ({"sizes": "[[8, 8], [8, 8]]"}, "sizes: expected different heights and widths"),
        ({"sizes": "[[8, 8]]", "image_size": "[8, 8]"}, "expected either image_size or sizes"),
        ({"sizes": "[[8, 8]]", "data": f"{{folder: {place / 'data'}, latents: a}}"}, "latents are of one size"),
    ):
        assert message in fails(capsys, "unifluid", "train", run_file(**changes), "--out", place / "none")
    assert not (place / "none").exists()
