"""SiLU or SwiGLU of values and their tangents in one kernel, with gradients of both.

The plain form, which serves wherever kernels do not, is `Rules` of `uniflow_kernels.ops.flow_tangents`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from uniflow_kernels.ops.dual_norm import Rows, halves
from uniflow_kernels.ops.registration import register


def dual_activation(p: Rows, hidden: int) -> Rows:
    """SiLU of [R, H], or of [R, 2H] SiLU of the first half times the second -> [R, H].

    Args:
        p: with the bias that is to be added first; R at least 1.
        hidden: H.

    Returns:
        As many tensors as p has. Both are differentiable, the tangents where p is one tensor.
    """
    return Rows(list(_DualActivation.apply(hidden, p.bias, *p.tensors)))


class _DualActivation(torch.autograd.Function):
    """Values of one tensor with their tangents; or values, and tangents apart, which are constants."""

    @staticmethod
    def forward(ctx: Any, hidden: int, bias: Tensor | None, *p: Tensor) -> tuple[Tensor, ...]:
        made = dual_activation_op(p, bias, hidden)
        ctx.save_for_backward(p[0], bias)
        ctx.mark_non_differentiable(*made[1:])
        ctx.set_materialize_grads(False)
        ctx.constants = len(p) - 1
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, du: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        p, bias = ctx.saved_tensors
        if du is None:
            return (None,) * (3 + ctx.constants)
        dp, dbias = dual_activation_backward_op(du.contiguous(), p, bias)
        return None, None if bias is None else dbias, dp, *[None] * ctx.constants


def _dual_activation(p: Sequence[Tensor], bias: Tensor | None, hidden: int) -> list[Tensor]:
    """Value and tangent in one tensor [2, R, H], or in two, as p has them."""
    from uniflow_kernels.triton_kernels import dual_activation as kernels

    made = _dual_activation_fake(p, bias, hidden)
    with torch.cuda.device_of(p[0]):
        kernels.dual_activation(halves(p), bias, halves(made))
    return made


def _dual_activation_fake(p: Sequence[Tensor], bias: Tensor | None, hidden: int) -> list[Tensor]:
    return [each.new_empty((*each.shape[:-1], hidden)) for each in p]


def _dual_activation_backward(du: Tensor, p: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of p, [2, R, H or 2H], or of values alone, and of the bias, empty without one."""
    from uniflow_kernels.triton_kernels import dual_activation as kernels

    dp, _ = made = _dual_activation_backward_fake(du, p, bias)
    pairs = [halves([each]) if p.ndim == 3 else (each, None) for each in (du, p, dp)]
    with torch.cuda.device_of(p):
        dbias = kernels.dual_activation_backward(pairs[0], pairs[1], bias, pairs[2])
    return made if bias is None else (dp, dbias.to(bias.dtype, copy=True))


def _dual_activation_backward_fake(du: Tensor, p: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return p.new_empty(p.shape), p.new_empty(0) if bias is None else bias.new_empty(bias.shape)


dual_activation_op = register(
    "dual_activation(Tensor[] p, Tensor? bias, int hidden) -> Tensor[]", _dual_activation, _dual_activation_fake
)
dual_activation_backward_op = register(
    "dual_activation_backward(Tensor du, Tensor p, Tensor? bias) -> (Tensor, Tensor)",
    _dual_activation_backward,
    _dual_activation_backward_fake,
)
