"""The MLP's activation, with the error that a GPU's tanh may have: no instruction of a GPU runs here."""

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from tests.conftest import randomize
from uniflow_kernels import FlowHead, backend, fused_flow_blocks
from uniflow_kernels.ops.flow_choice import KERNELS
from uniflow_kernels.triton_kernels import activation as kernels

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the instruction")

MOST = 2.0**-11  # of tanh.approx, relative (PTX ISA)


@pytest.fixture(params=[MOST, -MOST], ids=["above", "below"])
def worst(request, monkeypatch):
    """Every tanh as far off as it may be."""
    exact = kernels.hardware_tanh
    monkeypatch.setattr(kernels, "hardware_tanh", lambda x, beside: exact(x, beside) * (1 + request.param))
    return request.param


def run(p, du, hidden):
    u = kernels.activation(p, hidden)
    dp, again, _ = kernels.activation_backward(du.clone(), p)
    assert torch.equal(u, again)
    return u, dp


def plain(p, du, hidden):
    p = p.detach().requires_grad_()
    u = F.silu(p[:, :hidden]) * (p[:, hidden:] if p.shape[1] > hidden else 1)
    return u.detach(), torch.autograd.grad(u, p, du)[0]


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("swiglu", [False, True], ids=["silu", "swiglu"])
def test_the_worst_tanh_stays_within_the_2x_rule_in_bfloat16(within_twice, worst, swiglu, scale):
    generator = torch.Generator().manual_seed(0)
    p = (scale * torch.randn(64, 512 if swiglu else 256, generator=generator)).bfloat16()
    du = torch.randn(64, 256, generator=generator).bfloat16()
    exact = plain(p.double(), du.double(), 256)
    for triple in zip(run(p, du, 256), plain(p, du, 256), exact, strict=True):
        within_twice(*triple)


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("mlp", ["silu", "swiglu"])
def test_a_head_with_the_worst_tanh_stays_within_the_2x_rule(within_twice, worst, path, mlp):
    head = randomize(FlowHead(16, 32, 16, 16, 1, mlp=mlp)).bfloat16()
    x, y = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1)).bfloat16()

    def results(head, x, y, name, **how):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        with backend(name):
            out = fused_flow_blocks(x, y, *head.tensors(), **head.form._asdict(), **how)
        weights = [p for key, p in head.res_blocks.named_parameters() if "mlp" in key]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, y, *weights])]

    ours, eager = results(head, x, y, "triton", path=path), results(head, x, y, "eager")
    exact = results(head.double(), x.double(), y.double(), "eager")
    for triple in zip(ours, eager, exact, strict=True):
        within_twice(*triple, floor=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_take_no_tanh(monkeypatch, dtype):
    """float16 because the rule would not hold: its gradient rounds eight times as finely."""
    p = torch.linspace(-12, 12, 512).reshape(2, 256).to(dtype)
    exact, taken = kernels.hardware_tanh, []
    monkeypatch.setattr(kernels, "hardware_tanh", lambda x, beside: taken.append(x) or exact(x, beside))
    run(p, torch.ones_like(p), 256)
    assert not taken
    run(p.bfloat16(), torch.ones_like(p, dtype=torch.bfloat16), 256)
    assert taken


def test_float16_would_break_the_2x_rule(within_twice):
    p = torch.linspace(0, 12, 4096, dtype=torch.float64).half().double()
    s = (0.5 + 0.5 * torch.tanh(p / 2) * (1 + MOST)).float()
    by_tanh = (s * (1 + p.float() * (1 - s))).half()
    exact = plain(p[None], torch.ones_like(p)[None], 4096)[1][0]
    with pytest.raises(AssertionError, match="error"):
        within_twice(by_tanh, exact.half(), exact)
    within_twice(by_tanh.bfloat16(), exact.bfloat16(), exact)
