"""`FlowHead.jvp` on the row kernels of values with their tangents, and these as registered ops."""

import copy

import pytest
import torch

pytest.importorskip("triton")

from tests.conftest import randomize
from tests.uniflow_kernels.test_tangents import FORMS
from uniflow_kernels import FlowHead, backend, mean_flow_loss, self_distillation_loss
from uniflow_kernels.triton_kernels import dual_activation as activation_kernels
from uniflow_kernels.triton_kernels import dual_norm as norm_kernels


def make(form, dtype, rows, width, conditions=None):
    torch.manual_seed(0)
    head = randomize(FlowHead(4, width, 4, 6, 2, **FORMS[form])).to(dtype)
    times = (rows, 2) if head.times == 2 else (rows,)
    x, dx = torch.randn(2, rows, 4).to(dtype)
    c, dc = torch.randn(2, conditions or rows, 6).to(dtype)
    return head, [x, torch.rand(times), c], [dx, torch.randn(times), dc]


def results(name, head, given, along, stop_tangent, dtype):
    """Velocity, tangent, and all gradients; of the velocity alone if the tangent is stopped."""
    head = copy.deepcopy(head).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    x, c = (tensor.to(dtype).requires_grad_() for tensor in (given[0], given[2]))
    directions = [None if d is None else d.to(kind) for d, kind in zip(along, (dtype, wide, dtype), strict=True)]
    with backend(name):
        made = head.jvp(x, given[1].to(wide), c, *directions, stop_tangent=stop_tangent)
        parts = made[:1] if stop_tangent else made
        loss = sum((p * torch.linspace(-1, 1 + i, p.numel()).to(p).view_as(p)).sum() for i, p in enumerate(parts))
        leaves = [x, c, *head.parameters()]
        return [*(part.detach() for part in made), *torch.autograd.grad(loss, leaves, materialize_grads=True)]


def against_definition(within_twice, form, dtype, rows, width, stop_tangent=False, floor=1e-5, device="cpu"):
    head, given, along = make(form, dtype, rows, width)
    head, given, along = head.to(device), [v.to(device) for v in given], [d.to(device) for d in along]
    for directions in (along, [None, along[1], None]):
        ours, plain, exact = (
            results(name, head, given, directions, stop_tangent, kind)
            for name, kind in (("triton", dtype), ("eager", dtype), ("eager", torch.float64))
        )
        for mine, theirs, truth in zip(ours, plain, exact, strict=True):
            assert mine.dtype == theirs.dtype
            within_twice(mine, theirs, truth, floor=floor)


@pytest.mark.parametrize("stop_tangent", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(5, 24), (19, 13)])
@pytest.mark.parametrize("form", FORMS)
def test_numbers_and_gradients(within_twice, form, rows, width, stop_tangent):
    against_definition(within_twice, form, torch.float32, rows, width, stop_tangent)


@pytest.mark.parametrize("stop_tangent", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["the release's", "rms, swiglu, groups"])
def test_half_precision(within_twice, form, dtype, stop_tangent):
    floor = 1e-2 if dtype == torch.bfloat16 else 2e-3
    against_definition(within_twice, form, dtype, 7, 32, stop_tangent, floor)


@pytest.mark.parametrize("stop_tangent", [False, True])
def test_one_condition_for_all_rows_and_wide_rows(within_twice, stop_tangent):
    head, (x, t, c), (dx, dt, dc) = make("two times", torch.float32, 3, 1030, conditions=1)
    given, along = [x, t[0], c], [dx, dt[0], dc]
    ours, plain, exact = (
        results(name, head, given, along, stop_tangent, kind)
        for name, kind in (("triton", torch.float32), ("eager", torch.float32), ("eager", torch.float64))
    )
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        within_twice(mine, theirs, truth, floor=1e-5)


