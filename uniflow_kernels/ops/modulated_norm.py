"""The residual and the norm of transformers' blocks, gated and adaptive or not, around whatever stands between them.

Source: adaLN-Zero of DiT (Peebles and Xie 2023, figure 3), which SiT, LightningDiT and diffusers took over; LayerScale
(Touvron et al. 2021, section 2) for the residual of vision transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from uniflow_kernels.choice import choose, requested
from uniflow_kernels.ops.flow_blocks import NORMS, check_choice, conditions_of, flat_rows, layer_norm
from uniflow_kernels.ops.flow_choice import MAX_WIDTH, is_plain
from uniflow_kernels.ops.registration import register
from uniflow_kernels.torch_private import constant, is_forward_mode, is_transforming
from uniflow_kernels.triton_kernels import why_not_on

if TYPE_CHECKING:
    from uniflow_kernels.triton_kernels.flow_head import Rows

# --- public functions and their plain forms ---


def modulated_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
) -> Tensor:
    """norm(x) * (1 + scale) + shift.

    Args:
        x: [..., W], float; any strides.
        shift: broadcastable to x's rows: [B, 1, W] for x [B, S, W], [W] for all rows, or x's shape.
        scale: of shift's shape.
        weight: of the norm, [W].
        bias: of a layer norm, [W].
        norm: "layer" or "rms".
        eps: of the norm.

    Returns:
        x's shape, in x's dtype. Statistics are float32 (float64 for x in float64).

    Raises:
        TypeError: if a tensor is not floating point.
        ValueError: if shapes do not fit together, for an unknown norm, or if the backend asked for cannot serve.
    """
    how = _How(weight, bias, norm, eps)
    how.check(x, {"shift": shift, "scale": scale})
    if norm_is_plain(x, shift, scale, weight, bias):
        return plain_modulated_norm(x, shift, scale, how)
    return _run(x, None, None, (shift, scale), how)[1]


def gated_residual_norm(
    x: Tensor,
    gate: Tensor,
    q: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The gated residual, and the adaptive norm of it: s = x + gate * q, and norm(s) * (1 + scale) + shift.

    Args:
        x: [..., W], float; any strides.
        gate: broadcastable to x's rows, as shift.
        q: what attention or an MLP made, of x's shape.
        shift, scale, weight, bias, norm, eps: as `modulated_norm` takes them.

    Returns:
        s and its adaptive norm, both of x's shape in x's dtype. The norm is that of s as it is rounded.

    Raises:
        TypeError, ValueError: as `modulated_norm`.
    """
    how = _How(weight, bias, norm, eps)
    how.check(x, {"gate": gate, "shift": shift, "scale": scale})
    _check_branch(q, x)
    if norm_is_plain(x, gate, q, shift, scale, weight, bias):
        total = _sum(x, gate, q, x.dtype)
        return total, plain_modulated_norm(total, shift, scale, how)
    return _run(x, gate, q, (shift, scale), how)


