"""Gated residual and adaptive norm of values and their tangents in one row kernel, with gradients of both.

What is computed is `uniflow_kernels.ops.modulated_norm`, and its derivative along a direction; the plain form, which
serves wherever kernels do not, is `Rules` of `uniflow_kernels.ops.flow_tangents`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from uniflow_kernels.ops.flow_blocks import Affine, Form
from uniflow_kernels.ops.modulated_norm import modulated_norm_backward_op
from uniflow_kernels.ops.registration import register

if TYPE_CHECKING:
    from uniflow_kernels.triton_kernels.dual_norm import Pair

MAX_WIDTH = 2048  # beyond it the backward kernel's row does not fit the registers of 16 warps


class Rows(NamedTuple):
    """Values and tangents of R rows, and what is still to be added to every value.

    Args:
        tensors: one tensor of both, [2, R, W], so that a product reads its weight once for both; or two, [R, W], where
            the tangent is a constant, so that it is not kept for as long as the value.
        bias: [W], of the product that made the rows; None if there is nothing to add.
    """

    tensors: list[Tensor]
    bias: Tensor | None = None

    def split(self, cut: Callable[[Tensor], Sequence[Tensor]]) -> list[Rows]:
        """Into parts of the last dimension."""
        parts = zip(*map(cut, self.tensors), strict=True)
        if self.bias is None:
            return [Rows(list(part)) for part in parts]
        return [Rows(list(part), bias) for part, bias in zip(parts, cut(self.bias), strict=True)]

    def expand(self, rows: int) -> Rows:
        """One row for all of so many, or as many as there are."""
        return Rows([tensor.expand(*tensor.shape[:-2], rows, -1) for tensor in self.tensors], self.bias)


def dual_norm(
    x: Rows, residual: tuple[Rows, Rows] | None, modulation: tuple[Rows, Rows] | None, norm: Affine | None, form: Form
) -> tuple[Rows, Rows]:
    """The gated residual, and the adaptive norm of it: s = x + gate * q, and norm(s) * (1 + scale) + shift.

    Args:
        x: [R, W], with no bias to be added; W at most MAX_WIDTH, R at least 1.
        residual: gate and q, like x; None if s is x.
        modulation: shift and scale, like x; None for the norm alone.
        norm: weight and bias of the norm; None if it has none.
        form: the kind of norm, and its eps.

    Returns:
        s and its norm; the norm is that of s as it is rounded. Both are differentiable, the tangents where x is one
        tensor.
    """
    nothing = Rows([])
    gate, q = residual or (nothing, nothing)
    shift, scale = modulation or (nothing, nothing)
    of_norm = [None if vector is None else vector.contiguous() for vector in norm or (None, None)]
    vectors = *of_norm, gate.bias, q.bias, shift.bias, scale.bias
    duals: list[Sequence[Tensor | None]] = [
        dual.tensors or [None] * len(x.tensors) for dual in (x, gate, q, shift, scale)
    ]
    values, *tangents = zip(*duals, strict=True)
    found = _DualNorm.apply(form.norm, form.eps, *values, *vectors, *(tangents[0] if tangents else ()))
    return Rows(list(found[::2])) if residual else x, Rows(list(found[1::2]))


class _DualNorm(torch.autograd.Function):
    """Values of one tensor each with their tangents; or values, and tangents apart, which are constants."""

    @staticmethod
    def forward(ctx: Any, norm: str, eps: float, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        values, vectors, tangents = tensors[:5], tensors[5:11], tensors[11:]
        duals = zip(values, tangents, strict=True) if tangents else zip(values, strict=True)
        made = dual_norm_op(*([] if dual[0] is None else list(dual) for dual in duals), vectors, norm, eps)
        x, gate, q, _, scale = values
        ctx.save_for_backward(x if q is None else made[0], gate, q, scale, *vectors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*made[2:])
        ctx.how, ctx.constants = (norm, eps), len(tangents)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor | None, dh: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        total, gate, q, scale, *vectors = ctx.saved_tensors
        dtotal = None if q is None else dtotal  # of nothing
        if dh is None and dtotal is None:
            return (None,) * (13 + ctx.constants)
        dh = torch.zeros_like(total, memory_format=torch.contiguous_format) if dh is None else dh.contiguous()
        if ctx.constants:
            how = *vectors[:2], 1, *ctx.how
            dx, dgate, dq, dshift, dscale, *found = modulated_norm_backward_op(dh, dtotal, total, gate, q, scale, *how)
        else:
            dx, dgate, dq, dscale, *found = dual_norm_backward_op(dh, dtotal, total, gate, q, scale, vectors, *ctx.how)
            dshift = dh
        others = zip((gate, q, scale, scale, *vectors), (dgate, dq, dshift, dscale, *found, *[None] * 4), strict=False)
        gradients = [None if given is None else gradient for given, gradient in others]
        return None, None, dx, *gradients, *[None] * ctx.constants


def _dual_norm(
    x: Sequence[Tensor],
    gate: Sequence[Tensor],
    q: Sequence[Tensor],
    shift: Sequence[Tensor],
    scale: Sequence[Tensor],
    vectors: Sequence[Tensor | None],
    norm: str,
    eps: float,
) -> list[Tensor]:
    """The sum, empty without q, and its adaptive norm, with their tangents in them; or behind them, of two tensors."""
    from uniflow_kernels.triton_kernels import dual_norm as kernels

    made = _dual_norm_fake(x, gate, q)
    modulation = (halves(shift), halves(scale)) if scale else None
    if modulation is not None and shift[0].stride() != scale[0].stride():  # the kernel has one stride for both
        modulation = halves([part.contiguous() for part in shift]), halves([part.contiguous() for part in scale])
    with torch.cuda.device_of(x[0]):
        kernels.dual_norm(
            halves(x),
            (halves(gate), halves(q)) if q else None,
            modulation,
            kernels.Vectors(*vectors),
            halves(made[::2]) if q else None,
            halves(made[1::2]),
            norm == "rms",
            eps,
        )
    return made


def _dual_norm_fake(x: Sequence[Tensor], gate: Sequence[Tensor], q: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [part for each in x for part in (each.new_empty(each.shape if q else 0), each.new_empty(each.shape))]


def halves(dual: Sequence[Tensor]) -> Pair:
    """Value and tangent [R, W] of one tensor or of two, of one stride: as views, where that is theirs."""
    value, tangent = dual[0].unbind() if len(dual) == 1 else dual
    if value.stride(-1) != 1 or value.stride() != tangent.stride():
        value, tangent = (half.clone(memory_format=torch.contiguous_format) for half in (value, tangent))
    return value, tangent


def _dual_norm_backward(
    dh: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    gate: Tensor | None,
    q: Tensor | None,
    scale: Tensor | None,
    vectors: Sequence[Tensor | None],
    norm: str,
    eps: float,
) -> list[Tensor]:
    """Gradients of x, gate, q, scale and the vectors, in their order, empty for what is not there; shift's is dh."""
    from uniflow_kernels.triton_kernels import dual_norm as kernels

    made = [total.new_empty(0 if like is None else like.shape) for like in (total, gate, q, scale)]
    dx, dgate, dq, dscale = (halves([whole]) if whole.numel() else None for whole in made)
    assert dx is not None
    with torch.cuda.device_of(total):
        sums = kernels.dual_norm_backward(
            halves([dh]),
            None if dtotal is None else halves([dtotal.contiguous()]),
            halves([total]),
            None if gate is None or q is None else (halves([gate]), halves([q])),
            None if scale is None else halves([scale]),
            kernels.Vectors(*vectors),
            dx,
            None if dgate is None or dq is None else (dgate, dq),
            dscale,
            norm == "rms",
            eps,
        )
    of_vectors = [
        total.new_empty(0) if vector is None else part.to(vector.dtype, copy=True)
        for vector, part in zip(vectors, sums, strict=True)
    ]
    return [*made, *of_vectors]


def _dual_norm_backward_fake(
    dh: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    gate: Tensor | None,
    q: Tensor | None,
    scale: Tensor | None,
    vectors: Sequence[Tensor | None],
    *_: Any,
) -> list[Tensor]:
    rows = [total.new_empty(0 if like is None else like.shape) for like in (total, gate, q, scale)]
    return [*rows, *(total.new_empty(0) if like is None else like.new_empty(like.shape) for like in vectors)]


dual_norm_op = register(
    "dual_norm(Tensor[] x, Tensor[] gate, Tensor[] q, Tensor[] shift, Tensor[] scale, Tensor?[] vectors, str norm, "
    "float eps) -> Tensor[]",
    _dual_norm,
    _dual_norm_fake,
)
dual_norm_backward_op = register(
    "dual_norm_backward(Tensor dh, Tensor? dtotal, Tensor total, Tensor? gate, Tensor? q, Tensor? scale, "
    "Tensor?[] vectors, str norm, float eps) -> Tensor[]",
    _dual_norm_backward,
    _dual_norm_backward_fake,
)
