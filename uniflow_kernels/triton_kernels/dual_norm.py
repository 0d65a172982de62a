"""Row kernels of a value and its tangent: gated residual and adaptive norm in one pass, and its backward pass.

A row of value and tangent is held whole by one program. Names end in _p for a pointer, in _s for the number of elements
from one row to the next (0 where all rows share one), and in t_p for a tangent's pointer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniflow_kernels.triton_kernels.flow_head import statistics, tile
from uniflow_kernels.triton_kernels.launch import Launch, cdiv

# tiles of so many elements keep values and tangents in registers at four warps; a wider row gets more
FORWARD_TILE = 1024
BACKWARD_TILE = 512
# programs of the backward kernel, see the flow head's
_PROGRAMS = 1024
SUMS = ("weight", "bias", "gate", "q", "shift", "scale")  # what a program sums over its rows


@triton.jit
def _added(x, bias_p, col, W: tl.constexpr):
    """x [BM, BW] in float32, and to it the bias [W], if there is one."""
    x = x.to(tl.float32)
    if bias_p is not None:
        x += tl.load(bias_p + col, col < W, 0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["rows"])
def dual_norm_kernel(
    x_p,
    xt_p,
    gate_p,
    gatet_p,
    q_p,
    qt_p,
    shift_p,
    shiftt_p,
    scale_p,
    scalet_p,
    weight_p,
    bias_p,
    gate_bias_p,
    q_bias_p,
    shift_bias_p,
    scale_bias_p,
    sum_p,
    sumt_p,
    h_p,
    ht_p,
    x_s,
    gate_s,
    q_s,
    modulation_s,
    rows,
    eps,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MODULATED: tl.constexpr,
    RMS: tl.constexpr,
    BM: tl.constexpr,
    BW: tl.constexpr,
):
    """sum = x + gate * q, then h = norm(sum) * (1 + scale) + shift, and the tangents of both."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]  # [BM, 1]
    col = tl.arange(0, BW)[None, :]  # [1, BW]
    inside = (row < rows) & (col < W)
    # all loads before the first reduction, whose barriers none of them could pass
    x = tl.load(x_p + row * x_s + col, inside, 0.0)
    xt = tl.load(xt_p + row * x_s + col, inside, 0.0)
    if RESIDUAL:
        gate = tl.load(gate_p + row * gate_s + col, inside, 0.0)
        gatet = tl.load(gatet_p + row * gate_s + col, inside, 0.0)
        q = tl.load(q_p + row * q_s + col, inside, 0.0)
        qt = tl.load(qt_p + row * q_s + col, inside, 0.0)
    if MODULATED:
        scale = tl.load(scale_p + row * modulation_s + col, inside, 0.0)
        scalet = tl.load(scalet_p + row * modulation_s + col, inside, 0.0)
        shift = tl.load(shift_p + row * modulation_s + col, inside, 0.0)
        shiftt = tl.load(shiftt_p + row * modulation_s + col, inside, 0.0)
    x, xt = x.to(tl.float32), xt.to(tl.float32)
    if RESIDUAL:
        gate, gatet = _added(gate, gate_bias_p, col, W), gatet.to(tl.float32)
        q, qt = _added(q, q_bias_p, col, W), qt.to(tl.float32)
        rounded = (x + gate * q).to(sum_p.dtype.element_ty)
        roundedt = (xt + gatet * q + gate * qt).to(sum_p.dtype.element_ty)
        tl.store(sum_p + row * W + col, rounded, inside)
        tl.store(sumt_p + row * W + col, roundedt, inside)
        x, xt = tl.where(inside, rounded.to(tl.float32), 0.0), tl.where(inside, roundedt.to(tl.float32), 0.0)
    centred, rstd = statistics(x, inside, W, eps, RMS)
    if not RMS:
        xt = tl.where(inside, xt - (tl.sum(xt, 1) / W)[:, None], 0.0)
    h = centred * rstd
    ht = (xt - h * (tl.sum(h * xt, 1) / W)[:, None]) * rstd
    if weight_p is not None:
        weight = tl.load(weight_p + col, col < W, 0.0).to(tl.float32)
        h, ht = h * weight, ht * weight
    h = _added(h, bias_p, col, W)
    if MODULATED:
        scale, scalet = 1 + _added(scale, scale_bias_p, col, W), scalet.to(tl.float32)
        ht = ht * scale + h * scalet + shiftt.to(tl.float32)
        h = h * scale + _added(shift, shift_bias_p, col, W)
    tl.store(h_p + row * W + col, h.to(h_p.dtype.element_ty), inside)
    tl.store(ht_p + row * W + col, ht.to(h_p.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "per_program"])
