"""Residual, norm and distance to a teacher in one op, against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from uniflow_kernels import (
    LayerwiseDistillation,
    backend,
    compared_residual_norm,
    layerwise_distillation,
    residual_norm,
)

on_each_backend = pytest.mark.usefixtures("on_each_backend")
FORMS = {  # norm, whether there are a gate, a weight and a bias, and the tokens that do not count
    "the release's": ("layer", True, True, True, 1),
    "no LayerScale": ("layer", False, True, False, 0),
    "rms": ("rms", True, True, False, 3),
    "bare": ("rms", False, False, False, 1),
}


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(form, shape, dtype=torch.float32, teacher_dtype=None):
    """Tensors by their names, and the other arguments."""
    norm, gated, weighted, biased, skip = FORMS[form]
    width = shape[-1]
    given = {"x": numbers(*shape, dtype=dtype), "q": numbers(*shape, seed=1, dtype=dtype)}
    given["gate"] = numbers(width, seed=2, dtype=dtype) if gated else None
    given["weight"] = numbers(width, seed=3, dtype=dtype) if weighted else None
    given["bias"] = numbers(width, seed=4, dtype=dtype) if biased else None
    given["teacher"] = numbers(*shape, seed=5, dtype=teacher_dtype or dtype)
    return given, {"norm": norm, "skip_tokens": skip}


def definition(x, q, gate, weight, bias, teacher, norm, skip_tokens):
    """Written out."""
    s = x + q if gate is None else x + gate * q
    centred = s - s.mean(-1, keepdim=True) if norm == "layer" else s
    h = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    h = h if weight is None else h * weight
    h = h if bias is None else h + bias
    wide = torch.promote_types(s.dtype, torch.float32)
    sides = (side[:, skip_tokens:].to(wide) for side in (s, teacher))
    return s, h, (1 - F.cosine_similarity(*sides, dim=-1)).mean()


def results(run, given, how, dtype, factor=3.0):
    """All outputs and gradients, as they are where the distance weighs `factor`, which only the device knows."""
    leaves = {
        name: None if tensor is None else tensor.detach().to(dtype).requires_grad_()
        for name, tensor in given.items()
        if name != "teacher"
    }
    teacher = given["teacher"] if given["teacher"].dtype.itemsize <= dtype.itemsize else given["teacher"].to(dtype)
    s, h, distance = run(**leaves, teacher=teacher, **how)
    weights = [numbers(*s.shape, seed=seed).to(given["x"]).to(s.dtype) for seed in (20, 21)]
    loss = (s * weights[0]).sum() + (h * weights[1]).sum() + distance * factor * s[..., 0].numel()
    wanted = [leaf for leaf in leaves.values() if leaf is not None]
    return [s.detach(), h.detach(), distance.detach(), *torch.autograd.grad(loss, wanted)]


def against_definition(within_twice, form, shape, dtype, teacher_dtype=None, device="cpu"):
    """All that a call gives, under the backend that is set."""
    given, how = inputs(form, shape, dtype, teacher_dtype)
    given = {name: None if tensor is None else tensor.to(device) for name, tensor in given.items()}
    exact, plain = (results(definition, given, how, kind) for kind in (torch.float64, dtype))
    found = results(compared_residual_norm, given, how, dtype)
    for mine, theirs, truth in zip(found, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype
        within_twice(mine, theirs, truth, 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    return found


@on_each_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 19, 24), (3, 5, 13)])
def test_numbers_and_gradients(form, shape, within_twice):
    against_definition(within_twice, form, shape, torch.float32)


@on_each_backend
@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
def test_half_precision(dtype, teacher_dtype, within_twice):
    """And a teacher in a narrower dtype, which is read as it is."""
    found = against_definition(within_twice, "the release's", (2, 19, 24), dtype, teacher_dtype)
    assert found[2].dtype == torch.float32


@on_each_backend
def test_it_is_the_same_as_layers_compared_apart():
    """The mean over the tokens that count, weighed as `layerwise_distillation` weighs it."""
    given, how = inputs("the release's", (2, 19, 24))
    s, h, distance = compared_residual_norm(**given, **how)
    plain = residual_norm(**{name: tensor for name, tensor in given.items() if name != "teacher"}, norm=how["norm"])
    streamed = LayerwiseDistillation(2, skip_tokens=1)
    streamed.put(1, distance)
    streamed.push(2, given["x"], given["teacher"])
    with pytest.raises(ValueError, match="layer: 1 has been pushed already"):
        streamed.put(1, distance)
    with pytest.raises(ValueError, match="layer: expected 1 to 2, got 0"):
        streamed.put(0, distance)
    states, teacher = [s, given["x"]], [given["teacher"]] * 2
    expected = layerwise_distillation(states, teacher, skip_tokens=1)
    for mine, theirs in zip((s, h, *streamed.result()), (*plain, *expected), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-6)


@on_each_backend
def test_strides(within_twice):
    """Every other row, columns out of wider ones, and gradients that are expanded."""
    given, how = inputs("the release's", (2, 19, 24))
    spread = {name: torch.stack([t, t], -2).flatten(-3, -2)[..., ::2, :] for name, t in given.items() if t.ndim == 3}
    spread |= {name: torch.stack([t, t], -1).flatten()[::2] for name, t in given.items() if t.ndim == 1}
    spread["q"] = torch.cat([given["q"], given["q"]], -1)[..., :24]
    assert not any(t.is_contiguous() for t in spread.values())

    def run(tensors):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if name != "teacher"}
        s, h, distance = compared_residual_norm(**leaves, teacher=tensors["teacher"], **how)
        return [s, h, distance, *torch.autograd.grad(s.sum() + h.sum() + distance, list(leaves.values()))]

    for mine, theirs in zip(run(spread), run(given), strict=True):
        within_twice(mine, theirs, theirs.double())


@on_each_backend
@pytest.mark.parametrize("wanted", ["sum", "norm", "distance"])
def test_a_gradient_of_one_result_alone(wanted, within_twice):
    given, how = inputs("the release's", (2, 5, 24))

    def run(function, dtype):
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in given.items() if name != "teacher"}
        made = dict(zip(("sum", "norm", "distance"), function(**leaves, teacher=given["teacher"], **how), strict=True))
        loss = made[wanted].square().sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves.values(), strict=True)]

    exact, plain = (run(definition, dtype) for dtype in (torch.float64, torch.float32))
    for mine, theirs, truth in zip(run(compared_residual_norm, torch.float32), plain, exact, strict=True):
        within_twice(mine, theirs, truth)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_of_zeros_and_what_does_not_count(dtype):
    """Zeros have a distance of 1 and finite gradients; what is left out may hold anything on the teacher's side."""
    given, _ = inputs("no LayerScale", (2, 5, 24), dtype)
    given["x"][0, 2], given["q"][0, 2], given["teacher"][1, 3], given["teacher"][:, 0] = 0, 0, 0, torch.nan
    leaves = [given[name].requires_grad_() for name in ("x", "weight")]
    s, h, distance = compared_residual_norm(**given, norm="layer", skip_tokens=1)
    assert torch.isfinite(distance)
    gradients = torch.autograd.grad(1e-4 * distance + s.float().sum() + h.float().sum(), leaves)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@on_each_backend
