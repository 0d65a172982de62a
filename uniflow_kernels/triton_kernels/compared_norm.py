"""Row kernels of a layer's last residual and the next one's norm, beside the distance of the sum to a teacher's row.

A row is held whole by one program. Names end in _p for a pointer and in _s for the number of elements from one row to
the next; what has no stride lies without gaps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniflow_kernels.triton_kernels.flow_head import statistics, tile
from uniflow_kernels.triton_kernels.launch import Launch, cdiv

# tiles of so many elements keep a row kernel's values in registers at four warps; a wider row gets more
_TILE = 1024
_PROGRAMS = 1024  # of the backward kernel, see the flow head's
SUMS = ("weight", "bias", "gate")  # what a program sums over its rows


@triton.jit(do_not_specialize=["rows", "length", "skip"])
def compared_norm_kernel(
    x_p,
    gate_p,
    q_p,
    weight_p,
    bias_p,
    teacher_p,
    sum_p,
    h_p,
    distance_p,
    coefficients_p,
    x_s,
    q_s,
    teacher_s,
    rows,
    length,
    skip,
    eps,
    W: tl.constexpr,
    RMS: tl.constexpr,
    BM: tl.constexpr,
    BW: tl.constexpr,
):
    """sum = x + gate * q, h = norm(sum), and distance = 1 - cosine(sum, teacher), 0 for the first `skip` of `length`.

    Coefficients [rows, 2] are those of the distance's gradient, which is the first times sum and the second times
    teacher.
    """
    index = tl.program_id(0).to(rows.dtype) * BM + tl.arange(0, BM)  # [BM]
    exists = index < rows
    row = index.to(tl.int64)[:, None]  # [BM, 1]
    col = tl.arange(0, BW)[None, :]  # [1, BW]
    inside = exists[:, None] & (col < W)
    # all loads before the first reduction, whose barriers none of them could pass
    x = tl.load(x_p + row * x_s + col, inside, 0.0)
    q = tl.load(q_p + row * q_s + col, inside, 0.0)
    t = tl.load(teacher_p + row * teacher_s + col, inside, 0.0)
    if gate_p is not None:
        gate = tl.load(gate_p + col, col < W, 0.0)
    if weight_p is not None:
        weight = tl.load(weight_p + col, col < W, 0.0)
    if bias_p is not None:
        bias = tl.load(bias_p + col, col < W, 0.0)
    x, q, t = x.to(tl.float32), q.to(tl.float32), t.to(tl.float32)
    if gate_p is not None:
        q *= gate.to(tl.float32)
    rounded = (x + q).to(sum_p.dtype.element_ty)
    tl.store(sum_p + row * W + col, rounded, inside)
    x = rounded.to(tl.float32)  # the backward pass and the next layer see the rounded sum: so do norm and distance
    centred, rstd = statistics(x, inside, W, eps, RMS)
    h = centred * rstd
    if weight_p is not None:
        h *= weight.to(tl.float32)
    if bias_p is not None:
        h += bias.to(tl.float32)
    tl.store(h_p + row * W + col, h.to(h_p.dtype.element_ty), inside)

    counts = exists & (index % length >= skip)
    length_of_x = tl.sqrt(tl.sum(x * x, 1))  # [BM]
    least = tl.maximum(length_of_x, 1e-8)
    least_of_t = tl.maximum(tl.sqrt(tl.sum(t * t, 1)), 1e-8)
    # two divisions: the product of two least norms is not far from the smallest float
    cosine = tl.sum(x * t, 1) / least / least_of_t
    tl.store(distance_p + index, tl.where(counts, 1.0 - cosine, 0.0), exists)
    # below the least norm the denominator is a constant
    along = tl.where(counts & (length_of_x > 1e-8), cosine / least / least, 0.0)
    across = tl.where(counts, -1.0 / least / least_of_t, 0.0)
    place = coefficients_p + 2 * index.to(tl.int64)
    tl.store(place, along, exists)
    tl.store(place + 1, across, exists)


@triton.jit(do_not_specialize=["rows", "per_program"])
def compared_norm_backward_kernel(
    dh_p,
    dsum_p,
    ddistance_p,
    x_p,
    gate_p,
    q_p,
    weight_p,
    teacher_p,
    coefficients_p,
    dx_p,
    dq_p,
    partial_p,
    dh_s,
    dsum_s,
    q_s,
    teacher_s,
    rows,
    per_program,
    share,
    eps,
    W: tl.constexpr,
    BIAS: tl.constexpr,
    RMS: tl.constexpr,
    LARGEST: tl.constexpr,
    BM: tl.constexpr,
    BW: tl.constexpr,
):
    """Backward of `compared_norm_kernel`; x is the sum that it wrote, dsum what reaches the sum from elsewhere.

    A token's distance has the gradient `share` times the one at ddistance. A program takes `per_program` rows; partial
    [programs, 3, W] gets its sums over them of what belongs to the norm's weight and bias and to gate.
    """
    first = tl.program_id(0).to(rows.dtype) * per_program
    count = tl.minimum(per_program, rows - first)
    col = tl.arange(0, BW)[None, :]  # [1, BW]
    dweight_sum = tl.zeros((BW,), tl.float32)
    dbias_sum = tl.zeros((BW,), tl.float32)
    dgate_sum = tl.zeros((BW,), tl.float32)
    factor = tl.load(ddistance_p).to(tl.float32) * share
    if weight_p is not None:
        weight = tl.load(weight_p + col, col < W, 0.0).to(tl.float32)
    if gate_p is not None:
        gate = tl.load(gate_p + col, col < W, 0.0).to(tl.float32)
    for start in range(0, count, BM):
        index = start + tl.arange(0, BM)  # [BM]
        exists = index < count
        inside = exists[:, None] & (col < W)  # [BM, BW]
        row = (first + index).to(tl.int64)[:, None]
        # all loads before the first reduction, whose barriers none of them could pass
        dh = tl.load(dh_p + row * dh_s + col, inside, 0.0).to(tl.float32)
        if dsum_p is not None:
            dsum = tl.load(dsum_p + row * dsum_s + col, inside, 0.0)
        if gate_p is not None:
            q = tl.load(q_p + row * q_s + col, inside, 0.0)
        along = tl.load(coefficients_p + 2 * row, exists[:, None], 0.0)  # [BM, 1]
        across = tl.load(coefficients_p + 2 * row + 1, exists[:, None], 0.0)
        t = tl.load(teacher_p + row * teacher_s + col, inside, 0.0)
        x = tl.load(x_p + row * W + col, inside, 0.0).to(tl.float32)
        centred, rstd = statistics(x, inside, W, eps, RMS)
        xhat = centred * rstd
        dxhat = dh
        if weight_p is not None:
            dweight_sum += tl.sum(dh * xhat, 0)
            dxhat = dh * weight
        if BIAS:
            dbias_sum += tl.sum(dh, 0)
        dx = dxhat - xhat * (tl.sum(dxhat * xhat, 1) / W)[:, None]
        if not RMS:
            dx -= (tl.sum(dxhat, 1) / W)[:, None]
        # what does not count was not compared, whatever it holds
        of_distance = factor * tl.where(across != 0, along * x + across * t.to(tl.float32), 0.0)
        # NaN stays NaN
        of_distance = tl.where(of_distance > LARGEST, LARGEST, tl.where(of_distance < -LARGEST, -LARGEST, of_distance))
        dx = dx * rstd + of_distance
        if dsum_p is not None:
            dx += dsum.to(tl.float32)
        tl.store(dx_p + row * W + col, dx.to(dx_p.dtype.element_ty), inside)
        if gate_p is not None:
            dx = tl.where(inside, dx, 0.0)
            tl.store(dq_p + row * W + col, (dx * gate).to(dq_p.dtype.element_ty), inside)
            dgate_sum += tl.sum(dx * q.to(tl.float32), 0)
    out = partial_p + tl.program_id(0).to(tl.int64) * (3 * W) + tl.arange(0, BW)
    within = tl.arange(0, BW) < W
    tl.store(out, dweight_sum, within)
    tl.store(out + W, dbias_sum, within)
    tl.store(out + 2 * W, dgate_sum, within)


_launch = Launch(compared_norm_kernel)
_launch_backward = Launch(compared_norm_backward_kernel)


def compared_norm(
    x: Tensor,
    gate: Tensor | None,
    q: Tensor,
    norm: tuple[Tensor | None, Tensor | None],
    teacher: Tensor,
    length: int,
    skip: int,
    total: Tensor,
    h: Tensor,
    distances: Tensor,
    coefficients: Tensor,
    rms: bool,
    eps: float,
) -> None:
    """Launch `compared_norm_kernel`.

    Args:
        x: [R, W].
        gate: LayerScale [W]; None for x + q.
        q: [R, W].
        norm: weight [W] and bias [W].
        teacher: [R, W].
        length, skip: of every so many rows the first do not count.
        total: where x + gate * q goes, [R, W], without gaps.
        h: where the norm goes, [R, W], without gaps.
        distances: where they go, [R] in float32; 0 of what does not count.
        coefficients: where those of their gradients go, [R, 2] in float32.
        rms: RMS norm instead of LayerNorm.
        eps: of the norm.
    """
    rows, width = x.shape
    block_rows, columns, warps = tile(width, _TILE)
    weight, bias = norm
    _launch(
        (cdiv(rows, block_rows),),
        x_p=x,
        gate_p=gate,
        q_p=q,
        weight_p=weight,
        bias_p=bias,
        teacher_p=teacher,
        sum_p=total,
        h_p=h,
        distance_p=distances,
        coefficients_p=coefficients,
        x_s=x.stride()[0],
        q_s=q.stride()[0],
        teacher_s=teacher.stride()[0],
        rows=rows,
        length=length,
        skip=skip,
        eps=float(eps),
        W=width,
        RMS=rms,
        BM=block_rows,
        BW=columns,
        num_warps=warps,
    )


def compared_norm_backward(
    dh: Tensor,
    dtotal: Tensor | None,
    ddistance: Tensor,
    share: float,
    total: Tensor,
    gate: Tensor | None,
    q: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None],
    teacher: Tensor,
    coefficients: Tensor,
    dx: Tensor,
    dq: Tensor | None,
    rms: bool,
    eps: float,
) -> Tensor:
    """Launch `compared_norm_backward_kernel`.

    Args:
        dh: gradient of the norm, [R, W].
        dtotal: gradient that reaches the sum from elsewhere, [R, W].
        ddistance: gradient of the mean distance, one number on the device.
        share: what a token's distance is multiplied by in the mean.
        total, gate, q, norm, teacher, coefficients, rms, eps: as in the forward pass; no q without a gate.
        dx, dq: where the gradients of the sum and of q go, [R, W], without gaps.

    Returns:
        The gradients of `SUMS`, [3, W] in float32; zeros for what is not there.
    """
    rows, width = total.shape
    block_rows, columns, warps = tile(width, _TILE)
    per_program = max(block_rows, cdiv(rows, _PROGRAMS))
    programs = cdiv(rows, per_program)
    partial = torch.empty(programs, len(SUMS), width, dtype=torch.float32, device=total.device)
    weight, bias = norm
    _launch_backward(
        (programs,),
        dh_p=dh,
        dsum_p=dtotal,
        ddistance_p=ddistance,
        x_p=total,
        gate_p=gate,
        q_p=q,
        weight_p=weight,
        teacher_p=teacher,
        coefficients_p=coefficients,
        dx_p=dx,
        dq_p=dq,
        partial_p=partial,
        dh_s=dh.stride()[0],
        dsum_s=0 if dtotal is None else dtotal.stride()[0],
        q_s=0 if q is None else q.stride()[0],
        teacher_s=teacher.stride()[0],
        rows=rows,
        per_program=per_program,
        share=float(share),
        eps=float(eps),
        W=width,
        BIAS=bias is not None,
        RMS=rms,
        LARGEST=torch.finfo(total.dtype).max,
        BM=block_rows,
        BW=columns,
        num_warps=warps,
    )
    return partial.sum(0)
