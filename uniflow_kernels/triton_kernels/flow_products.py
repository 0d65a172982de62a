"""The products of the flow head: what makes the modulations, and both layers of the MLP, with all around them.

The backward product of the MLP's second layer serves transformer layers too, with their activation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniflow_kernels.triton_kernels.activation import activation_and_slope, sigmoid
from uniflow_kernels.triton_kernels.launch import Launch, cdiv
from uniflow_kernels.triton_kernels.products import (
    Moments,
    halves,
    piece_of,
    place,
    plan_of,
    product,
    read,
    read_moments,
    room_for_moments,
    rounded,
    vector,
    write,
    write_moments,
)
from uniflow_kernels.triton_kernels.sums import ProgramSums, of_launch


@triton.jit(do_not_specialize=["M"])
def modulation_kernel(
    a_p,
    m_p,
    mbias_p,
    x_p,
    moments_p,
    weight_p,
    bias_p,
    h_p,
    scale_p,
    a_s,
    m_s,
    x_s,
    h_s,
    scale_s,
    M,
    eps,
    W: tl.constexpr,
    PART: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    RMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    TMA: tl.constexpr,
):
    """h = norm(x) * (1 + scale) + shift, with shift and scale [M, W] from a and m [2, W, W]; scale may be kept."""
    row, col = place(M, W, BM, BN)
    first, second = halves(product(a_p, a_s, m_p, m_s, row, col, M, W, W, BM, BN, BK, True, TMA))
    mean, rstd = read_moments(moments_p, row, M, eps, W, PART, BM, RMS)
    for i in tl.static_range(BN // BP):
        c = col + i * BP
        scale, shift = piece_of(second, i, BN // BP), piece_of(first, i, BN // BP)  # [BM, BP] each
        if SCALE_FIRST:
            scale, shift = shift, scale
        if mbias_p is not None:
            scale += vector(mbias_p + (0 if SCALE_FIRST else W), c, W, BP)
            shift += vector(mbias_p + (W if SCALE_FIRST else 0), c, W, BP)
        if scale_p is not None:
            write(scale_p, scale_s, row, c, M, W, scale, TMA)
        x = read(x_p, x_s, row, c, M, W, BM, BP, TMA).to(tl.float32)
        h = (x - mean[:, None]) * rstd[:, None]
        if weight_p is not None:
            h *= vector(weight_p, c, W, BP)
        if bias_p is not None:
            h += vector(bias_p, c, W, BP)
        write(h_p, h_s, row, c, M, W, h * (1 + scale) + shift, TMA)


@triton.jit(do_not_specialize=["M"])
def up_kernel(
    h_p,
    w_p,
    bias_p,
    p_p,
    up_p,
    u_p,
    h_s,
    w_s,
    p_s,
    u_s,
    M,
    H: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    TMA: tl.constexpr,
):
    """u = SiLU(p) with p from h and w [H, K]; GATED: SiLU(p) * up, from w [2, H, K]. p and up may be kept."""
    row, col = place(M, H, BM, BN)
    total = product(h_p, h_s, w_p, w_s, row, col, M, H, K, BM, BN, BK, GATED, TMA)
    if GATED:
        gates, ups = halves(total)
    else:
        gates, ups = total, total
    for i in tl.static_range(BN // BP):
        c = col + i * BP
        p = piece_of(gates, i, BN // BP)  # [BM, BP]
        if bias_p is not None:
            p += vector(bias_p, c, H, BP)
        p = rounded(p, u_p, TMA)  # as it is kept: the backward pass makes the same u of it
        if p_p is not None:
            write(p_p, p_s, row, c, M, H, p, TMA)
        u = p.to(tl.float32) * sigmoid(p, p.to(tl.float32))
        if GATED:
            up = piece_of(ups, i, BN // BP)
            if bias_p is not None:
                up += vector(bias_p + H, c, H, BP)
            up = rounded(up, u_p, TMA)
            if up_p is not None:
                write(up_p, p_s, row, c, M, H, up, TMA)
            u *= up.to(tl.float32)
        write(u_p, u_s, row, c, M, H, u, TMA)


@triton.jit(do_not_specialize=["M"])
def down_kernel(
    a_p,
    g_p,
    gbias_p,
    u_p,
    w_p,
    bias_p,
    x_p,
    gate_p,
    q_p,
    sum_p,
    moments_p,
    a_s,
    g_s,
    u_s,
    w_s,
    x_s,
    gate_s,
    q_s,
    sum_s,
    M,
    W: tl.constexpr,
    H: tl.constexpr,
    RMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    TMA: tl.constexpr,
):
    """sum = x + gate * q and its moments; the gate from a and the last third of g [3W, W], q from u and w [W, H]."""
    row, col = place(M, W, BM, BN)
    gates = product(a_p, a_s, g_p, g_s, row, 2 * W + col, M, 3 * W, W, BM, BN, BK, False, TMA)
    if gbias_p is not None:
        gates += vector(gbias_p, 2 * W + col, 3 * W, BN)
    gates = rounded(gates, sum_p, TMA)  # half the registers, while the second product is made
    qs = product(u_p, u_s, w_p, w_s, row, col, M, W, H, BM, BN, BK, False, TMA)
    for i in tl.static_range(BN // BP):
        c = col + i * BP
        gate, q = piece_of(gates, i, BN // BP), piece_of(qs, i, BN // BP)  # [BM, BP] each
        if bias_p is not None:
            q += vector(bias_p, c, W, BP)
        if gate_p is not None:
            write(gate_p, gate_s, row, c, M, W, gate, TMA)
        if q_p is not None:
            write(q_p, q_s, row, c, M, W, q, TMA)
        x = read(x_p, x_s, row, c, M, W, BM, BP, TMA).to(tl.float32)
        x = rounded(x + gate.to(tl.float32) * q, sum_p, TMA)
        write(sum_p, sum_s, row, c, M, W, x, TMA)
        # of the rounded sum, which is what the next norm is given
        write_moments(moments_p, x.to(tl.float32), c // BP, row, c, M, W, RMS)


@triton.jit(do_not_specialize=["M"])
def down_backward_kernel(
    dq_p,
    w_p,
    p_p,
    up_p,
    dp_p,
    dup_p,
    u_p,
    partial_p,
    dq_s,
    w_s,
    p_s,
    dp_s,
    u_s,
    M,
    H: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    TMA: tl.constexpr,
):
    """dp (and dup) from du = dq @ w [K, H], u once more, and the tile's sums over rows, [row tiles, H or 2H].

    u is ACT(p), times up where it is GATED.
    """
    row, col = place(M, H, BM, BN)
    dus = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK):
        dq = read(dq_p, dq_s, row, k, M, K, BM, BK, TMA)
        w = read(w_p, w_s, k, col, K, H, BK, BN, TMA)
        dus = tl.dot(dq, w, dus, input_precision="ieee")
    sums_p = partial_p + (row // BM).to(tl.int64) * (2 * H if GATED else H)
    for i in tl.static_range(BN // BP):
        c = col + i * BP
        columns = c + tl.arange(0, BP)
        du = piece_of(dus, i, BN // BP)  # [BM, BP]
        p = read(p_p, p_s, row, c, M, H, BM, BP, TMA)
        u, slope = activation_and_slope(p, du, rounded(du, u_p, TMA).dtype, ACT)
        dp = du * slope
        if GATED:
            up = read(up_p, p_s, row, c, M, H, BM, BP, TMA).to(tl.float32)
            dup = du * u
            write(dup_p, dp_s, row, c, M, H, dup, TMA)
            tl.store(sums_p + H + columns, tl.sum(dup, 0), columns < H)
            dp *= up
            u *= up
        write(dp_p, dp_s, row, c, M, H, dp, TMA)
        write(u_p, u_s, row, c, M, H, u, TMA)
        tl.store(sums_p + columns, tl.sum(dp, 0), columns < H)


_launch_modulated = Launch(modulation_kernel)
_launch_up = Launch(up_kernel)
_launch_down = Launch(down_kernel)
_launch_down_backward = Launch(down_backward_kernel)


def modulated(
    x: Tensor,
    of_x: Moments,
    a: Tensor,
    modulation: tuple[Tensor, Tensor | None],
    norm: tuple[Tensor | None, Tensor | None],
    h: Tensor,
    scale: Tensor | None,
    scale_first: bool,
    rms: bool,
    eps: float,
    small: bool = False,
) -> None:
    """Launch `modulation_kernel`.

    Args:
        x: [R, W].
        of_x: its moments.
        a: [R, W].
        modulation: weight [2W or more, W] and bias: first of shift, then of scale, or the other way round.
        norm: weight [W] and bias [W].
        h: where the result goes, [R, W].
        scale: where scale goes if it is wanted, [R, W].
        scale_first: whether the rows of scale come first.
        rms: RMS norm instead of LayerNorm.
        eps: of the norm.
        small: whether in tiles of which a multiprocessor holds two, as everywhere below.
    """
    rows, width = x.shape
    plan = plan_of("modulated", x, small)
    weight, bias = modulation
    _launch_modulated(
        plan.grid(rows, width),
        plan.describe,
        a_p=a,
        m_p=weight,
        mbias_p=bias,
        x_p=x,
        moments_p=of_x.values,
        weight_p=norm[0],
        bias_p=norm[1],
        h_p=h,
        scale_p=scale,
        a_s=a.stride()[0],
        m_s=weight.stride()[0],
        x_s=x.stride()[0],
        h_s=h.stride()[0],
        scale_s=0 if scale is None else scale.stride()[0],
        M=rows,
        eps=float(eps),
        W=width,
        PART=of_x.columns,
        SCALE_FIRST=scale_first,
        RMS=rms,
        **plan.constants,
    )


def _sides(p: Tensor | None, hidden: int) -> tuple[Tensor | None, Tensor | None]:
    """[R, 2H] -> [R, H] twice; [R, H] -> itself and None."""
    if p is None:
        return None, None
    return p[:, :hidden], p[:, hidden:] if p.shape[1] != hidden else None


def up(h: Tensor, affine: tuple[Tensor, Tensor | None], u: Tensor, p: Tensor | None, small: bool = False) -> None:
    """Launch `up_kernel`.

    Args:
        h: [R, W].
        affine: weight [H, W], or [2H, W] for a SwiGLU, and bias.
        u: where the MLP's hidden activations go, [R, H].
        p: where what they are made of goes if it is wanted, [R, H or 2H].
    """
    rows, hidden = u.shape
    weight, bias = affine
    gated = weight.shape[0] != hidden
    plan = plan_of("gated up" if gated else "up", h, small)
    gates, ups = _sides(p, hidden)
    _launch_up(
        plan.grid(rows, hidden),
        plan.describe,
        h_p=h,
        w_p=weight,
        bias_p=bias,
        p_p=gates,
        up_p=ups,
        u_p=u,
        h_s=h.stride()[0],
        w_s=weight.stride()[0],
        p_s=0 if p is None else p.stride()[0],
        u_s=u.stride()[0],
        M=rows,
        H=hidden,
        K=h.shape[1],
        GATED=gated,
        **plan.constants,
    )


def down(
    x: Tensor,
    a: Tensor,
    modulation: tuple[Tensor, Tensor | None],
    u: Tensor,
    affine: tuple[Tensor, Tensor | None],
    total: Tensor,
    gate: Tensor | None,
    q: Tensor | None,
    rms: bool,
    done: Moments | None = None,
    small: bool = False,
) -> Moments:
    """Launch `down_kernel`.

    Args:
        x: [R, W].
        a: [R, W].
        modulation: weight [3W, W] and bias of the modulation, whose last third makes the gate.
        u: [R, H].
        affine: weight [W, H] and bias of the MLP's second layer.
        total: where x + gate * q goes, [R, W]; may be x.
        gate: where the gate goes if it is wanted, [R, W].
        q: where the MLP's output goes if it is wanted, [R, W].
        rms: whether moments are wanted for an RMS norm.
        done: moments that nobody needs any more, whose memory is taken if it fits.

    Returns:
        The sum's moments.
    """
    rows, width = x.shape
    plan = plan_of("down", x, small)
    values = room_for_moments(x, plan.tile, done)
    (gate_weight, gate_bias), (weight, bias) = modulation, affine
    _launch_down(
        plan.grid(rows, width),
        plan.describe,
        a_p=a,
        g_p=gate_weight,
        gbias_p=gate_bias,
        u_p=u,
        w_p=weight,
        bias_p=bias,
        x_p=x,
        gate_p=gate,
        q_p=q,
        sum_p=total,
        moments_p=values,
        a_s=a.stride()[0],
        g_s=gate_weight.stride()[0],
        u_s=u.stride()[0],
        w_s=weight.stride()[0],
        x_s=x.stride()[0],
        gate_s=0 if gate is None else gate.stride()[0],
        q_s=0 if q is None else q.stride()[0],
        sum_s=total.stride()[0],
        M=rows,
        W=width,
        H=u.shape[1],
        RMS=rms,
        **plan.constants,
    )
    return Moments(values, plan.tile.piece)


def down_backward(
    dq: Tensor,
    weight: Tensor,
    p: Tensor,
    small: bool = False,
    sums: ProgramSums | None = None,
    activation: str = "silu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `down_backward_kernel`.

    Args:
        dq: gradient of the MLP's output, [R, W].
        weight: of its second layer, [W, H].
        p: what its first layer made, [R, H or 2H].
        small: as above.
        sums: where dp's are added up together with those of other launches.
        activation: between the layers; one of ACTIVATIONS where p is [R, H].

    Returns:
        dp like p, u [R, H], and dp's sums over rows [H or 2H] in float32; these are there when `sums` are added up.
    """
    rows, hidden = dq.shape[0], weight.shape[1]
    gated = p.shape[1] != hidden
    name = "gated down backward" if gated else "down backward" if activation == "silu" else "layer's down backward"
    plan = plan_of(name, dq, small)
    dp, u = torch.empty_like(p), torch.empty(rows, hidden, dtype=p.dtype, device=p.device)
    programs = cdiv(rows, plan.tile.rows)
    partial, total = of_launch(sums, programs, p.shape[1:], p.device)
    (gates, ups), (dgates, dups) = _sides(p, hidden), _sides(dp, hidden)
    _launch_down_backward(
        plan.grid(rows, hidden),
        plan.describe,
        dq_p=dq,
        w_p=weight,
        p_p=gates,
        up_p=ups,
        dp_p=dgates,
        dup_p=dups,
        u_p=u,
        partial_p=partial,
        dq_s=dq.stride()[0],
        w_s=weight.stride()[0],
        p_s=p.stride()[0],
        dp_s=dp.stride()[0],
        u_s=u.stride()[0],
        M=rows,
        H=hidden,
        K=dq.shape[1],
        GATED=gated,
        ACT=activation,
        **plan.constants,
    )
    return dp, u, partial.sum(0) if total is None else total
