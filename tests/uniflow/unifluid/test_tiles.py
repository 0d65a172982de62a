"""Large pictures as tiles: which grid, what is in a tile, and that a model sees the tiles' features in their places."""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import smooth_picture
from tests.uniflow.test_cli import ok
from uniflow.cli.printing import printable
from uniflow.normalization import normalize
from uniflow.pictures import center_crop, to_tensor
from uniflow.unifluid import UniFluid, answer
from uniflow.unifluid.asking import log_likelihoods
from uniflow.unifluid.captions import CaptionedPictures, CaptionError, CaptionFolder
from uniflow.unifluid.conversations import about_a_picture
from uniflow.unifluid.features import VisionFeatures
from uniflow.unifluid.slots import FEATURES
from uniflow.unifluid.texts import padded
from uniflow.unifluid.tiles import most_tiles, tile_grid, tiles_of


@pytest.mark.parametrize(
    ("picture", "most", "grid"),
    [
        ((448, 448), 12, (1, 1)),
        ((10, 10), 12, (1, 1)),
        ((671, 671), 12, (1, 1)),  # below half as large again
        ((672, 672), 12, (2, 2)),
        ((4000, 3000), 12, (3, 4)),
        ((3000, 4000), 12, (4, 3)),
        ((4000, 3000), 11, (2, 3)),
        ((4000, 3000), 1, (1, 1)),
        ((2000, 1000), 12, (2, 4)),  # of the grids 2:1 the largest
        ((2000, 100), 12, (1, 4)),  # not more than it has pixels
        ((100, 9000), 12, (12, 1)),
        ((2**31, 1), 12, (1, 12)),
        ((1000, 1001), 64, (2, 2)),
    ],
)
def test_the_grid_is_the_nearest_in_aspect_ratio(picture, most, grid):
    assert tile_grid(picture, (448, 448), most) == grid
    assert tile_grid(picture[::-1], (448, 448), most) == grid[::-1]
    # a tile that is no square
    assert tile_grid((2 * picture[0], picture[1]), (448, 896), most) == grid


