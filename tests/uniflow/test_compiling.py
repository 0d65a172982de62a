"""`uniflow.compile`: the same numbers on the same parameters, and a line for each part of what was done."""

import copy
import pickle

import pytest
import torch
from torch import nn

import uniflow
from uniflow import compiling
from uniflow_kernels.modules.fp8_linear import Fp8Linear


def images(batch=3, size=(16, 16)):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def test_the_same_numbers_on_the_same_parameters(tiny):
    model = tiny().train()
    fast = uniflow.compile(model, batch=3, steps=2, dtype=torch.float32)
    decoder = copy.deepcopy(model).eval().compile_decoder(3, steps=2, dtype=torch.float32)
    with torch.no_grad():
        latents = copy.deepcopy(model).eval().encode(images())
    assert torch.equal(fast.encode(images()), latents)
    assert torch.equal(fast.decode(latents, seed=1), decoder(latents, seed=1))
    assert torch.equal(fast(images(), seed=1), decoder(latents, seed=1))
    assert fast(images(2, (8, 24)), seed=1).shape == (2, 3, 8, 24)
    assert model.training
    assert all(a is b for a, b in zip(fast.model.parameters(), model.parameters(), strict=True))
    assert list(fast.model.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        model.chal_proj.c_proj.bias.add_(1)
    assert not torch.equal(fast.encode(images()), latents)
    changed = fast(images(), seed=1)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(images(), seed=1), changed)


def test_each_part_is_reported(tiny):
    model = tiny()
    fast = uniflow.compile(model)
    lines = str(fast).split("\n")
    of_layers = ["products", "attention", "transformer_layers", "residual_norm"]
    assert [line.split()[0] for line in lines] == ["layers", "patch_embedding", *of_layers, "flow_head", "launches"]
    assert "a convolution; that was faster in float32" in lines[1]
    assert "a product on what patchify writes" in model.bfloat16().explain()
    model.float()
    assert "as they are; torch.compile: " in lines[0]
    assert lines[-1].endswith("one by one; CUDA graphs: it runs on CUDA, not on cpu")
    assert lines[1:-1] == model.explain().split("\n")
    lowered = uniflow.compile(model, precision="fp8")
    assert sum(type(part) is Fp8Linear for part in lowered.model.modules()) == 12
    assert "12 of 12 linear layers in fp8: the same numbers in float32" in str(lowered)
    assert "modulations in fp8" in str(lowered)
    assert not any(type(part) is Fp8Linear for part in model.modules())


def test_where_the_layers_are_compiled_it_is_its_own(tiny, monkeypatch):
    compiled = []
    monkeypatch.setattr(compiling, "why_not_compiled", lambda model: None)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compiled.append(self))
    model = tiny()
    fast = uniflow.compile(model)
    assert compiled == fast.model.layers()
    assert not set(map(id, compiled)) & set(map(id, model.modules()))
    assert "torch.compile, one graph for layers that are alike" in str(fast)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: uniflow.compile(m.encoder), TypeError, "model: expected a UniFlow, got Encoder"),
        (lambda m: uniflow.compile(m.to("meta")), ValueError, "model: expected one on CUDA or on a CPU"),
        (lambda m: uniflow.compile(m, batch=0), ValueError, "batch: expected at least 1, got 0"),
        (lambda m: uniflow.compile(m, size=(16, 18)), ValueError, "size: expected positive multiples of the patch"),
        (lambda m: uniflow.compile(m, precision="int8"), ValueError, "precision: expected one of fp8, got 'int8'"),
        (lambda m: uniflow.compile(m, schedule="none"), ValueError, "schedule: "),
        (lambda m: uniflow.compile(m, colour=1), TypeError, ".*unexpected keyword argument 'colour'"),
    ],
)
def test_bad_input_names_the_argument(tiny, call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(tiny())
