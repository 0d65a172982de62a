"""Row kernels of the flow head: adaptive norm with the gated residual before it, and its backward pass.

A row of x is held whole by one program. Row r takes its modulations from row (r // repeat) % conditions, so that one
condition may serve rows that follow each other (repeat > 1), every so many rows (conditions < rows) or all of them.
Names end in _p for a pointer and in _s for the number of elements from one row to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniflow_kernels.triton_kernels.launch import Launch, cdiv
from uniflow_kernels.triton_kernels.sums import ProgramSums, of_launch

# tiles of so many elements keep a row kernel's values in registers at four warps; a wider row gets more
FORWARD_TILE = 2048
BACKWARD_TILE = 1024
# programs of a backward kernel: some for every processor of any GPU, and few enough that their partial sums are small
_BACKWARD_PROGRAMS = 1024
# from so many rows on that share a condition, its gradient is summed in the kernel instead of written row by row
SHARED_FROM = 16

_SIZES = ["rows", "conditions", "repeat", "segment", "per_program"]


@triton.jit
def statistics(x, inside, W: tl.constexpr, eps, RMS: tl.constexpr):
    """x [BM, BW] -> what is normalised (zero outside) and its 1/std [BM, 1]."""
    if RMS:
        centred = x
    else:
        centred = tl.where(inside, x - (tl.sum(x, 1) / W)[:, None], 0.0)
    return centred, tl.rsqrt(tl.sum(centred * centred, 1) / W + eps)[:, None]


@triton.jit
def _condition(index, conditions, repeat, SHARED: tl.constexpr):
    """The condition of each row. A division of 64 bits is a subroutine, so indices have as many as `rows` needs."""
    if SHARED:
        return ((index // repeat) % conditions).to(tl.int64)
    else:
        return index.to(tl.int64)


@triton.jit(do_not_specialize=_SIZES)
def norm_modulate_kernel(
    x_p,
    gate_p,
    q_p,
    weight_p,
    bias_p,
    shift_p,
    scale_p,
    sum_p,
    h_p,
    x_s,
    gate_s,
    q_s,
    modulation_s,
    sum_s,
    h_s,
    rows,
    conditions,
    repeat,
    eps,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    MODULATED: tl.constexpr,
    RMS: tl.constexpr,
    SHARED: tl.constexpr,
    BM: tl.constexpr,
    BW: tl.constexpr,
):
    """sum = x + gate * q, then h = norm(sum) * (1 + scale) + shift. Shift and h may be the same memory.

    Without a gate it is x + q.
    """
    index = tl.program_id(0).to(rows.dtype) * BM + tl.arange(0, BM)[:, None]  # [BM, 1]
    row, condition = index.to(tl.int64), _condition(index, conditions, repeat, SHARED)
    col = tl.arange(0, BW)[None, :]  # [1, BW]
    inside = (index < rows) & (col < W)
    # all loads before the first reduction, whose barriers none of them could pass
    x = tl.load(x_p + row * x_s + col, inside, 0.0)
    if RESIDUAL:
        if gate_p is not None:
            gate = tl.load(gate_p + condition * gate_s + col, inside, 0.0)
        q = tl.load(q_p + row * q_s + col, inside, 0.0)
    if MODULATED:
        scale = tl.load(scale_p + condition * modulation_s + col, inside, 0.0)
        shift = tl.load(shift_p + condition * modulation_s + col, inside, 0.0)
    if WEIGHT:
        weight = tl.load(weight_p + col, col < W, 0.0)
    if BIAS:
        bias = tl.load(bias_p + col, col < W, 0.0)
    x = x.to(tl.float32)
    if RESIDUAL:
        q = q.to(tl.float32)
        if gate_p is not None:
            q *= gate.to(tl.float32)
        rounded = (x + q).to(sum_p.dtype.element_ty)
        tl.store(sum_p + row * sum_s + col, rounded, inside)
        x = rounded.to(tl.float32)  # the backward pass and the next block see the rounded sum: so does the norm
    centred, rstd = statistics(x, inside, W, eps, RMS)
    h = centred * rstd
    if WEIGHT:
        h *= weight.to(tl.float32)
    if BIAS:
        h += bias.to(tl.float32)
    if MODULATED:
        h = h * (1 + scale.to(tl.float32)) + shift.to(tl.float32)
    tl.store(h_p + row * h_s + col, h.to(h_p.dtype.element_ty), inside)


@triton.jit(do_not_specialize=_SIZES)
def norm_modulate_backward_kernel(
    dh_p,
    dsum_p,
    x_p,
    gate_p,
    q_p,
    weight_p,
    bias_p,
    scale_p,
    dx_p,
    dq_p,
    dgate_p,
    dshift_p,
    dscale_p,
    partial_p,
    dh_s,
    dsum_s,
    x_s,
    gate_s,
    q_s,
    modulation_s,
    dx_s,
    dq_s,
    dgate_s,
    dmodulation_s,
    rows,
    conditions,
    repeat,
    segment,
    per_program,
    eps,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    MODULATED: tl.constexpr,
    DSUM: tl.constexpr,
    PER_ROW: tl.constexpr,
    WRITE_SHIFT: tl.constexpr,
    RMS: tl.constexpr,
    SHARED: tl.constexpr,
    BM: tl.constexpr,
    BW: tl.constexpr,
):
    """Backward of `norm_modulate_kernel`; x is the sum that it wrote, dsum what reaches the sum from elsewhere.

    A program takes `per_program` rows of a segment; where a condition is shared, a segment is the rows that share it.
    partial [programs, 6, W] gets the program's sums over its rows of what belongs to the norm's weight and bias, to
    shift, scale and gate, and of dq. PER_ROW writes dgate, dscale (and dshift, if it is not where dh lies) row by row.
    """
    WIDE: tl.constexpr = BW > 2048  # sixteen warps, whose 128 registers a thread have no room for so many loads
    program = tl.program_id(0).to(rows.dtype)
    per_segment = tl.cdiv(segment, per_program)
    within = (program % per_segment) * per_program  # the segment, a whole number of which are all rows
    first = (program // per_segment) * segment + within
    count = tl.minimum(per_program, segment - within)
    col = tl.arange(0, BW)[None, :]  # [1, BW]
    dweight_sum = tl.zeros((BW,), tl.float32)
    dbias_sum = tl.zeros((BW,), tl.float32)
    dshift_sum = tl.zeros((BW,), tl.float32)
    dscale_sum = tl.zeros((BW,), tl.float32)
    dgate_sum = tl.zeros((BW,), tl.float32)
    dq_sum = tl.zeros((BW,), tl.float32)
    if WEIGHT:
        weight = tl.load(weight_p + col, col < W, 0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_p + col, col < W, 0.0).to(tl.float32)
    for start in range(0, count, BM):
        index = start + tl.arange(0, BM)[:, None]  # [BM, 1]
        inside = (index < count) & (col < W)  # [BM, BW]
        row, condition = (first + index).to(tl.int64), _condition(first + index, conditions, repeat, SHARED)
        # all loads before the first reduction, whose barriers none of them could pass
        dh = tl.load(dh_p + row * dh_s + col, inside, 0.0)
        if MODULATED:
            scale = tl.load(scale_p + condition * modulation_s + col, inside, 0.0)
        if DSUM and not WIDE:
            dsum = tl.load(dsum_p + row * dsum_s + col, inside, 0.0)
        if RESIDUAL and not WIDE:
            gate = tl.load(gate_p + condition * gate_s + col, inside, 0.0)
            q = tl.load(q_p + row * q_s + col, inside, 0.0)
        x = tl.load(x_p + row * x_s + col, inside, 0.0)
        x, dh = x.to(tl.float32), dh.to(tl.float32)
        centred, rstd = statistics(x, inside, W, eps, RMS)
        xhat = centred * rstd
        dn = dh  # of the norm's output
        if MODULATED:
            normed = xhat
            if WEIGHT:
                normed = normed * weight
            if BIAS:
                normed = normed + bias
            dscale = dh * normed
            dn = dh * (1 + scale.to(tl.float32))
            dshift_sum += tl.sum(dh, 0)
            dscale_sum += tl.sum(dscale, 0)
            if PER_ROW:
                tl.store(dscale_p + row * dmodulation_s + col, dscale.to(dscale_p.dtype.element_ty), inside)
                if WRITE_SHIFT:
                    tl.store(dshift_p + row * dmodulation_s + col, dh.to(dshift_p.dtype.element_ty), inside)
        dxhat = dn
        if WEIGHT:
            dweight_sum += tl.sum(dn * xhat, 0)
            dxhat = dn * weight
        if BIAS:
            dbias_sum += tl.sum(dn, 0)
        dx = dxhat - xhat * (tl.sum(dxhat * xhat, 1) / W)[:, None]
        if not RMS:
            dx -= (tl.sum(dxhat, 1) / W)[:, None]
        dx *= rstd
        if DSUM:
            if WIDE:
                dsum = tl.load(dsum_p + row * dsum_s + col, inside, 0.0)
            dx += dsum.to(tl.float32)
        tl.store(dx_p + row * dx_s + col, dx.to(dx_p.dtype.element_ty), inside)
        if RESIDUAL:
            if WIDE:
                gate = tl.load(gate_p + condition * gate_s + col, inside, 0.0)
                q = tl.load(q_p + row * q_s + col, inside, 0.0)
            dx = tl.where(inside, dx, 0.0)
            dq = dx * gate.to(tl.float32)
            dgate = dx * q.to(tl.float32)
            tl.store(dq_p + row * dq_s + col, dq.to(dq_p.dtype.element_ty), inside)
            dq_sum += tl.sum(dq, 0)
            dgate_sum += tl.sum(dgate, 0)
            if PER_ROW:
                tl.store(dgate_p + row * dgate_s + col, dgate.to(dgate_p.dtype.element_ty), inside)
    out = partial_p + program.to(tl.int64) * (6 * W) + tl.arange(0, BW)
    within = tl.arange(0, BW) < W
    if WEIGHT:
        tl.store(out, dweight_sum, within)
    if BIAS:
        tl.store(out + W, dbias_sum, within)
    if MODULATED:
        tl.store(out + 2 * W, dshift_sum, within)
        tl.store(out + 3 * W, dscale_sum, within)
    if RESIDUAL:
        tl.store(out + 4 * W, dgate_sum, within)
        tl.store(out + 5 * W, dq_sum, within)


_launch = Launch(norm_modulate_kernel)
_launch_backward = Launch(norm_modulate_backward_kernel)


@dataclass(frozen=True)
class Rows:
    """Which row of the conditions each row of x takes: (row // repeat) % conditions."""

    rows: int
    conditions: int
    repeat: int

    @property
    def per_row(self) -> bool:
        """Whether gradients of the modulations are written row by row, and summed afterwards where rows share them."""
        return self.repeat < SHARED_FROM

    def to_conditions(self, gradient: Tensor) -> Tensor:
        """Sum a gradient of every row [rows, ...] over the rows that share a condition -> [conditions, ...]."""
        if self.conditions == self.rows:
            return gradient
        each = gradient.unflatten(0, (-1, self.conditions, self.repeat))
        return each.sum((0, 2), dtype=torch.float32).to(gradient.dtype)


@lru_cache
def tile(width: int, elements: int) -> tuple[int, int, int]:
    """Rows and columns of a tile that holds whole rows, at least `elements` in all, and its warps."""
    columns = triton.next_power_of_2(width)
    return max(1, elements // columns), columns, max(4, 4 * columns // elements)


def norm_modulate(
    x: Tensor,
    residual: tuple[Tensor | None, Tensor] | None,
    norm: tuple[Tensor | None, Tensor | None],
    modulation: tuple[Tensor, Tensor] | None,
    total: Tensor | None,
    h: Tensor,
    which: Rows,
    rms: bool,
    eps: float,
) -> None:
    """Launch `norm_modulate_kernel`.

    Args:
        x: [R, W].
        residual: gate [C, W] and q [R, W], whose product is added to x first; q alone if the gate is None.
        norm: weight [W] and bias [W].
        modulation: shift and scale [C, W], of one stride.
        total: where x + gate * q goes, [R, W]; may be x.
        h: where the result goes, [R, W]; may be shift, where every row has its own.
        which: which condition is each row's.
        rms: RMS norm instead of LayerNorm.
        eps: of the norm.
    """
    width = x.shape[1]
    block_rows, columns, warps = tile(width, FORWARD_TILE)
    gate, q = residual or (x, x)
    shift, scale = modulation or (x, x)
    total = x if total is None else total
    weight, bias = norm
    _launch(
        (cdiv(which.rows, block_rows),),
        x_p=x,
        gate_p=gate,
        q_p=q,
        weight_p=weight,
        bias_p=bias,
        shift_p=shift,
        scale_p=scale,
        sum_p=total,
        h_p=h,
        x_s=x.stride()[0],
        gate_s=0 if gate is None else gate.stride()[0],
        q_s=q.stride()[0],
        modulation_s=shift.stride()[0],
        sum_s=total.stride()[0],
        h_s=h.stride()[0],
        rows=which.rows,
        conditions=which.conditions,
        repeat=which.repeat,
        eps=float(eps),
        W=width,
        RESIDUAL=residual is not None,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        MODULATED=modulation is not None,
        RMS=rms,
        SHARED=which.conditions != which.rows,
        BM=block_rows,
        BW=columns,
        num_warps=warps,
    )


def norm_modulate_backward(
    dh: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    residual: tuple[Tensor, Tensor] | None,
    norm: tuple[Tensor | None, Tensor | None],
    scale: Tensor | None,
    dmodulation: tuple[Tensor, Tensor] | None,
    dgate: Tensor | None,
    which: Rows,
    rms: bool,
    eps: float,
    sums: ProgramSums | None = None,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launch `norm_modulate_backward_kernel`.

    Args:
        dh: gradient of the result, [R, W].
        dsum: gradient that reaches the sum from elsewhere, [R, W]; overwritten if `dx` is not given.
        x: the sum, [R, W].
        residual: gate [C, W] and q [R, W], as in the forward pass.
        norm: weight [W] and bias [W].
        scale: [C, W].
        dmodulation: where the gradients of shift and scale go row by row, [R, W] of one stride; shift's may be dh.
            None where `which` says they are summed, or without a modulation.
        dgate: where the gate's goes, [R, W]; None as above.
        which: which condition is each row's.
        rms: RMS norm instead of LayerNorm.
        eps: of the norm.
        sums: where those of gradients that go row by row are added up together with those of other launches.
        dx: where the gradient of the sum goes, [R, W].

    Returns:
        Gradient of the sum [R, W], of q [R, W], and the sums over rows [C, 6, W] in float32, of what belongs to the
        norm's weight and bias, shift, scale, gate and q; where gradients go row by row [1, 6, W], over all rows, which
        are there when `sums` are added up.
    """
    width = x.shape[1]
    block_rows, columns, warps = tile(width, BACKWARD_TILE)
    segment = which.rows if which.per_row else which.repeat
    segments = which.rows // segment
    per_program = max(block_rows, cdiv(segment, max(1, _BACKWARD_PROGRAMS // segments)))
    per_segment = cdiv(segment, per_program)
    partial, total = of_launch(sums, segments * per_segment, (6, width), x.device)
    if dx is None:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dsum is None else dsum
    gate, q = residual or (x, x)
    dq = None if residual is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dshift, dscale = dmodulation or (dh, dh)
    weight, bias = norm
    _launch_backward(
        (segments * per_segment,),
        dh_p=dh,
        dsum_p=dx if dsum is None else dsum,
        x_p=x,
        gate_p=gate,
        q_p=q,
        weight_p=weight,
        bias_p=bias,
        scale_p=x if scale is None else scale,
        dx_p=dx,
        dq_p=dx if dq is None else dq,
        dgate_p=dx if dgate is None else dgate,
        dshift_p=dshift,
        dscale_p=dscale,
        partial_p=partial,
        dh_s=dh.stride()[0],
        dsum_s=0 if dsum is None else dsum.stride()[0],
        x_s=x.stride()[0],
        gate_s=gate.stride()[0],
        q_s=q.stride()[0],
        modulation_s=width if scale is None else scale.stride()[0],
        dx_s=dx.stride()[0],
        dq_s=width,
        dgate_s=width if dgate is None else dgate.stride()[0],
        dmodulation_s=dscale.stride()[0],
        rows=which.rows,
        conditions=which.conditions,
        repeat=which.repeat,
        segment=segment,
        per_program=per_program,
        eps=float(eps),
        W=width,
        RESIDUAL=residual is not None,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        MODULATED=scale is not None,
        DSUM=dsum is not None,
        PER_ROW=which.per_row,
        WRITE_SHIFT=dmodulation is not None and dshift.data_ptr() != dh.data_ptr(),
        RMS=rms,
        SHARED=which.conditions != which.rows,
        BM=block_rows,
        BW=columns,
        num_warps=warps,
    )
    if not which.per_row:
        return dx, dq, partial.unflatten(0, (-1, which.conditions, per_segment)).sum((0, 2))
    return dx, dq, partial.sum(0, keepdim=True) if total is None else total.unsqueeze(0)
