"""The residual and the norm of transformers' blocks, gated and adaptive or not."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.conftest import derivative_error
from uniflow_kernels import backend, gated_residual_norm, modulated_norm, residual_norm
from uniflow_kernels.triton_kernels import flow_head as row_kernels

on_each_backend = pytest.mark.usefixtures("on_each_backend")
WIDTH = 24


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def definition(x, gate, q, shift, scale, weight, bias, norm="layer", eps=1e-6):
    """Written out; without q the norm alone, without a gate x + q, without a scale no modulation."""
    total = x if q is None else x + q if gate is None else x + gate * q
    centred = total - total.mean(-1, keepdim=True) if norm == "layer" else total
    h = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    h = h if weight is None else h * weight
    h = h if bias is None else h + bias
    return total, h if scale is None else h * (1 + scale) + shift


def ours(x, gate, q, shift, scale, weight, bias, norm="layer", eps=1e-6):
    how = {"weight": weight, "bias": bias, "norm": norm, "eps": eps}
    if q is None:
        return x, modulated_norm(x, shift, scale, **how)
    if shift is None:
        return residual_norm(x, q, gate, **how)
    return gated_residual_norm(x, gate, q, shift, scale, **how)


# x's shape and the modulations'
SHAPES = {
    "one a picture": ((2, 19, WIDTH), (2, 1, WIDTH)),
    "one for all": ((2, 19, WIDTH), (WIDTH,)),
    "few rows a condition": ((5, 3, WIDTH), (5, 1, WIDTH)),
    "one a place": ((3, 4, WIDTH), (4, WIDTH)),
    "one a row": ((7, WIDTH), (7, WIDTH)),
    "of any pattern": ((2, 3, 4, WIDTH), (2, 1, 4, WIDTH)),
    "odd width": ((2, 5, 13), (2, 1, 13)),
}


def inputs(shapes, dtype=torch.float32, residual=True, vectors="weight bias", without=()):
    x, modulation = SHAPES[shapes]
    names = {"x": x, "gate": modulation, "q": x, "shift": modulation, "scale": modulation}
    found = {name: numbers(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(names.items())}
    if not residual:
        found["gate"] = found["q"] = None
    found.update(dict.fromkeys(without))
    for i, name in enumerate(("weight", "bias")):
        found[name] = numbers(x[-1], seed=9 + i, dtype=dtype) if name in vectors.split() else None
    return found


def results(run, given, dtype, **how):
    """Both outputs and every gradient."""
    given = {k: None if v is None else v.detach().to(dtype).requires_grad_() for k, v in given.items()}
    outputs = run(**given, **how)
    weights = [numbers(*out.shape, seed=20 + i).to(out) for i, out in enumerate(outputs)]
    leaves = [tensor for tensor in given.values() if tensor is not None]
    loss = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    return [*(out.detach() for out in outputs), *torch.autograd.grad(loss, leaves)]


@on_each_backend
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(
    ("residual", "norm", "vectors"),
    [(True, "layer", ""), (False, "layer", "weight bias"), (True, "rms", "weight"), (False, "rms", "")],
)
def test_numbers_and_gradients(shapes, residual, norm, vectors, within_twice):
    given = inputs(shapes, residual=residual, vectors=vectors)
    exact = results(definition, given, torch.float64, norm=norm)
    plain = results(definition, given, torch.float32, norm=norm)
    for mine, theirs, truth in zip(results(ours, given, torch.float32, norm=norm), plain, exact, strict=True):
        within_twice(mine, theirs, truth)


PLAIN = ("shift", "scale")  # what a block that is not adaptive is without; with "gate" without LayerScale too


@on_each_backend
@pytest.mark.parametrize("without", [PLAIN, ("gate", *PLAIN)], ids=["LayerScale", "no LayerScale"])
@pytest.mark.parametrize("shapes", ["one for all", "odd width", "one a row"])
@pytest.mark.parametrize(("norm", "vectors"), [("layer", "weight bias"), ("rms", "weight"), ("layer", "")])
def test_residuals_of_blocks_that_are_not_adaptive(shapes, without, norm, vectors, within_twice):
    """The gradients of x and of what is added to it are one tensor where there is no gate."""
    given = inputs(shapes, vectors=vectors, without=without)
    exact = results(definition, given, torch.float64, norm=norm)
    plain = results(definition, given, torch.float32, norm=norm)
    for mine, theirs, truth in zip(results(ours, given, torch.float32, norm=norm), plain, exact, strict=True):
        within_twice(mine, theirs, truth)


@on_each_backend
@pytest.mark.parametrize("gated", [True, False])
def test_a_float32_residual_under_autocast(gated, within_twice):
    """The norm comes in the products' dtype, and each gradient in that of what it is of."""
    given = inputs("one for all", without=PLAIN if gated else ("gate", *PLAIN))
    given["q"] = given["q"].bfloat16()
    leaves = {k: v.clone().requires_grad_() for k, v in given.items() if v is not None}
    total, h = residual_norm(**leaves, dtype=torch.bfloat16)
    assert (total.dtype, h.dtype) == (torch.float32, torch.bfloat16)
    weights = numbers(*h.shape, seed=20).bfloat16().float()
    gradients = torch.autograd.grad((total * weights).sum() + (h.float() * weights).sum(), list(leaves.values()))
    for leaf, gradient in zip(leaves.values(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype
    wide = {k: v.double().requires_grad_() for k, v in leaves.items()}
    exact = definition(**{**dict.fromkeys(given), **wide})
    truth = torch.autograd.grad(sum((out * weights).sum() for out in exact), list(wide.values()))
    for found, true in zip((total, h, *gradients), (*exact, *truth), strict=True):
        assert (found - true).abs().max() <= (2**-8 if found.dtype == torch.bfloat16 else 1e-5) * true.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shapes", "without"), [("one a picture", ()), ("few rows a condition", ()), ("one for all", PLAIN)]
)
def test_half_precision(shapes, without, dtype, within_twice):
    pytest.importorskip("triton")
    given = inputs(shapes, dtype, without=without)
    exact, plain = results(definition, given, torch.float64), results(ours, given, dtype)
    with backend("triton"):
        found = results(ours, given, dtype)
    for mine, theirs, truth in zip(found, plain, exact, strict=True):
        assert mine.dtype == dtype
        within_twice(mine, theirs, truth)


@on_each_backend
def test_strides_and_mixed_dtypes(within_twice):
    """Modulations as one product makes them, side by side; x transposed, and a residual in float32 beside bfloat16."""
    made = numbers(2, 1, 3 * WIDTH)
    gate, _, shift = made.chunk(3, -1)
    x = numbers(19, 2, 2 * WIDTH, seed=1).transpose(0, 1)[..., ::2]
    q = numbers(2, 1, WIDTH, seed=2).expand(2, 19, WIDTH)
    given = {"x": x, "gate": gate, "q": q, "shift": shift, "scale": numbers(WIDTH, seed=5).expand(2, 1, WIDTH)}
    expected = definition(**{k: v.double() for k, v in given.items()}, weight=None, bias=None)
    contiguous = definition(**given, weight=None, bias=None)
    for found, plain, exact in zip(gated_residual_norm(**given), contiguous, expected, strict=True):
        within_twice(found, plain, exact)
    mixed = {k: v if k == "x" else v.bfloat16() for k, v in given.items()}
    expected = definition(**{k: v.double() for k, v in mixed.items()}, weight=None, bias=None)
    for found, exact in zip(gated_residual_norm(**mixed), expected, strict=True):
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() < 1e-4


@on_each_backend
def test_empty_and_the_same_bits():
    given = inputs("one a picture")
    first, second = (results(ours, given, torch.float32) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert modulated_norm(given["x"][:0], given["shift"][:0], given["scale"][:0]).shape == (0, 19, WIDTH)
    given = inputs("one for all", without=PLAIN)
    first, second = (results(ours, given, torch.float32) for _ in range(2))
    assert all(map(torch.equal, first, second))
    empty = {k: v if v is None or v.ndim == 1 else v[:0] for k, v in given.items()}
    assert [out.shape[0] for out in ours(**empty)] == [0, 0]


@on_each_backend
@pytest.mark.parametrize("which", [0, 1])
def test_one_of_both_results_has_a_gradient(which):
    found = []
    for run in (definition, ours):
        given = {k: v.clone().requires_grad_() for k, v in inputs("one a picture").items()}
        run(**given)[which].square().sum().backward()
        found.append([torch.zeros_like(v) if v.grad is None else v.grad for v in given.values()])
    for mine, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_the_kernels_run_where_they_are_asked_for(monkeypatch):
    pytest.importorskip("triton")
    calls = []
    for name in ("norm_modulate", "norm_modulate_backward"):
        monkeypatch.setattr(row_kernels, name, Counts(getattr(row_kernels, name), calls))
    with backend("triton"):
        results(ours, inputs("one a picture"), torch.float32)
    assert calls == ["norm_modulate", "norm_modulate_backward"]
    results(ours, inputs("one a picture"), torch.float32)
    assert len(calls) == 2


class Counts:
    def __init__(self, run, calls):
        self.run, self.calls = run, calls

    def __call__(self, *args, **kwargs):
        self.calls.append(self.run.__name__)
        return self.run(*args, **kwargs)


def test_registered_ops_are_sound():
    pytest.importorskip("triton")
    given = [numbers(12, WIDTH), numbers(3, WIDTH), numbers(12, WIDTH), numbers(3, WIDTH), numbers(3, WIDTH)]
    ops, how = torch.ops.uniflow_kernels, (4, "layer", 1e-6)
    half, one, vector = torch.bfloat16, numbers(1, WIDTH), numbers(WIDTH)
    tests = ("test_schema", "test_faketensor")
    with backend("triton"):
        for residual, vectors in itertools.product((given[1:3], [None, None]), ([numbers(WIDTH)] * 2, [None, None])):
            x, shift, scale = given[0], *given[3:]
            arguments = (x, *residual, shift, scale, *vectors, *how)
            torch.library.opcheck(ops.modulated_norm, (*arguments, torch.float32), test_utils=tests)
            dtotal = None if residual[0] is None else x + 1
            arguments = (x, dtotal, x, *residual, scale, *vectors, *how)
            torch.library.opcheck(ops.modulated_norm_backward, arguments, test_utils=tests)
        x, q = given[0], given[2].to(half)  # a residual in float32, not adaptive
        arguments = (x, one, q, None, None, vector, None, 12, "rms", 1e-6, half)
        torch.library.opcheck(ops.modulated_norm, arguments, test_utils=tests)
        arguments = (x.to(half), x, x, one, q, None, vector, None, 12, "rms", 1e-6)
        torch.library.opcheck(ops.modulated_norm_backward, arguments, test_utils=tests)


@on_each_backend
def test_compiles_whole_and_once():
    def step(x, gate, q, shift, scale):
        total, h = gated_residual_norm(x, gate, q, shift, scale)
        total, h = residual_norm(total, h, gate[0, 0])
        return modulated_norm(total + h, shift, scale)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for attempt, rows in enumerate((19, 33, 20)):
        given = [numbers(2, rows, WIDTH), numbers(2, 1, WIDTH, seed=1), numbers(2, rows, WIDTH, seed=2)]
        given = [t.requires_grad_() for t in (*given, numbers(2, 1, WIDTH, seed=3), numbers(2, 1, WIDTH, seed=4))]
        with torch._dynamo.config.patch(error_on_recompile=attempt > 0):
            out = compiled(*given)
        for mine, theirs in zip(
            torch.autograd.grad(out.sum(), given), torch.autograd.grad(step(*given).sum(), given), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_derivatives_of_forward_mode_derivatives():
    given = {
        k: v.requires_grad_() for k, v in inputs("one a picture", torch.float64, vectors="").items() if v is not None
    }

    def loss():
        tangent = torch.func.jvp(lambda x: gated_residual_norm(**{**given, "x": x})[1], (given["x"],), (given["q"],))[1]
        return (tangent * torch.linspace(-1, 1, tangent.numel(), dtype=tangent.dtype).view_as(tangent)).sum()

    assert derivative_error(loss, list(given.values())) < 1e-6


X, M = torch.zeros(2, 3, 4), torch.zeros(2, 1, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: modulated_norm(X.int(), M, M), TypeError, r"x: expected a floating point dtype, got torch.int32"),
        (lambda: modulated_norm(X, M.int(), M.int()), TypeError, "shift: expected a floating point dtype"),
        (lambda: modulated_norm(X[0, 0, 0], M, M), ValueError, r"x: expected \[..., W\]"),
        (
            lambda: modulated_norm(X, M[:, 0], M[:, 0]),
            ValueError,
            r"shift: expected \[..., 4\], .* \(2, 3, 4\), got \(2, 4\)",
        ),
        (lambda: modulated_norm(X, M, M[0, 0]), ValueError, r"scale: expected shift's shape \(2, 1, 4\), got \(4,\)"),
        (lambda: modulated_norm(X, M, M, weight=M), ValueError, r"weight: expected shape \(4,\), got \(2, 1, 4\)"),
        (lambda: modulated_norm(X, M, M, norm="batch"), ValueError, "norm: expected one of layer, rms, got 'batch'"),
        (lambda: modulated_norm(X, M, M, norm="rms", bias=M[0, 0]), ValueError, "bias: an rms norm has none"),
        (lambda: gated_residual_norm(X, M[..., :3], X, M, M), ValueError, "gate: expected"),
        (lambda: gated_residual_norm(X, M, X[:, :1], M, M), ValueError, r"q: expected x's shape \(2, 3, 4\)"),
        (lambda: residual_norm(X, X[:1]), ValueError, r"q: expected x's shape \(2, 3, 4\)"),
        (lambda: residual_norm(X, X, M[..., :3]), ValueError, r"gate: expected \[..., 4\], .* got \(2, 1, 3\)"),
    ],
)
def test_wrong_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