def test_nothing_to_count():
    given, how = inputs("the release's", (2, 5, 24))
    leaf = given["x"].requires_grad_()
    s, _, distance = compared_residual_norm(**given, **{**how, "skip_tokens": 5})
    assert distance == 0
    assert torch.equal(torch.autograd.grad(s.sum() + distance, leaf)[0], torch.ones_like(leaf))
    empty = {name: t[:0] if t.ndim == 3 else t for name, t in given.items()}
    s, h, distance = compared_residual_norm(**empty, **how)
    assert s.shape == h.shape == (0, 5, 24)
    assert distance == 0


def test_the_same_bits_in_every_run_whatever_memory_held(monkeypatch):
    pytest.importorskip("triton")
    given, how = inputs("the release's", (2, 19, 24))
    empty = Tensor.new_empty
    with backend("triton"):
        first = results(compared_residual_norm, given, how, torch.float32)
        monkeypatch.setattr(Tensor, "new_empty", lambda *of, **kind: empty(*of, **kind).fill_(torch.nan))
        again = results(compared_residual_norm, given, how, torch.float32)
    assert all(map(torch.equal, first, again))


def test_registered_ops_are_sound():
    pytest.importorskip("triton")
    given, _ = inputs("the release's", (2, 5, 24))
    x, q, gate, weight, bias, teacher = (given[name] for name in ("x", "q", "gate", "weight", "bias", "teacher"))
    ops, how = torch.ops.uniflow_kernels, (1, "layer", 1e-6)
    with backend("triton"):
        torch.library.opcheck(ops.compared_norm, (x, q, teacher, gate, weight, bias, *how, torch.bfloat16))
        s, h, _, coefficients = ops.compared_norm(x, q, teacher, gate, weight, bias, *how, torch.float32)
        for vectors in ((gate, weight, bias), (None, weight, None)):
            branch = None if vectors[0] is None else q
            arguments = (h, s, torch.ones(()), s, branch, teacher, coefficients, *vectors, *how)
            torch.library.opcheck(ops.compared_norm_backward, arguments)


