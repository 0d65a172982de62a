"""A linear layer, an activation and a linear layer, without gradients on the paths that transformer layers have.

By products the activation is in the epilogue of the first, and a position in that of the second; on a CPU oneDNN does
the former. Where layers of this width run by rows or as they are, plain PyTorch serves.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from uniflow_kernels.ops.flow_blocks import Affine, check_choice, flat_rows
from uniflow_kernels.ops.flow_choice import SMALL
from uniflow_kernels.ops.transformer_layers import (
    ACTIVATIONS,
    ONE_DNN,
    linear_by_one_dnn,
    may_have_kernels,
    paths_by_time,
    serves_one_dnn,
    why_not_here,
    why_not_tensors,
)

_PRODUCTS = ("products", "small products")


def mlp(
    x: Tensor, fc1: Affine, fc2: Affine, activation: str = "gelu", position: Tensor | None = None, path: str = "auto"
) -> Tensor:
    """fc2(activation(fc1(x))), and a position added.

    Args:
        x: [B, S, W].
        fc1: weight [H, W] and bias [H] or None.
        fc2: weight [O, H] and bias [O] or None.
        activation: one of ACTIVATIONS.
        position: [1, S, O] or None.
        path: "products" or "small products" where no other may serve, as in tests; else "auto".

    Returns:
        [B, S, O]. Differentiable in all where autograd records, which plain PyTorch then serves.

    Raises:
        ValueError: for an unknown activation or path, or a path that cannot serve, saying why.
    """
    check_choice("activation", activation, tuple(ACTIVATIONS))
    check_choice("path", path, ("auto", *_PRODUCTS))
    tensors = [t for t in (*fc1, *fc2, position) if t is not None]
    width = fc1.weight.shape[0]
    if path == "auto":
        path = _choose(x, width, tensors)
    elif (reason := _why_not(x, width, tensors, path)) is not None:
        raise ValueError(f"mlp: path {path!r} cannot serve this input: {reason}")
    if path in _PRODUCTS:
        return _by_products(x, fc1, fc2, activation, position, path in SMALL)
    if path == ONE_DNN:
        made = linear_by_one_dnn(linear_by_one_dnn(x, fc1, activation), fc2)
    else:
        made = F.linear(ACTIVATIONS[activation](F.linear(x, *fc1)), *fc2)
    return made if position is None else made + position


def _by_products(x: Tensor, fc1: Affine, fc2: Affine, activation: str, position: Tensor | None, small: bool) -> Tensor:
    from uniflow_kernels.triton_kernels.layer_products import activated_product, residual_product

    hidden = activated_product(flat_rows(x), fc1, activation, small)
    if position is None:  # nothing is left to do behind it
        return F.linear(hidden, *fc2).view(*x.shape[:-1], -1)
    made, _ = residual_product(hidden, fc2, None, position.flatten(0, 1).contiguous(), None, small=small)
    return made.view(*x.shape[:-1], -1)


def _choose(x: Tensor, width: int, tensors: list[Tensor]) -> str:
    if not may_have_kernels(x, width):
        return "eager"
    if serves_one_dnn(x, tensors):
        return ONE_DNN
    # the fastest that is none of these is to take the library's products
    fastest = next((path for path in paths_by_time(x, width) if _why_not(x, width, tensors, path) is None), "eager")
    return fastest if fastest in _PRODUCTS else "eager"


def _why_not(x: Tensor, width: int, tensors: list[Tensor], path: str) -> str | None:
    """Why a path cannot serve."""
    if path not in _PRODUCTS:
        return None
    if (reason := why_not_here(x.device, x.dtype, width) or why_not_tensors(x, tensors)) is not None:
        return reason
    from uniflow_kernels.triton_kernels import products

    matrices = [flat_rows(x), *(t for t in tensors if t.ndim == 2)]
    return products.why_not(x.device, x.dtype, (width,), matrices, path in SMALL)
