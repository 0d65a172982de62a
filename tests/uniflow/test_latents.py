import json
import os
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from uniflow.config import UniFlowConfig
from uniflow.latents import EncodedPicture, LatentsError, fingerprint, read_latents, write_latents
from uniflow.model import UniFlow


@pytest.fixture
def written(tiny, tmp_path):
    model = tiny()
    latents = [torch.randn(16, 8), torch.randn(6, 8).bfloat16()]
    pictures = [EncodedPicture("a.png", 16, 16), EncodedPicture("more/b.png", 8, 12)]
    path = tmp_path / "latents.safetensors"
    write_latents(path, latents, pictures, model)
    return path, latents, pictures, model


def test_round_trip(written):
    path, latents, pictures, model = written
    read, names = read_latents(path, model)
    assert names == pictures
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(read, latents, strict=True))


def test_another_model_is_refused(written, tiny):
    path, _, _, model = written
    with pytest.raises(LatentsError, match=r"another model: num_decoder_layers 2 not 3"):
        read_latents(path, tiny(num_decoder_layers=3))
    with torch.no_grad():
        model.chal_unproj.c_fc.bias[0] += 1
    with pytest.raises(LatentsError, match="same shape with other weights"):
        read_latents(path, model)


def test_the_same_model_in_another_dtype_or_with_other_defaults_is_not_refused(written, tiny):
    path, _, pictures, model = written
    assert fingerprint(model) == fingerprint(model.bfloat16())
    model.config.num_sampling_steps = 50
    assert read_latents(path, model)[1] == pictures


def test_other_files_are_refused(written, tmp_path):
    path, _, _, model = written
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(LatentsError, match="holds no UniFlow latents"):
        read_latents(tmp_path / "other.safetensors", model)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(LatentsError, match="is damaged"):
        read_latents(path, model)
    with pytest.raises(FileNotFoundError):
        read_latents(tmp_path / "none", model)


@pytest.fixture(scope="module")
def written_once(tmp_path_factory):
    """A model, and the metadata of what it writes."""
    model = UniFlow(UniFlowConfig.preset("tiny", image_size=16))
    path = tmp_path_factory.mktemp("latents") / "l"
    write_latents(path, [torch.zeros(16, model.config.latent_ch)], [EncodedPicture("x.png", 16, 16)], model)
    with safe_open(path, framework="pt") as file:
        return model, file.metadata()


@pytest.fixture
def forged(written_once, tmp_path):
    """Write a file by hand: of the model, but for what is given."""
    model, metadata = written_once

    def forge(latents=None, pictures=None, **changes):
        latents = {"latents.0": torch.zeros(16, model.config.latent_ch)} if latents is None else latents
        if pictures is not None:
            changes["pictures"] = json.dumps(pictures)
        save_file(latents, tmp_path / "forged", metadata={**metadata, **changes})
        return tmp_path / "forged"

    return forge


