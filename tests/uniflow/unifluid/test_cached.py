"""Training from image tokens that `uniflow encode` made once."""

import io
import json

import pytest
import torch

from tests.conftest import randomize, smooth_picture, write_shard
from tests.uniflow.test_cli import fails, ok
from tests.uniflow.unifluid.test_cli import last, losses, no_bars, place, run_file, write_folder  # noqa: F401
from tests.uniflow.unifluid.test_tokens import autoencoder
from uniflow import UniFlow, normalize
from uniflow.latent_set import LatentsError
from uniflow.pictures import PictureError, center_crop, to_tensor
from uniflow.unifluid.cached import CachedLatents
from uniflow.unifluid.captions import CaptionedPictures, CaptionFolder, CaptionShards
from uniflow.unifluid.model import UniFluid
from uniflow.unifluid.slots import FEATURES, TOKENS
from uniflow.unifluid.tokens import AutoencoderTokens, UniFlowTokens, image_tokens

CAPTIONS = [{"caption": "a {} square"}] * 8


def encode(capsys, place, *more, pictures="data", out="latents"):  # noqa: F811
    given = ["--checkpoint", place / "tokenizer", "--out", place / out, "--device", "cpu"]
    return ok(capsys, "encode", place / pictures, *given, *more)


def test_the_losses_are_those_of_encoding_in_each_step(capsys, run_file, place):  # noqa: F811
    """Mirror images too; the pictures themselves are not even read."""
    write_folder(place / "data", CAPTIONS)
    encode(capsys, place, "--flip", "--store", "float32")
    recipe = "{stages: [{steps: 2, warmup_steps: 0}], batch_size: 4, log_every: 1}"
    data = f"folder: {place / 'data'}, flip: true"
    ok(capsys, "unifluid", "train", run_file(data=f"{{{data}}}", recipe=recipe))
    for file in (place / "data").glob("*.png"):
        file.write_text("no picture")
    cached = run_file(data=f"{{{data}, latents: {place / 'latents'}}}", recipe=recipe)
    ok(capsys, "unifluid", "train", cached, "--out", place / "cached")
    expected, found = losses(place / "run"), losses(place / "cached")
    assert len(found) == 2
    for step, values in found.items():
        assert values == pytest.approx(expected[step], rel=1e-5)
    one, other = (UniFluid.from_pretrained(last(place / run)) for run in ("run", "cached"))
    assert torch.allclose(one.token_mean, other.token_mean, atol=1e-6)