@pytest.mark.parametrize("loss", [mean_flow_loss, self_distillation_loss])
def test_losses_take_them(loss, monkeypatch):
    """Each kernel as often as a head of two blocks has work for it; of a stopped tangent none in the backward pass."""
    calls = []
    for module in (norm_kernels, activation_kernels):
        for name in (module.__name__.rpartition(".")[2], module.__name__.rpartition(".")[2] + "_backward"):
            run = getattr(module, name)
            counted = lambda *of, run=run, name=name: (calls.append(name), run(*of))[1]  # noqa: E731
            monkeypatch.setattr(module, name, counted)
    head = randomize(FlowHead(4, 24, 4, 6, 2, times=2))
    data, noise = torch.randn(2, 6, 4)
    times, c = torch.rand(6, 2).sort(-1)[0], torch.randn(6, 6)
    values = []
    for name in ("eager", "triton"):
        with backend(name):
            value = loss(head, c, data, times, noise, chunk_rows=None)
            values.append([value.detach(), *torch.autograd.grad(value, list(head.parameters()))])
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-4)
    assert calls.count("dual_norm") == 3
    assert calls.count("dual_activation") == 3
    assert calls.count("dual_norm_backward") == (0 if loss is mean_flow_loss else 3)
    assert calls.count("dual_activation_backward") == 3


@pytest.mark.parametrize("stop_tangent", [False, True])
def test_compiles_whole_and_gives_the_same_bits(stop_tangent):
    pytest.importorskip("triton")
    head, given, along = make("the release's", torch.float32, 5, 24)

    def run(call):
        made = call(*given, *along, stop_tangent=stop_tangent)
        return [*(p.detach() for p in made), *torch.autograd.grad(made[0].square().sum(), list(head.parameters()))]

    torch._dynamo.reset()
    with backend("triton"):
        first, second = run(head.jvp), run(head.jvp)
        assert all(map(torch.equal, first, second))
        compiled = run(torch.compile(head.jvp, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(compiled, first, rtol=1e-4, atol=1e-5)


def test_registered_ops_are_sound():
    ops, tests = torch.ops.uniflow_kernels, ("test_schema", "test_faketensor")
    x, gate, q, shift, scale, dh = torch.randn(6, 2, 5, 12)
    for vectors in ([torch.randn(12)] * 6, [None] * 6):
        for apart in (False, True):
            lists = [[*t.clone().unbind()] if apart else [t] for t in (x, gate, q, shift, scale)]
            torch.library.opcheck(ops.dual_norm, (*lists, vectors, "layer", 1e-6), test_utils=tests)
        for others in ((gate, q, scale), (None, None, None)):
            dtotal = None if others[0] is None else dh + 1
            arguments = (dh, dtotal, x, *others, vectors, "rms", 1e-6)
            torch.library.opcheck(ops.dual_norm_backward, arguments, test_utils=tests)
        for hidden in (12, 6):
            torch.library.opcheck(ops.dual_activation, ([x], vectors[0], hidden), test_utils=tests)
            torch.library.opcheck(
                ops.dual_activation_backward, (dh[..., :hidden].contiguous(), x, vectors[0]), test_utils=tests
            )


def test_what_the_kernels_have_no_rule_for():
    head, given, along = make("the release's", torch.float32, 5, 24)
    call = lambda x: head.jvp(x, *given[1:], *along)[0]  # noqa: E731
    with backend("triton"):
        assert head.jvp(*(v[:0] for v in given), *(v[:0] for v in along))[1].shape == (0, 4)
        with pytest.raises(ValueError, match=r"flow_tangents: backend 'triton' .* no rules for the transforms"):
            torch.func.jvp(call, (given[0],), (along[0],))
        with pytest.raises(ValueError, match=r"flow_tangents: .* it takes float32, float16 and bfloat16"):
            head.double().jvp(*(v.double() for v in given), *(v.double() for v in along))
        head.float()
        with pytest.raises(ValueError, match=r"flow_tangents: .* autocast decides"), torch.autocast("cpu"):
            call(given[0])
        wide = make("the release's", torch.float32, 1, 2050)
        with pytest.raises(ValueError, match=r"flow_tangents: .* up to 2048 wide, not 2050"):
            wide[0].jvp(*wide[1], *wide[2])
        x = torch.randn(5, 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()
