"""A layer's last residual, the next one's norm and the distance of the sum to a teacher's, in one pass each way.

What a layer gives is read by the norm of the next one, and once more in that norm's backward pass. The cosine distance
of layer-wise distillation and its gradient are made there, of rows that are in registers anyway: the teacher's is the
one thing more that is read, each way. So its features are kept for the backward pass, and no gradient of a distance is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from uniflow_kernels.ops.distillation import mean_distance
from uniflow_kernels.ops.flow_blocks import flat_rows
from uniflow_kernels.ops.modulated_norm import check_residual_norm, norm_is_plain, residual_norm
from uniflow_kernels.ops.registration import register


def compared_residual_norm(
    x: Tensor,
    q: Tensor,
    gate: Tensor | None = None,
    *,
    teacher: Tensor,
    skip_tokens: int = 0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`residual_norm` and how far its sum is from a teacher's: s = x + gate * q, norm(s), mean(1 - cosine(s, teacher)).

    Args:
        x: [B, S, W], float; any strides.
        q: what attention or an MLP made, of x's shape.
        gate: LayerScale, [W]; None for x + q.
        teacher: of x's shape; no gradient flows into it.
        skip_tokens: how many tokens at the front of each [S, W] do not count in the mean.
        weight, bias, norm, eps, dtype: as `residual_norm` takes them.

    Returns:
        s in x's dtype, its norm, both of x's shape, and the distance, a scalar in float32, as `layerwise_distillation`
        has it of a layer. Norm and distance are those of s as it is rounded.

    Raises:
        TypeError, ValueError: as `residual_norm`; if the teacher does not fit x, or gate is no [W].
    """
    check_residual_norm(x, q, gate, weight, bias, norm)
    if x.ndim != 3:
        raise ValueError(f"x: expected [B, S, W], got shape {tuple(x.shape)}")
    if teacher.shape != x.shape or not teacher.is_floating_point():
        found = f"{tuple(teacher.shape)}, {teacher.dtype}"
        raise ValueError(f"teacher: expected x's shape {tuple(x.shape)} in a floating dtype, got {found}")
    if not 0 <= skip_tokens <= x.shape[1]:
        raise ValueError(f"skip_tokens: expected 0 to {x.shape[1]} tokens, got {skip_tokens}")
    if gate is not None and gate.shape != x.shape[-1:]:
        raise ValueError(f"gate: expected shape ({x.shape[-1]},), got {tuple(gate.shape)}")
    if norm_is_plain(x, q, gate, teacher, weight, bias):
        s, h = residual_norm(x, q, gate, weight=weight, bias=bias, norm=norm, eps=eps, dtype=dtype)
        return s, h, mean_distance(s, teacher, skip_tokens)
    vectors = (None if vector is None else vector.contiguous() for vector in (gate, weight, bias))
    return _ComparedNorm.apply(x, q, teacher.detach(), *vectors, skip_tokens, norm, eps, dtype or x.dtype)


class _ComparedNorm(torch.autograd.Function):
    """Not `register`'s gradient, which is that of one result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, teacher: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        gate, weight, bias, skip_tokens, *how, dtype = rest
        s, h, distance, coefficients = compared_norm_op(x, q, teacher, gate, weight, bias, skip_tokens, *how, dtype)
        # without a gate the gradients of x and q are the same, whatever q is
        ctx.save_for_backward(s, None if gate is None else q, teacher, coefficients, gate, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.how = skip_tokens, *how
        return s, h, distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds: Tensor | None, dh: Tensor | None, ddistance: Tensor | None) -> tuple[Any, ...]:
        s, q, *others = ctx.saved_tensors
        _, _, gate, weight, bias = others
        dh = torch.zeros_like(s) if dh is None else dh
        ddistance = s.new_zeros((), dtype=torch.float32) if ddistance is None else ddistance
        dx, dq, dgate, dweight, dbias = compared_norm_backward_op(dh, ds, ddistance, s, q, *others, *ctx.how)
        of_vectors = [None if v is None else d for v, d in ((gate, dgate), (weight, dweight), (bias, dbias))]
        return dx, dx if q is None else dq, None, *of_vectors, None, None, None, None


def _compared_norm(
    x: Tensor,
    q: Tensor,
    teacher: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    skip_tokens: int,
    norm: str,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """[B, S, W] each -> the sum, its norm, the mean distance, the coefficients of each token's gradient [B*S, 2]."""
    from uniflow_kernels.triton_kernels import compared_norm as kernels

    s, h, _, coefficients = made = _compared_norm_fake(x, q, teacher, gate, weight, bias, skip_tokens, norm, eps, dtype)
    distances = x.new_empty(x.shape[:2], dtype=torch.float32)
    with torch.cuda.device_of(x):
        kernels.compared_norm(
            flat_rows(x),
            gate,
            flat_rows(q),
            (weight, bias),
            flat_rows(teacher),
            x.shape[1],
            skip_tokens,
            flat_rows(s),
            flat_rows(h),
            distances.view(-1),
            coefficients,
            norm == "rms",
            eps,
        )
    made[2] = distances.sum().mul_(_share(x, skip_tokens))
    return made


