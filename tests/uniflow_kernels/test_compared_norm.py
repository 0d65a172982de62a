"""Residual, norm and distance to a teacher in one op, against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from uniflow_kernels import compared_residual_norm

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
    weights = [numbers(*s.shape, seed=seed).to(s.dtype) for seed in (20, 21)]
    loss = (s * weights[0]).sum() + (h * weights[1]).sum() + distance * factor * s[..., 0].numel()
    wanted = [leaf for leaf in leaves.values() if leaf is not None]
    return [s.detach(), h.detach(), distance.detach(), *torch.autograd.grad(loss, wanted)]


@on_each_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 19, 24), (3, 5, 13)])
def test_numbers_and_gradients(form, shape, within_twice):
    given, how = inputs(form, shape)
    exact, plain = (results(definition, given, how, dtype) for dtype in (torch.float64, torch.float32))
    found = results(compared_residual_norm, given, how, torch.float32)
    for mine, theirs, truth in zip(found, plain, exact, strict=True):
        within_twice(mine, theirs, truth)