def test_no_other_grid_changes_the_ratio_less():
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 4000, (60, 2)).tolist():
        lines, columns = tile_grid((width, height), (100, 100), 9)
        change = abs(np.log(columns / lines * height / width))
        for down in range(1, 10):
            for across in range(1, 9 // down + 1):
                if down <= max(1, height / 100 + 0.5) and across <= max(1, width / 100 + 0.5):
                    other = abs(np.log(across / down * height / width))
                    assert other > change - 1e-12
                    assert other > change + 1e-12 or down * across <= lines * columns


def test_tiles_are_the_parts_of_the_picture():
    picture = smooth_picture((60, 45), 3)
    tiles = tiles_of(picture, (16, 16), 12)
    assert tiles.shape == (1 + 12, 3, 16, 16)
    assert tiles.dtype == torch.uint8
    for number, expected in enumerate([(16, 16), (64, 48)]):
        whole = to_tensor(picture.resize(expected, Image.Resampling.BICUBIC, reducing_gap=2.0))
        if not number:
            assert torch.equal(tiles[0], whole)
        else:
            for place, tile in enumerate(tiles[1:]):
                top, left = 16 * (place // 4), 16 * (place % 4)
                assert torch.equal(tile, whole[:, top : top + 16, left : left + 16])


def test_one_tile_has_no_other_beside_it():
    picture = smooth_picture((20, 9), 0)
    whole = to_tensor(picture.resize((16, 16), Image.Resampling.BICUBIC))
    assert torch.equal(tiles_of(picture, (16, 16), 12), whole[None])
    # without the option nothing has changed: the middle
    assert torch.equal(tiles_of(picture, (16, 16)), to_tensor(center_crop(picture, (16, 16)))[None])
    assert [most_tiles(most) for most in (1, 2, 12)] == [1, 3, 13]


def test_the_mirror_image_has_its_tiles_the_other_way_round():
    picture = smooth_picture((60, 45), 3)
    plain, mirrored = (tiles_of(picture, (16, 16), 12, way) for way in (False, True))
    assert torch.equal(mirrored[0], plain[0].flip(-1))
    assert torch.equal(mirrored[1:].view(3, 4, 3, 16, 16), plain[1:].view(3, 4, 3, 16, 16).flip(1, -1))


@pytest.mark.parametrize("size", [(10_000_000, 1), (1, 10_000_000)])
def test_strips_take_no_gigabytes(size):
    """A file of some kilobytes may say so; a pass over one side alone would make 16 times as much of the other."""
    began = time.process_time()
    assert tiles_of(Image.new("RGB", size), (64, 64), 12).shape == (13, 3, 64, 64)
    assert time.process_time() - began < 5


def test_hostile_options(tmp_path, make_model):
    make_model().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values.pop("vision_tiles") == 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert UniFluid.from_pretrained(tmp_path).config.vision_tiles == 1  # as checkpoints have it that know of none
    for tiles in (0, 65, 1.5, True, "12"):
        (tmp_path / "config.json").write_text(json.dumps({**values, "vision_tiles": tiles}))
        with pytest.raises(ValueError, match="vision_tiles: expected an integer of at"):
            UniFluid.from_pretrained(tmp_path)


# what the model makes of them


@pytest.fixture
def folder(tmp_path):
    """Questions about pictures of one tile and of several, and a conversation about both."""
    for number, size in enumerate([(30, 20), (8, 8), (9, 25), (16, 16)]):
        smooth_picture(size, number).save(tmp_path / f"{number}.png")
    lines = [{"image": f"{number}.png", "question": "which digit?", "answer": "seven"} for number in range(4)]
    talk = [{"role": "user", "content": "which is larger?"}, {"role": "assistant", "content": "the first"}]
    lines.append({"image": ["0.png", "1.png"], "messages": talk})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


TILES = {"0.png": (2, 3), "1.png": (1, 1), "2.png": (3, 1), "3.png": (2, 2)}  # of at most 6 of 8 pixels


def samples_of(folder, tokenizer, vision, **how):
    sizes = {"drawing_size": (8, 8), "reading_size": vision.image_size, "max_text": 60}
    return CaptionedPictures(
        CaptionFolder(folder), tokenizer, **sizes, **{"features": vision.tokens, "tiles": 6, **how}
    )


def by_hand(picture, grid, vision):
    """Features of a picture's tiles, each read by itself."""
    found = []
    for lines, columns in [(1, 1), grid] if grid != (1, 1) else [grid]:
        whole = picture.resize((8 * columns, 8 * lines), Image.Resampling.BICUBIC, reducing_gap=2.0)
        for line in range(lines):
            for column in range(columns):
                part = whole.crop((8 * column, 8 * line, 8 * column + 8, 8 * line + 8))
                found.append(vision(normalize(to_tensor(part)[None])))
    return torch.cat(found)


@pytest.fixture
def seeing(make_model, tiny):
    """A model with room for many tiles, and its encoder, of which a tile is one slot."""
    vision = VisionFeatures(tiny(image_size=8), merge=2)
    merged = {"vision_channels": vision.width, "vision_merge": 2, "vision_layers": 2, "vision_tiles": 6}
    return make_model({"max_position_embeddings": 256}, **merged), vision


def test_batches_of_different_tiles_change_no_number(folder, seeing, text_tokenizer):
    """The loss of a padded batch is that of each example by itself, whose tiles were read by hand."""
    model, vision = seeing
    samples = samples_of(folder, text_tokenizer, vision)
    values = [samples.whole("reading", number) for number in range(5)]
    assert [len(value.pixels) for value in values] == [7, 1, 4, 5, 8]
    _, readings = samples.collate(values)
    assert readings.images.shape == (25, 3, 8, 8)
    assert int((readings.ids == FEATURES).sum()) == 25
    last = readings.answer.shape[1]
    with torch.no_grad():
        together = model.answer_logits(vision(normalize(readings.images)), readings.ids, readings.real, last)
        for row, value in enumerate(values):
            names = ["0.png", "1.png"] if row == 4 else [f"{row}.png"]
            seen = torch.cat([by_hand(Image.open(folder / name), TILES[name], vision) for name in names])
            ids = value.ids[None]
            wanted = int(value.predicted.sum())
            alone = model.answer_logits(seen, ids, torch.ones_like(ids, dtype=torch.bool), wanted)
            torch.testing.assert_close(together[row][readings.answer[row]], alone[0], rtol=1e-4, atol=1e-4)


def test_the_longest_text_beside_the_most_tiles_is_checked(folder, seeing, text_tokenizer):
    _, vision = seeing
    longest = max(len(samples_of(folder, text_tokenizer, vision).whole("reading", n).ids) for n in range(5))
    # the conversation may have two pictures of 7 tiles each, 6 slots more than it has
    samples_of(folder, text_tokenizer, vision, context=longest + 6)
    message = rf"jsonl:5 .*take {longest + 6} slots; .* for {longest + 5}; fewer vision_tiles take fewer slots"
    with pytest.raises(CaptionError, match=message):
        samples_of(folder, text_tokenizer, vision, context=longest + 5)


def test_mirrored_examples_have_their_ids(folder, seeing, text_tokenizer):
    _, vision = seeing
    plain, flipped = (samples_of(folder, text_tokenizer, vision, flip=flip) for flip in (False, True))
    mirrored = 0
    for position in range(40):
        one, other = plain[position].value, flipped[position].value
        assert torch.equal(one.ids, other.ids)
        mirrored += not torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.pixels[0], other.pixels[0]) or torch.equal(one.pixels[0], other.pixels[0].flip(-1))
    assert 10 < mirrored < 30


def test_ask_and_evaluate(capsys, folder, seeing, tiny):
    """Of single pictures and of a file, whose batches hold pictures of several sizes: what the model says of each."""
    model, vision = seeing
    model.save_pretrained(folder / "model")
    tiny(image_size=8).save_pretrained(folder / "vision")
    lines = [{"image": name, "question": "which digit?"} for name in TILES]
    lines[1] |= {"choices": ["seven", "no digit"], "answer": "seven"}
    lines[2] |= {"choices": ["seven", "no digit"], "answer": "seven"}
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    how = ["--checkpoint", folder / "model", "--vision", folder / "vision", "--longest", 4, "--batch-size", 3]
    ok(capsys, "unifluid", "ask", folder / "questions.jsonl", *how, "--out", folder / "out.jsonl")
    printed = ok(capsys, "unifluid", "ask", *(folder / name for name in TILES), "-q", "which digit?", *how)
    said = [line.split("\t")[1] for line in printed.splitlines()]
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    tokenizer = model.text_tokenizer
    question = [tokenizer.bos_token_id, *tokenizer("which digit?", add_special_tokens=False).input_ids]
    for number, (name, grid) in enumerate(TILES.items()):
        seen = by_hand(Image.open(folder / name), grid, vision)
        prompt = padded([[FEATURES] * len(seen) + question + [tokenizer.eos_token_id]], tokenizer)
        expected = answer(model, seen, *prompt, 4)[0]
        assert printable(" ".join(expected.split())) == said[number]
        if "choices" not in lines[number]:
            assert found[number]["response"] == expected
        else:
            turns = [about_a_picture("which digit?", choice) for choice in lines[number]["choices"]]
            alone = [log_likelihoods(model, seen, [each], [len(seen)]).item() for each in turns]
            assert found[number]["likelihoods"] == pytest.approx(alone, rel=1e-4)
    scored = json.loads(ok(capsys, "unifluid", "evaluate", folder / "questions.jsonl", *how, "--json"))
    assert scored["choice"] == sum(line["response"] == "seven" for line in found[1:3]) / 2
