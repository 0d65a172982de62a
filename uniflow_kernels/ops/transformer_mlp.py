"""The MLP of a transformer layer with its gradient: fc2(act(fc1(x))).

Kept for the backward pass are x and what fc1 makes, not the activation of that: the product that makes the activation's
gradient, dy @ W2, reads what fc1 made in its epilogue, and leaves fc1's gradient, the activation once more (which W2's
gradient is made of) and the sums of columns that fc1's bias has. On a GPU it is the fastest path by what was measured
("products" and "small products", else plain PyTorch), by `measured.json`; where nothing was, plain PyTorch serves,
unless Triton is asked for by name.

Source: the ViT's layer (Dosovitskiy et al. 2021), GELU by Hendrycks and Gimpel 2016.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from uniflow_kernels.choice import is_in_graph, requested
from uniflow_kernels.ops.flow_blocks import Affine, check_choice, flat_rows
from uniflow_kernels.ops.flow_choice import (
    RUNS,
    SMALL,
    UNMEASURED,
    Measured,
    dtype_of_products,
    fastest_first,
    is_plain,
    measured_on,
)
from uniflow_kernels.ops.registration import register, wants_gradient
from uniflow_kernels.ops.transformer_layers import ACTIVATIONS
from uniflow_kernels.torch_private import is_forward_mode, is_transforming
from uniflow_kernels.triton_kernels import why_not_on

OP = "transformer_mlp"
KERNELS = ("products", "small products")


def plain_mlp(x: Tensor, fc1: Affine, fc2: Affine, activation: str = "gelu") -> Tensor:
    """The definition in plain PyTorch, [..., W] -> [..., W]."""
    return F.linear(ACTIVATIONS[activation](F.linear(x, *fc1)), *fc2)


def transformer_mlp(x: Tensor, fc1: Affine, fc2: Affine, activation: str = "gelu", path: str = "auto") -> Tensor:
    """fc2(act(fc1(x))), with a gradient.

    Args:
        x: [..., W], float; any strides.
        fc1: weight [H, W] and bias [H] or None.
        fc2: weight [W, H] and bias [W] or None.
        activation: one of ACTIVATIONS.
        path: one of KERNELS where no other may serve, as in tests and benchmarks; else "auto".

    Returns:
        x's shape, in the dtype of the products: autocast's where it is on.

    Raises:
        ValueError: for an unknown activation or path, or a path that cannot serve, saying why.
    """
    check_choice("activation", activation, tuple(ACTIVATIONS))
    chosen = choose_mlp_path(x, fc1, fc2, path)
    if chosen == "eager":
        return plain_mlp(x, fc1, fc2, activation)
    dtype = dtype_of_products(x)
    rows, *tensors = (None if t is None else t.to(dtype) for t in (flat_rows(x), *fc1, *fc2))
    return transformer_mlp_op(rows, *tensors, activation, chosen).view(x.shape)


def choose_mlp_path(x: Tensor, fc1: Affine, fc2: Affine, path: str = "auto") -> str:
    """The path of a call, "eager" or one of KERNELS: the first in the order of their measured times that can serve.

    Raises:
        ValueError: for an unknown path, or one that cannot serve, saying why.
    """
    check_choice("path", path, ("auto", *KERNELS))
    if path != "auto":
        reason = _why_not(x, fc1, fc2) or _why_not_path(x, fc1, fc2, path)
        if reason is not None:
            raise ValueError(f"{OP}: path {path!r} cannot serve this input: {reason}")
        return path
    if not may_have_kernels(x) or _why_not(x, fc1, fc2) is not None:
        return "eager"
    asked = requested() == "triton"
    order = fastest_first(_known(x), x.shape[:-1].numel(), training=True, graph=is_in_graph())
    among = [each for each in order if each in KERNELS] or list(KERNELS) if asked else order
    return next((each for each in among if each == "eager" or _why_not_path(x, fc1, fc2, each) is None), "eager")


def may_have_kernels(x: Tensor) -> bool:
    """Whether anything but "eager" may come of `choose_mlp_path`, before weights are looked at."""
    if torch.compiler.is_compiling() or is_plain(x.is_cuda) or requested() not in ("auto", "triton") or not x.numel():
        return False
    return torch.is_grad_enabled() and (requested() == "triton" or bool(_known(x)))


def explain_mlp(device: torch.device, dtype: torch.dtype, width: int) -> tuple[str, str]:
    """What serves an MLP of a width in training by its rows, and why."""
    reason = why_not_on(device, dtype)
    if reason is not None:
        return RUNS["eager"], f"Triton: {reason}"
    known = _known(torch.empty(0, width, dtype=dtype, device=device))
    if not known:
        return RUNS["eager"], f"Triton, on request: {UNMEASURED}"
    served = "; ".join(f"from {each.rows} rows {RUNS[each.training[0]]}" for each in known if each.training)
    return served, f"measured on {known[0].gpu}"


def _known(x: Tensor) -> tuple[Measured, ...]:
    return measured_on(x.device, dtype_of_products(x), x.shape[-1], OP)


def _why_not(x: Tensor, fc1: Affine, fc2: Affine) -> str | None:
    """Why no kernels can serve."""
    every = [t for t in (x, *fc1, *fc2) if t is not None]
    if (reason := why_not_on(x.device, dtype_of_products(x))) is not None:
        return reason
    if is_transforming() or is_forward_mode():
        return "the Triton kernels have no rules for the transforms of torch.func, nor for dual numbers"
    if not wants_gradient(every):
        return "it is for training: no gradient is wanted"
    if any(type(tensor) not in (Tensor, Parameter) for tensor in every):
        return "a tensor is of a subclass with rules of its own"
    if not torch.is_autocast_enabled(x.device.type) and any(tensor.dtype != x.dtype for tensor in every):
        return "x and the weights are not of one dtype"
    return None


def _why_not_path(x: Tensor, fc1: Affine, fc2: Affine, path: str) -> str | None:
    """Why a path cannot serve what kernels can."""
    from uniflow_kernels.triton_kernels import products

    hidden, width = fc1.weight.shape
    return products.why_not(x.device, dtype_of_products(x), (width, hidden), [fc2.weight], path in SMALL)


# --- registered op ---


def _mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, path: str
) -> tuple[Tensor, Tensor]:
    """x [R, W] -> the result [R, W] and what fc1 makes, [R, H]."""
    p = F.linear(x, w1, b1)
    return F.linear(ACTIVATIONS[activation](p), w2, b2), p


def _setup(ctx: Any, arguments: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    x, w1, b1, w2, b2, ctx.activation, ctx.path = arguments
    ctx.save_for_backward(x, w1, w2, outputs[1])
    ctx.biases = [None if bias is None else bias.dtype for bias in (b1, b2)]
    ctx.wanted = [tensor is not None and tensor.requires_grad for tensor in (x, w1, w2)]


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> dict[str, Tensor | None]:
    if dy is None:
        return {}
    x, w1, w2, p = ctx.saved_tensors
    of_x, of_w1, of_w2 = ctx.wanted
    dy = dy.contiguous()
    dp, u, sums = mlp_backward_op(dy, w2, p, ctx.activation, ctx.path)
    b1, b2 = ctx.biases
    return {
        "x": dp @ w1 if of_x else None,
        "w1": dp.T @ x if of_w1 else None,
        "b1": None if b1 is None else sums.to(b1),
        "w2": dy.T @ u if of_w2 else None,
        "b2": None if b2 is None else dy.sum(0),
    }


def _mlp_backward(dy: Tensor, w2: Tensor, p: Tensor, activation: str, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the result [R, W] -> of p [R, H], the activation of p [R, H], and the gradient's sums [H]."""
    from uniflow_kernels.triton_kernels.flow_products import down_backward

    return down_backward(dy, w2, p, path in SMALL, activation=activation)


_ARGUMENTS = "str activation, str path"
mlp_backward_op = register(
    f"transformer_mlp_backward(Tensor dy, Tensor w2, Tensor p, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _mlp_backward,
    lambda dy, w2, p, *_: (
        torch.empty_like(p),
        torch.empty_like(p),
        p.new_empty(p.shape[1], dtype=torch.float32),
    ),
)
transformer_mlp_op = register(
    f"transformer_mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _mlp,
    lambda x, w1, *_: (torch.empty_like(x), x.new_empty(x.shape[0], w1.shape[0])),
    _setup,
    _backward,
)