def test_derivatives_of_other_kinds():
    """Transforms of torch.func are served; a second derivative is refused."""
    given, how = inputs("the release's", (2, 5, 24))

    def distance(function, x):
        return function(**{**given, "x": x}, **how)[2]

    x, direction = given["x"], numbers(2, 5, 24, seed=7)
    for transform in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (direction,))[1]):
        mine, theirs = (transform(lambda x, f=f: distance(f, x))(x) for f in (compared_residual_norm, definition))
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    loss = distance(compared_residual_norm, x.requires_grad_())
    with pytest.raises(RuntimeError, match="it has no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_compiles_whole():
    """As the plain form, which a compiler makes kernels of itself; nothing anew for another number of tokens."""
    torch._dynamo.reset()
    compiled = torch.compile(compared_residual_norm, fullgraph=True, dynamic=True, backend="eager")
    for attempt, shape in enumerate(((2, 5, 24), (3, 9, 24))):
        given, how = inputs("the release's", shape)
        with torch._dynamo.config.patch(error_on_recompile=attempt > 0):
            found = compiled(**given, **how)
        for mine, theirs in zip(found, compared_residual_norm(**given, **how), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": numbers(5, 24), "q": numbers(5, 24)}, r"x: expected \[B, S, W\], got shape \(5, 24\)"),
        ({"q": numbers(2, 4, 24)}, r"q: expected x's shape \(2, 5, 24\)"),
        ({"teacher": numbers(2, 4, 24)}, r"teacher: expected x's shape \(2, 5, 24\) in a floating dtype, got \(2, 4"),
        ({"teacher": torch.ones(2, 5, 24, dtype=torch.int64)}, r"teacher: .* got \(2, 5, 24\), torch.int64"),
        ({"gate": numbers(2, 1, 24)}, r"gate: expected shape \(24,\), got \(2, 1, 24\)"),
        ({"weight": numbers(23)}, r"weight: expected shape \(24,\), got \(23,\)"),
        ({"skip_tokens": 6}, "skip_tokens: expected 0 to 5 tokens, got 6"),
        ({"norm": "group"}, "norm: "),
    ],
)
def test_wrong_inputs(changes, message):
    given, how = inputs("the release's", (2, 5, 24))
    with pytest.raises(ValueError, match=message):
        compared_residual_norm(**{**given, **how, **changes})