def dual_norm_backward_kernel(
    dh_p,
    dht_p,
    dsum_p,
    dsumt_p,
    x_p,
    xt_p,
    gate_p,
    gatet_p,
    q_p,
    qt_p,
    scale_p,
    scalet_p,
    weight_p,
    bias_p,
    gate_bias_p,
    q_bias_p,
    scale_bias_p,
    dx_p,
    dxt_p,
    dgate_p,
    dgatet_p,
    dq_p,
    dqt_p,
    dscale_p,
    dscalet_p,
    partial_p,
    x_s,
    gate_s,
    q_s,
    modulation_s,
    rows,
    per_program,
    eps,
    W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    MODULATED: tl.constexpr,
    DSUM: tl.constexpr,
    BIASES: tl.constexpr,
    RMS: tl.constexpr,
    BM: tl.constexpr,
    BW: tl.constexpr,
):
    """Backward of `dual_norm_kernel`; x is the sum that it wrote, dsum what reaches the sum from elsewhere.

    The gradient of shift is dh. A program takes `per_program` rows; partial [programs, 6, W] gets its sums over them of
    what belongs to the norm's weight and bias, and with BIASES to those of gate, q, shift and scale.

    With n = centred / std and its tangent nt = (xt - n * mean(n * xt)) / std, both before the weight, and their
    gradients a and e: xt has the gradient (e - n * mean(e * n)) / std, and x the one of a norm, of
    a - (e * mean(n * xt) + xt * mean(e * n)) / std, but for n * mean(e * nt) / std, through 1 / std in nt.
    """
    first = tl.program_id(0).to(tl.int64) * per_program
    count = tl.minimum(per_program, rows - first)
    col = tl.arange(0, BW)[None, :]  # [1, BW]
    dweight_sum = tl.zeros((BW,), tl.float32)
    dbias_sum = tl.zeros((BW,), tl.float32)
    dgate_sum = tl.zeros((BW,), tl.float32)
    dq_sum = tl.zeros((BW,), tl.float32)
    dshift_sum = tl.zeros((BW,), tl.float32)
    dscale_sum = tl.zeros((BW,), tl.float32)
    for start in range(0, count, BM):
        index = start + tl.arange(0, BM)[:, None]  # [BM, 1]
        inside, row = (index < count) & (col < W), first + index
        # all loads before the first reduction, whose barriers none of them could pass
        e = tl.load(dht_p + row * W + col, inside, 0.0)
        dh = tl.load(dh_p + row * W + col, inside, 0.0)
        if MODULATED:
            scale = tl.load(scale_p + row * modulation_s + col, inside, 0.0)
            scalet = tl.load(scalet_p + row * modulation_s + col, inside, 0.0)
        x = tl.load(x_p + row * x_s + col, inside, 0.0).to(tl.float32)
        xt = tl.load(xt_p + row * x_s + col, inside, 0.0).to(tl.float32)
        if DSUM:
            dsum = tl.load(dsum_p + row * W + col, inside, 0.0)
            dsumt = tl.load(dsumt_p + row * W + col, inside, 0.0)
        if RESIDUAL:
            q = tl.load(q_p + row * q_s + col, inside, 0.0)
            qt = tl.load(qt_p + row * q_s + col, inside, 0.0)
            gate = tl.load(gate_p + row * gate_s + col, inside, 0.0)
            gatet = tl.load(gatet_p + row * gate_s + col, inside, 0.0)
        a, e = dh.to(tl.float32), e.to(tl.float32)
        n, rstd = statistics(x, inside, W, eps, RMS)
        if not RMS:
            xt = tl.where(inside, xt - (tl.sum(xt, 1) / W)[:, None], 0.0)
        n *= rstd
        along = (tl.sum(n * xt, 1) / W)[:, None]
        nt = (xt - n * along) * rstd
        if MODULATED:
            normed, normedt = n, nt
            if weight_p is not None:
                weight = tl.load(weight_p + col, col < W, 0.0).to(tl.float32)
                normed, normedt = normed * weight, normedt * weight
            normed = _added(normed, bias_p, col, W)
            dscale = a * normed + e * normedt
            tl.store(dscale_p + row * W + col, dscale.to(dscale_p.dtype.element_ty), inside)
            tl.store(dscalet_p + row * W + col, (e * normed).to(dscale_p.dtype.element_ty), inside)
            if BIASES:
                dshift_sum += tl.sum(a, 0)
                dscale_sum += tl.sum(dscale, 0)
            scale = 1 + _added(scale, scale_bias_p, col, W)
            a = a * scale + e * scalet.to(tl.float32)
            e = e * scale
        if bias_p is not None:
            dbias_sum += tl.sum(a, 0)
        if weight_p is not None:
            dweight_sum += tl.sum(a * n + e * nt, 0)
            weight = tl.load(weight_p + col, col < W, 0.0).to(tl.float32)
            a, e = a * weight, e * weight
        across = (tl.sum(e * n, 1) / W)[:, None]
        a -= (e * along + xt * across) * rstd
        a -= n * ((tl.sum(a * n, 1) + tl.sum(e * nt, 1)) / W)[:, None]
        e -= n * across
        if not RMS:
            a -= (tl.sum(a, 1) / W)[:, None]
            e -= (tl.sum(e, 1) / W)[:, None]
        a, e = a * rstd, e * rstd
        if DSUM:
            a, e = a + dsum.to(tl.float32), e + dsumt.to(tl.float32)
        tl.store(dx_p + row * W + col, a.to(dx_p.dtype.element_ty), inside)
        tl.store(dxt_p + row * W + col, e.to(dx_p.dtype.element_ty), inside)
        if RESIDUAL:
            a, e = tl.where(inside, a, 0.0), tl.where(inside, e, 0.0)
            q, qt = _added(q, q_bias_p, col, W), qt.to(tl.float32)
            dgate = a * q + e * qt
            tl.store(dgate_p + row * W + col, dgate.to(dgate_p.dtype.element_ty), inside)
            tl.store(dgatet_p + row * W + col, (e * q).to(dgate_p.dtype.element_ty), inside)
            gate, gatet = _added(gate, gate_bias_p, col, W), gatet.to(tl.float32)
            dq = a * gate + e * gatet
            tl.store(dq_p + row * W + col, dq.to(dq_p.dtype.element_ty), inside)
            tl.store(dqt_p + row * W + col, (e * gate).to(dq_p.dtype.element_ty), inside)
            if BIASES:
                dgate_sum += tl.sum(dgate, 0)
                dq_sum += tl.sum(dq, 0)
    out = partial_p + tl.program_id(0).to(tl.int64) * (6 * W) + tl.arange(0, BW)
    within = tl.arange(0, BW) < W
    tl.store(out, dweight_sum, within)
    tl.store(out + W, dbias_sum, within)
    tl.store(out + 2 * W, dgate_sum, within)
    tl.store(out + 3 * W, dq_sum, within)
    tl.store(out + 4 * W, dshift_sum, within)
    tl.store(out + 5 * W, dscale_sum, within)