def _share(x: Tensor, skip_tokens: int) -> float:
    """Of each token of x [B, S, W] that counts, in the mean."""
    return 1 / max(1, x.shape[0] * (x.shape[1] - skip_tokens))


def _compared_norm_fake(x: Tensor, *others: Any) -> list[Tensor]:
    h = x.new_empty(x.shape, dtype=others[-1])
    coefficients = x.new_empty(x.shape[0] * x.shape[1], 2, dtype=torch.float32)
    return [x.new_empty(x.shape), h, x.new_empty((), dtype=torch.float32), coefficients]


def _compared_norm_backward(
    dh: Tensor,
    ds: Tensor | None,
    ddistance: Tensor,
    s: Tensor,
    q: Tensor | None,
    teacher: Tensor,
    coefficients: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    skip_tokens: int,
    norm: str,
    eps: float,
) -> list[Tensor]:
    """Gradients of x, q, gate, weight and bias; empty for what is not there, q's too where it is x's."""
    from uniflow_kernels.triton_kernels import compared_norm as kernels

    dx, dq, *_ = made = _compared_norm_backward_fake(dh, ds, ddistance, s, q, teacher, coefficients, gate, weight, bias)
    with torch.cuda.device_of(s):
        sums = kernels.compared_norm_backward(
            flat_rows(dh),
            None if ds is None else flat_rows(ds),
            ddistance,
            _share(s, skip_tokens),
            flat_rows(s),
            gate,
            None if q is None else flat_rows(q),
            (weight, bias),
            flat_rows(teacher),
            coefficients,
            flat_rows(dx),
            None if q is None else flat_rows(dq),
            norm == "rms",
            eps,
        )
    for of_vector, part in zip(made[2:], (2, 0, 1), strict=True):
        if of_vector.numel():
            of_vector.copy_(sums[part])
    return made


def _compared_norm_backward_fake(
    dh: Tensor,
    ds: Tensor | None,
    ddistance: Tensor,
    s: Tensor,
    q: Tensor | None,
    teacher: Tensor,
    coefficients: Tensor,
    *rest: Any,
) -> list[Tensor]:
    likes = s, q, *rest[:3]
    return [s.new_empty(0) if like is None else like.new_empty(like.shape) for like in likes]


_HOW = "SymInt skip_tokens, str norm, float eps"
compared_norm_op = register(
    f"compared_norm(Tensor x, Tensor q, Tensor teacher, Tensor? gate, Tensor? weight, Tensor? bias, {_HOW}, "
    "ScalarType dtype) -> Tensor[]",
    _compared_norm,
    _compared_norm_fake,
)
compared_norm_backward_op = register(
    "compared_norm_backward(Tensor dh, Tensor? ds, Tensor ddistance, Tensor s, Tensor? q, Tensor teacher, "
    f"Tensor coefficients, Tensor? gate, Tensor? weight, Tensor? bias, {_HOW}) -> Tensor[]",
    _compared_norm_backward,
    _compared_norm_backward_fake,
)