@pytest.fixture
def edited(capsys, place):  # noqa: F811
    """Pictures in folders, one of them damaged; drawings of them with and without a source, and a question."""
    folder = place / "data"
    (folder / "more").mkdir()
    for number, name in enumerate(("a.png", "more/a.png", "b.png")):
        smooth_picture((12, 10), number).save(folder / name)
    (folder / "bad.png").write_text("no picture")
    lines = [
        {"image": "more/a.png", "caption": "bold", "source": ["b.png", "a.png"]},
        {"image": "b.png", "caption": "a seven"},
        {"image": "bad.png", "caption": "a seven"},
        {"image": "a.png", "question": "which?", "answer": "seven"},
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    encode(capsys, place, "--flip")
    return folder


def test_sources_readings_and_damaged_pictures(edited, place, text_tokenizer):  # noqa: F811
    tokenizer = UniFlowTokens(UniFlow.from_pretrained(place / "tokenizer"))
    examples = CaptionFolder(edited)
    cached = CachedLatents(place / "latents", tokenizer, examples, flip=True)
    how = {"source": [FEATURES] + [TOKENS] * 4, "features": 1, "flip": True, "drop_source": 0.2}
    size = {"drawing_size": (8, 8), "reading_size": (16, 16), "max_text": 40}
    plain, quick = (CaptionedPictures(examples, text_tokenizer, **size, **how, cached=each) for each in (None, cached))
    seen = set()
    for position in range(40):
        one, other = plain[position], quick[position]
        assert (one.name, one.skipped) == (other.name, other.skipped)
        assert torch.equal(one.value.ids, other.value.ids)
        assert torch.equal(one.value.seen, other.value.seen)
        if one.value.kind == "reading":
            assert torch.equal(one.value.pixels, other.value.pixels)
            continue
        for name in ("pixels", "sources"):
            pixels, latents = getattr(one.value, name), getattr(other.value, name)
            assert torch.allclose(image_tokens(tokenizer, pixels), image_tokens(tokenizer, latents), atol=1e-5)
        seen.add((len(one.value.sources), bool(one.skipped)))
    assert seen == {(2, False), (2, True), (0, False), (0, True)}
    # which latent is whose does not depend on what stands in the files
    picture = normalize(to_tensor(center_crop(smooth_picture((12, 10), 1), (8, 8)))[None])
    assert torch.allclose(cached.read(0, False)[:1], tokenizer.encode(picture), atol=1e-5)
    with pytest.raises(PictureError, match="could not be read when the latents were made"):
        cached.read(2, False)


def test_latents_of_an_autoencoder(capsys, place):  # noqa: F811
    """At a size of their own, packed; those of one that is shifted otherwise are refused."""
    write_folder(place / "data", CAPTIONS)
    autoencoder().save_pretrained(place / "autoencoder")
    given = ["--checkpoint", place / "autoencoder", "--out", place / "latents", "--device", "cpu"]
    for _ in range(2):  # a second time nothing is left to do
        assert "latents of 8 pictures" in ok(capsys, "encode", place / "data", *given, "--size", 8, "--flip")
    manifest = json.loads((place / "latents" / "manifest.json").read_text())
    scaled = {"shift_factor": 0.0, "scaling_factor": 0.18215}
    assert manifest["tokenizer"] == {"_class_name": "AutoencoderKL", "latent_ch": 4, "patch_size": 2, **scaled}
    examples, tokenizer = CaptionFolder(place / "data"), AutoencoderTokens(autoencoder(), (8, 8), packing=2)
    cached = CachedLatents(place / "latents", tokenizer, examples, flip=True)
    picture = to_tensor(examples.open(3))[None]
    for flipped in (False, True):
        expected = image_tokens(tokenizer, picture.flip(-1) if flipped else picture)
        torch.testing.assert_close(image_tokens(tokenizer, cached.read(3, flipped)), expected, rtol=1e-4, atol=1e-5)
    shifted = AutoencoderTokens(autoencoder(shift_factor=0.5), (8, 8))
    with pytest.raises(LatentsError, match=r"another tokenizer: shift_factor 0\.0 not 0\.5"):
        CachedLatents(place / "latents", shifted, examples)
    for option, value in (("--precision", "fp8"), ("--max-memory", "1GB"), ("--weights", "ema")):
        wrong = fails(capsys, "encode", place / "data", *given, option, value)
        assert f"{option}: of a UniFlow, {place / 'autoencoder'} holds an autoencoder of diffusers" in wrong


def test_latents_of_shards(capsys, place):  # noqa: F811
    picture = io.BytesIO()
    smooth_picture((12, 10), 3).save(picture, "PNG")
    members = {"a.json": b'{"caption": "a seven"}', "a.png": picture.getvalue()}
    shard = write_shard(place / "data.tar", members)
    encode(capsys, place, pictures="data.tar")
    tokenizer = UniFlowTokens(UniFlow.from_pretrained(place / "tokenizer"))
    cached = CachedLatents(place / "latents", tokenizer, CaptionShards([shard], (".png",)))
    picture = normalize(to_tensor(center_crop(smooth_picture((12, 10), 3), (8, 8)))[None])
    assert torch.allclose(cached.read(0, False), tokenizer.encode(picture), atol=1e-5)


def test_latents_are_packed_like_pictures(tiny):
    model = tiny()
    pictures = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokenizer = UniFlowTokens(model, packing=2)
    with torch.no_grad():
        latents = model.encode(normalize(pictures))
    assert torch.equal(image_tokens(tokenizer, latents), image_tokens(tokenizer, pictures))
    assert image_tokens(tokenizer, latents.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"latents: expected shape \['B', 16, 8\], got \[2, 4, 8\]"):
        image_tokens(tokenizer, latents[:, :4])


def test_latents_of_others_are_refused(capsys, edited, place, tiny, run_file):  # noqa: F811
    model = UniFlow.from_pretrained(place / "tokenizer")
    examples = CaptionFolder(edited)

    def refused(message, folder="latents", tokenizer=None, **how):
        with pytest.raises(LatentsError, match=message):
            CachedLatents(place / folder, tokenizer or UniFlowTokens(model), examples, **how)

    refused(
        "another tokenizer: _class_name None not 'AutoencoderKL', latent_ch 8 not 4",
        tokenizer=AutoencoderTokens(autoencoder(), (8, 8)),
    )
    refused("of the same shape with other weights", tokenizer=UniFlowTokens(randomize(tiny(image_size=8), 3)))
    refused("latents of pictures of 8x8 pixels, expected 16x8", tokenizer=UniFlowTokens(model, image_size=(16, 8)))
    (edited / "captions.jsonl").write_text(json.dumps({"image": "more/a.png", "caption": "a"}))
    (edited / "more" / "a.png").rename(edited / "c.png")
    encode(capsys, place, out="fewer")
    (edited / "c.png").rename(edited / "more" / "a.png")
    refused("has no latents of mirror images; encode with --flip, or flip: false", folder="fewer", flip=True)
    refused("has no latent of more/a.png; expected those of all pictures that have a caption", folder="fewer")
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1.0)
    refused("of the same shape with other weights")
    data = f"{{folder: {edited}, latents: {place / 'missing'}}}"
    assert "no such folder of latents" in fails(capsys, "unifluid", "train", run_file(data=data))