X = {"name": "x.png", "height": 16, "width": 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({"pictures": [{**X, "name": name}]}, r"outside the output folder|the name of a picture|surrogates")
            for name in ("../x.png", "/x.png", "a/../../x.png", "", ".", "a/", "x\0.png", "\ud800.png", 7, None, ["x"])
        ),
        ({"pictures": [X, X]}, r"has the name of another picture: 'x\.png'"),
        ({"pictures": [X, {**X, "name": ".//x.png"}]}, "has the name of another picture"),
        ({"pictures": [X, {**X, "name": "x.png/y.png"}]}, "has the name of a folder of another: 'x.png'"),
        ({"pictures": [{**X, "height": 16.0}]}, r"'x\.png': size: expected two integers, got \(16\.0, 16\)"),
        ({"pictures": [{**X, "height": True}]}, "expected two integers"),
        ({"pictures": [{**X, "height": "16"}]}, "expected two integers"),
        ({"pictures": [{**X, "width": 20}]}, r"'x\.png': size: 16x20 has 20 patches"),
        ({"pictures": [{**X, "width": 2**63}]}, "patches of 4, got 16 tokens"),
        ({"pictures": [{**X, "width": -16, "height": -16}]}, "expected positive multiples"),
        ({"pictures": [{**X, "colour": 1}]}, "colour"),
        ({"pictures": [{**X, "name": "a.png"}, {**X, "name": "b.png"}] * 500}, "another picture|latents.1"),
        ({"pictures": [{**X, "name": "\x1b[31m.png", "width": 20}]}, r"'\\x1b\[31m\.png'"),
        ({"pictures": {"x": 1}}, "damaged"),
        ({"pictures": 3}, "damaged"),
        ({"config": "[" * 100_000}, "nested more than 64 deep"),
        ({"config": "[]"}, "damaged"),
        ({"config": '{"image_size": NaN}'}, "expected finite numbers"),
        ({"config": '{"image_size": "%s"}' % ("9" * 5000)}, "another model: image_size '9{1,80}"),
        ({"fingerprint": ""}, "with other weights"),
        ({"format": "2"}, "holds no UniFlow latents"),
        ({"latents": {}}, r"latents\.0"),
        ({"latents": {"latents.0": torch.zeros(16)}}, r"expected latents \[N, 16\], got torch.float32 \[16\]"),
        ({"latents": {"latents.0": torch.zeros(16, 9)}}, "got torch.float32"),
        ({"latents": {"latents.0": torch.zeros(15, 16)}}, "got 15 tokens"),
        ({"latents": {"latents.0": torch.zeros(0, 16)}}, "got 0 tokens"),
        ({"latents": {"latents.0": torch.zeros(16, 16, dtype=torch.int32)}}, "got torch.int32"),
        ({"latents": {"latents.0": torch.zeros(16, 16, dtype=torch.float8_e4m3fn)}}, "got torch.float8_e4m3fn"),
        ({"latents": {"latents.0": torch.full((16, 16), float("nan"))}}, "hold NaN or infinity"),
        ({"latents": {"latents.0": torch.full((16, 16), float("inf")).bfloat16()}}, "hold NaN or infinity"),
    ],
)
def test_forged_files_are_refused(forged, written_once, changes, message):
    path = forged(**changes)
    with pytest.raises(LatentsError, match=message) as caught:
        read_latents(path, written_once[0])
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "\x1b" not in str(caught.value)


def _safetensors(header, data=b""):
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        (2**63).to_bytes(8, "little"),
        (2**40).to_bytes(8, "little") + b"{}",
        _safetensors(b"[]"),
        _safetensors(b"{" * 100_000),
        _safetensors(b'{"latents.0": {"dtype": "F32", "shape": [99999999999, 999999999999], "data_offsets": [0, 4]}}'),
        _safetensors(b'{"latents.0": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', b"1234"),
        _safetensors(b'{"latents.0": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}', b"1234"),
        _safetensors(b'{"__metadata__": {"format": 3}}'),
        _safetensors(b'{"__metadata__": {"format": "uniflow-latents-1"}}'),
    ],
)
def test_forged_headers_are_refused(written_once, tmp_path, data):
    path = tmp_path / "l.safetensors"
    path.write_bytes(data)
    with pytest.raises(LatentsError, match=re.escape(str(path))):
        read_latents(path, written_once[0])


def test_what_is_no_file_is_refused(written_once, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(LatentsError, match="expected a file, got a"):
            read_latents(path, written_once[0])


@pytest.mark.parametrize(
    ("latents", "pictures"),
    [
        ([torch.zeros(16, 16)] * 2, [EncodedPicture("x.png", 16, 16)] * 2),
        ([torch.zeros(16, 16)] * 2, [EncodedPicture("x.png", 16, 16)]),
        ([torch.zeros(16, 16)], [EncodedPicture("../x.png", 16, 16)]),
        ([torch.full((16, 16), float("nan"))], [EncodedPicture("x.png", 16, 16)]),
        ([torch.zeros(15, 16)], [EncodedPicture("x.png", 16, 16)]),
    ],
)
def test_what_would_be_refused_is_not_written(written_once, tmp_path, latents, pictures):
    with pytest.raises(ValueError, match=r"name|one a picture|NaN|tokens"):
        write_latents(tmp_path / "l", latents, pictures, written_once[0])
    assert not (tmp_path / "l").exists()


def test_golden_fingerprint_is_stable(golden_folder):
    one, two = (fingerprint(UniFlow.from_pretrained(golden_folder)) for _ in range(2))
    assert one == two
