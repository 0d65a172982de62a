"""Encoders of the transformers package on the kernels for transformer layers: compiled, patched, as teachers."""

import pytest
import torch

import uniflow
from tests.conftest import randomize
from tests.uniflow.test_pretrained import DECODER, hugging_face
from uniflow import EncoderTeacher, UniFlow
from uniflow_kernels import backend, cpu_kernels, patch
from uniflow_kernels.dropin import encoder_layers
from uniflow_kernels.ops.transformer_layers import plain_layer
from uniflow_kernels.torch_private import has_one_dnn

pytestmark = pytest.mark.filterwarnings("ignore:flow_width. a flow head of width 32:UserWarning")


@pytest.fixture
def by_definition(monkeypatch):
    """How many layers ran as `transformer_layers`, by its definition."""
    ran = []

    def run(x, layers, form, path, more_follow):
        ran.append(path)
        return iter([plain_layer(x, layers[0], form)])

    monkeypatch.setattr(encoder_layers, "transformer_layers", run)
    return ran


def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["Dinov2", "DINOv3ViT"])
def test_uniflow_compile_takes_them(kind, by_definition, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "is_amds", lambda: False)
    model = randomize(UniFlow.from_encoder(hugging_face(kind), **DECODER)).eval()
    with torch.no_grad():
        expected = model.encode(images())
    fast = uniflow.compile(model, batch=2, steps=1)
    assert torch.equal(fast.encode(images()), expected)  # on most CPUs
    with backend("triton"):
        torch.testing.assert_close(fast.encode(images()), expected, rtol=1e-4, atol=1e-5)
    assert by_definition == ["rows"] * 2
    assert list(fast.model.state_dict()) == list(model.state_dict())
    assert "other layers        2 of 2 recognised: plain PyTorch; Triton: it runs on CUDA, not on cpu; oneDNN: " in str(
        fast
    )
    assert "other layers        2 as the transformers package has them; what kernels" in model.explain()
    with backend("triton"), torch.no_grad():  # the model that was given stays as it was
        assert torch.equal(model.encode(images()), expected)
    monkeypatch.setattr(cpu_kernels, "is_amds", lambda: True)
    if has_one_dnn():
        assert "other layers        2 of 2 recognised: products by oneDNN" in str(uniflow.compile(model))
        torch.testing.assert_close(fast.encode(images()), expected, rtol=1e-4, atol=1e-5)
        assert by_definition == ["rows"] * 2 + ["oneDNN"] * 2
    lowered = uniflow.compile(model, precision="fp8")
    assert lowered.encode(images()).isfinite().all()


def test_a_patched_teacher(by_definition):
    teacher = EncoderTeacher.from_pretrained(randomize(hugging_face("ViT")))
    expected = teacher(images())
    assert len(patch(teacher).patched) == 2
    with backend("triton"):
        for found, before in zip(teacher(images()), expected, strict=True):
            torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-5)
    assert by_definition == ["rows"] * 2
