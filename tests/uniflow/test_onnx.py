"""Exported programs and ONNX, of encoding and decoding: one for every batch and size, with the numbers of PyTorch."""

import sys

import pytest
import torch

from uniflow.cli import export, run
from uniflow.export import export_programs, write_onnx, write_programs
from uniflow_kernels import patchify

SHAPES = [(1, 16, 16), (3, 24, 12), (2, 8, 32)]  # of the trained size, and of one picture too


@pytest.fixture(scope="module")
def model():
    from tests.conftest import randomize
    from uniflow import UniFlow, UniFlowConfig

    fields = {"image_size": 16, "patch_size": 4, "hidden_size": 64, "vit_hidden_size": 64, "intermediate_size": 96}
    depths = {"num_hidden_layers": 1, "num_attention_heads": 4, "global_blocks_depth": 1, "num_decoder_layers": 1}
    return randomize(UniFlow(UniFlowConfig.preset("base", latent_ch=8, **fields, **depths))).eval()


@pytest.fixture(scope="module")
def programs(model):
    return export_programs(model)


def expected(model, batch, height, width):
    images, noise = torch.randn(batch, 3, height, width), torch.randn(batch, 3, height, width)
    latents = torch.randn(batch, height * width // 16, 8)
    with torch.no_grad():
        made = model.decode(latents, noise=patchify(noise, 4), size=(height, width), steps=1)
        return images, model.encode(images), latents, noise, made


def test_programs_are_written_and_read_again(model, programs, tmp_path):
    paths = write_programs(programs, tmp_path / "out")
    encoder, decoder = (torch.export.load(path).module() for path in paths)
    for shape in SHAPES:
        images, encoded, latents, noise, made = expected(model, *shape)
        assert torch.allclose(encoder(images), encoded, atol=1e-5)
        assert torch.allclose(decoder(latents, noise), made, atol=1e-5)


@pytest.mark.slow
def test_onnx_gives_what_pytorch_gives(model, programs, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra onnx")
    pytest.importorskip("onnxscript", reason="needs onnxscript, of the extra onnx")
    encoder, decoder = (
        runtime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in write_onnx(programs, tmp_path)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder.onnx", "encoder.onnx"]
    for shape in SHAPES:
        images, encoded, latents, noise, made = expected(model, *shape)
        (found,) = encoder.run(["latents"], {"images": images.numpy()})
        assert torch.allclose(torch.from_numpy(found), encoded, atol=1e-4)
        (found,) = decoder.run(["images"], {"latents": latents.numpy(), "noise": noise.numpy()})
        assert torch.allclose(torch.from_numpy(found), made, atol=1e-4)


def test_what_cannot_be_exported_is_said(model, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"^model: expected it in evaluation mode"):
        export_programs(type(model)(model.config))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'uniflow-kernels\[onnx\]'"):
        write_onnx({}, tmp_path)


def test_the_command_writes_programs(model, programs, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(export, "export_programs", lambda model, **how: asked.append(how) or programs)
    model.save_pretrained(tmp_path / "checkpoint")
    folders = ["--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "out")]
    command = ["export", *folders, "--steps", "1", "--format", "pt2"]
    assert run(command) == 0
    assert asked == [{"steps": 1}]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "decoder.pt2",
        "encoder.pt2",
        "preprocessor_config.json",
    ]
    assert run(command) == 2
    assert "exists; --force overwrites it" in capsys.readouterr().err
    assert run([*command[:-1], "tflite"]) == 2
    assert "--to: expected one of onnx, pt2, transformers, internvit, got 'tflite'" in capsys.readouterr().err