_launch = Launch(dual_norm_kernel)
_launch_backward = Launch(dual_norm_backward_kernel)

Pair = tuple[Tensor, Tensor]  # a value and its tangent, of one shape and strides


class Vectors(NamedTuple):
    """What is the same for all rows, [W] each: the norm's weight and bias, and what is still to be added to values."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    gate: Tensor | None = None
    q: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None

    @property
    def biased(self) -> bool:
        """Whether something is to be added to gate, q, shift or scale."""
        return any(vector is not None for vector in self[2:])


def dual_norm(
    x: Pair,
    residual: tuple[Pair, Pair] | None,
    modulation: tuple[Pair, Pair] | None,
    vectors: Vectors,
    total: Pair | None,
    h: Pair,
    rms: bool,
    eps: float,
) -> None:
    """Launch `dual_norm_kernel`.

    Args:
        x: [R, W].
        residual: gate [R, W] and q [R, W], whose product is added to x first.
        modulation: shift and scale [R, W], all of one stride.
        vectors: of all rows.
        total: where x + gate * q goes, [R, W], without gaps.
        h: where the result goes, [R, W], without gaps.
        rms: RMS norm instead of LayerNorm.
        eps: of the norm.
    """
    rows, width = x[0].shape
    block_rows, columns, warps = tile(width, FORWARD_TILE)
    gate, q = residual or (x, x)
    shift, scale = modulation or (x, x)
    total = x if total is None else total
    _launch(
        (cdiv(rows, block_rows),),
        x_p=x[0],
        xt_p=x[1],
        gate_p=gate[0],
        gatet_p=gate[1],
        q_p=q[0],
        qt_p=q[1],
        shift_p=shift[0],
        shiftt_p=shift[1],
        scale_p=scale[0],
        scalet_p=scale[1],
        weight_p=vectors.weight,
        bias_p=vectors.bias,
        gate_bias_p=vectors.gate,
        q_bias_p=vectors.q,
        shift_bias_p=vectors.shift,
        scale_bias_p=vectors.scale,
        sum_p=total[0],
        sumt_p=total[1],
        h_p=h[0],
        ht_p=h[1],
        x_s=x[0].stride()[0],
        gate_s=gate[0].stride()[0],
        q_s=q[0].stride()[0],
        modulation_s=shift[0].stride()[0],
        rows=rows,
        eps=float(eps),
        W=width,
        RESIDUAL=residual is not None,
        MODULATED=modulation is not None,
        RMS=rms,
        BM=block_rows,
        BW=columns,
        num_warps=warps,
    )


def dual_norm_backward(
    dh: Pair,
    dtotal: Pair | None,
    x: Pair,
    residual: tuple[Pair, Pair] | None,
    scale: Pair | None,
    vectors: Vectors,
    dx: Pair,
    dresidual: tuple[Pair, Pair] | None,
    dscale: Pair | None,
    rms: bool,
    eps: float,
) -> Tensor:
    """Launch `dual_norm_backward_kernel`.

    Args:
        dh: gradients of the results, [R, W], which are those of shift too; all gradients are without gaps.
        dtotal: gradients that reach the sum from elsewhere, [R, W].
        x: the sum, [R, W].
        residual, scale, vectors, rms, eps: as in the forward pass.
        dx, dresidual, dscale: where the gradients of the sum, of gate and q, and of scale go, [R, W].

    Returns:
        The gradients of `SUMS`, [6, W] in float32; zeros for what is not there.
    """
    rows, width = x[0].shape
    block_rows, columns, warps = tile(width, BACKWARD_TILE)
    per_program = max(block_rows, cdiv(rows, _PROGRAMS))
    programs = cdiv(rows, per_program)
    partial = torch.empty(programs, len(SUMS), width, dtype=torch.float32, device=x[0].device)
    gate, q = residual or (x, x)
    dgate, dq = dresidual or (dx, dx)
    scales, dscales, dsum = scale or x, dscale or dx, dtotal or dx
    _launch_backward(
        (programs,),
        dh_p=dh[0],
        dht_p=dh[1],
        dsum_p=dsum[0],
        dsumt_p=dsum[1],
        x_p=x[0],
        xt_p=x[1],
        gate_p=gate[0],
        gatet_p=gate[1],
        q_p=q[0],
        qt_p=q[1],
        scale_p=scales[0],
        scalet_p=scales[1],
        weight_p=vectors.weight,
        bias_p=vectors.bias,
        gate_bias_p=vectors.gate,
        q_bias_p=vectors.q,
        scale_bias_p=vectors.scale,
        dx_p=dx[0],
        dxt_p=dx[1],
        dgate_p=dgate[0],
        dgatet_p=dgate[1],
        dq_p=dq[0],
        dqt_p=dq[1],
        dscale_p=dscales[0],
        dscalet_p=dscales[1],
        partial_p=partial,
        x_s=x[0].stride()[0],
        gate_s=gate[0].stride()[0],
        q_s=q[0].stride()[0],
        modulation_s=scales[0].stride()[0],
        rows=rows,
        per_program=per_program,
        eps=float(eps),
        W=width,
        RESIDUAL=residual is not None,
        MODULATED=scale is not None,
        DSUM=dtotal is not None,
        BIASES=vectors.biased,
        RMS=rms,
        BM=block_rows,
        BW=columns,
        num_warps=warps,
    )
    return partial.sum(0)