def residual_norm(
    x: Tensor,
    q: Tensor,
    gate: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual with LayerScale, and the norm of it: s = x + gate * q, and norm(s).

    Args:
        x: [..., W], float; any strides.
        q: what attention or an MLP made, of x's shape.
        gate: LayerScale, [W]; or broadcastable to x's rows, as `gated_residual_norm` takes it. None for x + q.
        weight, bias, norm, eps: as `modulated_norm` takes them.
        dtype: of norm(s); x's by default. Where the sum is float32 and the product behind the norm is not, it saves a
            pass.

    Returns:
        s in x's dtype and its norm, both of x's shape. The norm is that of s as it is rounded.

    Raises:
        TypeError, ValueError: as `gated_residual_norm`.
    """
    check_residual_norm(x, q, gate, weight, bias, norm)
    how = _How(weight, bias, norm, eps)
    if norm_is_plain(x, gate, q, weight, bias):
        total = _sum(x, gate, q, x.dtype)
        return total, _plain_norm(total, how).to(x.dtype if dtype is None else dtype)
    return _run(x, gate, q, None, how, dtype)


def check_residual_norm(
    x: Tensor, q: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, norm: str
) -> None:
    """Raise what `residual_norm` raises of arguments that do not fit."""
    _How(weight, bias, norm, 0.0).check(x, {} if gate is None else {"gate": gate})
    _check_branch(q, x)


class _How(NamedTuple):
    """The norm."""

    weight: Tensor | None
    bias: Tensor | None
    norm: str
    eps: float

    def check(self, x: Tensor, modulations: dict[str, Tensor]) -> None:
        """Raise if something does not fit."""
        check_choice("norm", self.norm, NORMS)
        if self.norm == "rms" and self.bias is not None:
            raise ValueError("bias: an rms norm has none")
        vectors = {"weight": self.weight, "bias": self.bias}
        for name, tensor in {"x": x, **modulations, **vectors}.items():
            if tensor is not None and not tensor.is_floating_point():
                raise TypeError(f"{name}: expected a floating point dtype, got {tensor.dtype}")
        if x.ndim == 0:
            raise ValueError("x: expected [..., W], got a scalar")
        width = x.shape[-1]
        for name, tensor in vectors.items():
            if tensor is not None and tensor.shape != (width,):
                raise ValueError(f"{name}: expected shape ({width},), got {tuple(tensor.shape)}")
        if not modulations:
            return
        first = "shift" if "shift" in modulations else "gate"
        shape = modulations[first].shape
        rows = x.shape[x.ndim - len(shape) : -1]
        fits = 0 < len(shape) <= x.ndim and shape[-1] == width
        if not fits or any(mine not in (1, theirs) for mine, theirs in zip(shape[:-1], rows, strict=True)):
            expected = f"[..., {width}], broadcastable to x's {tuple(x.shape)}"
            raise ValueError(f"{first}: expected {expected}, got {tuple(shape)}")
        for name, tensor in modulations.items():
            if tensor.shape != shape:
                raise ValueError(f"{name}: expected {first}'s shape {tuple(shape)}, got {tuple(tensor.shape)}")


def _check_branch(q: Tensor, x: Tensor) -> None:
    if q.shape != x.shape or not q.is_floating_point():
        raise ValueError(f"q: expected x's shape {tuple(x.shape)} in a floating dtype, got {tuple(q.shape)}, {q.dtype}")


def plain_modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, how: _How) -> Tensor:
    """`modulated_norm` in plain PyTorch."""
    scale = scale if scale.dtype == x.dtype else scale.to(_widest(x, scale))
    return _sum(shift, _plain_norm(x, how), scale + 1, x.dtype)


def _plain_norm(x: Tensor, how: _How) -> Tensor:
    if how.norm == "layer":
        return layer_norm(x, _like(how.weight, x), _like(how.bias, x), how.eps)
    return F.rms_norm(x, x.shape[-1:], _like(how.weight, x), how.eps)


def _like(vector: Tensor | None, x: Tensor) -> Tensor | None:
    return vector if vector is None or vector.dtype == x.dtype else vector.to(x.dtype)


def _sum(a: Tensor, b: Tensor | None, c: Tensor, dtype: torch.dtype) -> Tensor:
    """a + b * c, in the widest of their dtypes; a + c without b."""
    if b is None:
        return (a + c).to(dtype)
    if a.dtype == b.dtype == c.dtype == dtype:  # next to small rows, asking further takes as long as adding
        return torch.addcmul(a, b, c)
    wide = _widest(a, b, c)
    return torch.addcmul(a.to(wide), b.to(wide), c.to(wide)).to(dtype)


def _widest(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def norm_is_plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether plain PyTorch serves: asked before the registered op, so that it stays open to whoever looks into it."""
    if is_plain(x.is_cuda):
        return True
    return _backend(x.device, *_dtype_and_reason(x, others)) == "eager" or x.numel() == 0


def norm_has_kernels(x: Tensor, *others: Tensor | None) -> bool:
    """Whether kernels serve `residual_norm` of these, for layers that do without where none can, whatever is asked for.

    Not where torch.compile looks, which makes one kernel of the plain form itself.
    """
    if torch.compiler.is_compiling() or is_plain(x.is_cuda) or requested() not in ("auto", "triton"):
        return False
    return x.numel() > 0 and _why_not(x.device, *_dtype_and_reason(x, others)) is None


def _dtype_and_reason(x: Tensor, others: Sequence[Tensor | None]) -> tuple[torch.dtype, str | None]:
    """The dtype to be asked about, and what speaks against the kernels whatever the device."""
    given = [tensor for tensor in (x, *others) if tensor is not None]
    odd = any(type(tensor) not in (Tensor, Parameter) for tensor in given)
    dtype = next((t.dtype for t in given if t.dtype == torch.float64), x.dtype)
    reason = f"up to {MAX_WIDTH} wide, not {x.shape[-1]}" if x.shape[-1] > MAX_WIDTH else None
    return dtype, "a tensor is of a subclass with rules of its own" if odd else reason


@constant
def _backend(device: torch.device, dtype: torch.dtype, reason: str | None) -> str:
    return choose("modulated_norm", {"triton": _why_not(device, dtype, reason)})


def _why_not(device: torch.device, dtype: torch.dtype, reason: str | None) -> str | None:
    reason = why_not_on(device, dtype) or reason
    if is_transforming() or is_forward_mode():
        reason = reason or "the Triton kernels have no rules for the transforms of torch.func, nor for dual numbers"
    return reason


# --- registered ops ---


def _run(
    x: Tensor,
    gate: Tensor | None,
    q: Tensor | None,
    modulation: tuple[Tensor, Tensor] | None,
    how: _How,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    shift, scale = modulation or (None, None)
    condition = next((each for each in (shift, gate) if each is not None), x)
    conditions, repeat = conditions_of(x, condition)

    def flat(modulation: Tensor | None) -> Tensor | None:
        if modulation is None:
            return None
        fits = modulation.shape[:-1].numel() == conditions
        return flat_rows(modulation if fits else modulation.expand(x.shape))

    residual = flat(gate), None if q is None else flat_rows(q)
    vectors = (None if vector is None else vector.contiguous() for vector in how[:2])
    total, h = _ModulatedNorm.apply(
        flat_rows(x), *residual, flat(shift), flat(scale), *vectors, repeat, how.norm, how.eps, dtype or x.dtype
    )
    return total if q is None else total.view(x.shape), h.view(x.shape)


class _ModulatedNorm(torch.autograd.Function):
    """Not `register`'s gradient, which is that of one result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, q: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        shift, scale, weight, bias, *how, dtype = rest
        total, h = modulated_norm_op(x, gate, q, shift, scale, weight, bias, *how, dtype)
        # without a gate the gradients of x and q are the same, whatever q is
        ctx.save_for_backward(x if q is None else total, gate, None if gate is None else q, scale, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.how, ctx.has_branch, ctx.of_shift = how, q is not None, None if shift is None else shift.dtype
        return total, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        total, gate, q, scale, weight, bias = ctx.saved_tensors
        if not ctx.has_branch:
            dtotal = None  # of nothing
        if dh is None and dtotal is None:
            return (None,) * 11
        dh = torch.zeros_like(total) if dh is None else dh
        found = modulated_norm_backward_op(dh, dtotal, total, gate, q, scale, weight, bias, *ctx.how)
        dx, dgate, dq, dshift, dscale, dweight, dbias = found
        of_q = (None, dx if ctx.has_branch else None) if q is None else (dgate, dq)
        of_modulation = (None, None) if scale is None else (dshift.to(ctx.of_shift), dscale)
        of_norm = None if weight is None else dweight, None if bias is None else dbias
        return dx, *of_q, *of_modulation, *of_norm, None, None, None, None


def _modulated_norm(
    x: Tensor,
    gate: Tensor | None,
    q: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    repeat: int,
    norm: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x and q [R, W], gate, shift and scale [C, W] -> the sum [R, W], empty without q, and its adaptive norm [R, W]."""
    from uniflow_kernels.triton_kernels.flow_head import norm_modulate

    total, h = _modulated_norm_fake(x, gate, q, dtype)
    modulation = None if shift is None or scale is None else (shift, scale)
    if modulation is not None and modulation[0].stride(0) != modulation[1].stride(0):
        # the kernel has one stride for both
        shift, scale = (t.clone(memory_format=torch.contiguous_format) for t in modulation)
        modulation = shift, scale
    norm_modulate(
        x,
        None if q is None else (gate, q),
        (weight, bias),
        modulation,
        None if q is None else total,
        h,
        _which(x, repeat, shift, gate),
        norm == "rms",
        eps,
    )
    return total, h


def _which(x: Tensor, repeat: int, *conditions: Tensor | None) -> Rows:
    from uniflow_kernels.triton_kernels.flow_head import Rows

    number = next((len(each) for each in conditions if each is not None), len(x))
    return Rows(len(x), number, repeat)


def _modulated_norm_fake(x: Tensor, gate: Tensor | None, q: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(0) if q is None else x.new_empty(x.shape), x.new_empty(x.shape, dtype=rest[-1])


def _modulated_norm_backward(
    dh: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    gate: Tensor | None,
    q: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    repeat: int,
    norm: str,
    eps: float,
) -> list[Tensor]:
    """Gradients of x, gate, q, shift, scale, weight and bias; empty for what is not there."""
    from uniflow_kernels.triton_kernels.flow_head import norm_modulate_backward

    which = _which(total, repeat, scale, gate)
    per_row, residual = which.per_row, None if gate is None or q is None else (gate, q)
    dshift, dscale, dgate = (
        torch.empty(total.shape, dtype=like.dtype, device=total.device) if per_row and like is not None else None
        for like in (scale, scale, gate)
    )
    dx, dq, sums = norm_modulate_backward(
        flat_rows(dh),
        None if dtotal is None else flat_rows(dtotal),
        total,
        residual,
        (weight, bias),
        scale,
        (dshift, dscale) if dshift is not None and dscale is not None else None,
        dgate,
        which,
        norm == "rms",
        eps,
        dx=torch.empty_like(total, memory_format=torch.contiguous_format),
    )

    def of(condition: Tensor | None, by_row: Tensor | None, part: int) -> Tensor:
        if condition is None:
            return total.new_empty(0)
        return sums[:, part].to(condition.dtype, copy=True) if by_row is None else which.to_conditions(by_row)

    vectors = [
        total.new_empty(0) if vector is None else sums[:, part].sum(0).to(vector.dtype)
        for part, vector in enumerate((weight, bias))
    ]
    nothing = total.new_empty(0)
    return [dx, of(gate, dgate, 4), nothing if dq is None else dq, of(scale, dshift, 2), of(scale, dscale, 3), *vectors]


def _modulated_norm_backward_fake(
    dh: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    gate: Tensor | None,
    q: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *_: Any,
) -> list[Tensor]:
    likes = total, gate, q, scale, scale, weight, bias
    return [total.new_empty(0) if like is None else like.new_empty(like.shape) for like in likes]


_NORM = "SymInt repeat, str norm, float eps"
modulated_norm_op = register(
    "modulated_norm(Tensor x, Tensor? gate, Tensor? q, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, "
    f"{_NORM}, ScalarType dtype) -> (Tensor, Tensor)",
    _modulated_norm,
    _modulated_norm_fake,
)
modulated_norm_backward_op = register(
    "modulated_norm_backward(Tensor dh, Tensor? dtotal, Tensor total, Tensor? gate, Tensor? q, Tensor? scale, "
    f"Tensor? weight, Tensor? bias, {_NORM}) -> Tensor[]",
    _modulated_norm_backward,
    _modulated_norm_backward_fake,
)
