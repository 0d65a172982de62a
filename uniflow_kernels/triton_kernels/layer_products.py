"""The products of a pre-norm transformer layer: with the norm before them in them, or the residual behind them.

A norm is folded into the weight behind it: of x with mean m and deviation s, norm weight w and bias b, the product
V ((x - m) / s * w + b) is (W x - m * sums(W)) / s + V b with W = V diag(w), so that nothing is normalised in memory.
What is needed of a row, its moments, the product before has left.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniflow_kernels.triton_kernels.activation import gelu_share, sigmoid_for
from uniflow_kernels.triton_kernels.flow_head import FORWARD_TILE, tile
from uniflow_kernels.triton_kernels.launch import Launch, cdiv
from uniflow_kernels.triton_kernels.products import (
    Moments,
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


@triton.jit
def _activated(p, dtype: tl.constexpr, ACT: tl.constexpr):
    """An activation of p in float32, for results that are rounded to a dtype."""
    if ACT == "gelu":
        return p * gelu_share(p, p, dtype)
    elif ACT == "gelu_pytorch_tanh":
        return p * sigmoid_for(1.5957691216057308 * (p + 0.044715 * p * p * p), p, dtype)
    elif ACT == "silu":
        return p * sigmoid_for(p, p, dtype)
    elif ACT == "quick_gelu":
        return p * sigmoid_for(1.702 * p, p, dtype)
    elif ACT == "relu":
        return tl.maximum(p, 0.0)
    else:
        return p


@triton.jit(do_not_specialize=["N"])
def fold_norm_kernel(
    w_p,
    norm_p,
    norm_bias_p,
    bias_p,
    folded_p,
    sums_p,
    made_p,
    w_s,
    N,
    W: tl.constexpr,
    BM: tl.constexpr,
    BW: tl.constexpr,
):
    """A weight [N, W] times the norm's [W]; of each row the sum of that as it is rounded, and what its bias becomes."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.arange(0, BW)[None, :]
    inside = (row[:, None] < N) & (col < W)
    w = tl.load(w_p + row[:, None].to(tl.int64) * w_s + col, inside, 0.0).to(tl.float32)
    folded = w
    if norm_p is not None:
        folded = w * tl.load(norm_p + col, col < W, 0.0).to(tl.float32)
    stored = folded.to(folded_p.dtype.element_ty)
    tl.store(folded_p + row[:, None].to(tl.int64) * W + col, stored, inside)
    tl.store(sums_p + row, tl.sum(stored.to(tl.float32), 1), row < N)
    if made_p is not None:
        made = tl.zeros((BM,), tl.float32)
        if norm_bias_p is not None:
            made += tl.sum(w * tl.load(norm_bias_p + col, col < W, 0.0).to(tl.float32), 1)
        if bias_p is not None:
            made += tl.load(bias_p + row, row < N, 0.0).to(tl.float32)
        tl.store(made_p + row, made, row < N)


@triton.jit(do_not_specialize=["M"])
def folded_norm_kernel(
    x_p,
    w_p,
    sums_p,
    bias_p,
    moments_p,
    out_p,
    x_s,
    w_s,
    out_s,
    M,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    PART: tl.constexpr,
    ACT: tl.constexpr,
    RMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    TMA: tl.constexpr,
):
    """out = ACT((x @ w.T - mean * sums) * rstd + bias), [M, N]; without moments ACT(x @ w.T + bias)."""
    row, col = place(M, N, BM, BN)
    total = product(x_p, x_s, w_p, w_s, row, col, M, N, K, BM, BN, BK, False, TMA)
    if moments_p is not None:
        mean, rstd = read_moments(moments_p, row, M, eps, K, PART, BM, RMS)
    for i in tl.static_range(BN // BP):
        c = col + i * BP
        out = piece_of(total, i, BN // BP)  # [BM, BP]
        if moments_p is not None:
            if not RMS:
                out -= mean[:, None] * vector(sums_p, c, N, BP)
            out *= rstd[:, None]
        if bias_p is not None:
            out += vector(bias_p, c, N, BP)
        write(out_p, out_s, row, c, M, N, _activated(out, out_p.dtype if TMA else out_p.dtype.element_ty, ACT), TMA)


@triton.jit(do_not_specialize=["M", "positions"])
def residual_product_kernel(
    a_p,
    w_p,
    bias_p,
    scale_p,
    x_p,
    position_p,
    sum_p,
    moments_p,
    a_s,
    w_s,
    x_s,
    sum_s,
    positions,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    RMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    TMA: tl.constexpr,
):
    """sum = x + scale * (a @ w.T + bias), [M, N], and its moments if they are wanted.

    In the place of x a position [positions, N] may be added, the same to all rows of its number modulo `positions`.
    """
    row, col = place(M, N, BM, BN)
    qs = product(a_p, a_s, w_p, w_s, row, col, M, N, K, BM, BN, BK, False, TMA)
    for i in tl.static_range(BN // BP):
        c = col + i * BP
        q = piece_of(qs, i, BN // BP)  # [BM, BP]
        if bias_p is not None:
            q += vector(bias_p, c, N, BP)
        if scale_p is not None:
            q *= vector(scale_p, c, N, BP)
        if x_p is not None:
            x = read(x_p, x_s, row, c, M, N, BM, BP, TMA).to(tl.float32)
        else:  # few rows, which the L2 cache holds
            r = (row + tl.arange(0, BM)[:, None]) % positions
            at = c + tl.arange(0, BP)[None, :]
            x = tl.load(position_p + r * N + at, at < N, 0.0).to(tl.float32)
        x = rounded(x + q, sum_p, TMA)
        write(sum_p, sum_s, row, c, M, N, x, TMA)
        if moments_p is not None:
            # of the rounded sum, which is what the next norm is given
            write_moments(moments_p, x.to(tl.float32), c // BP, row, c, M, N, RMS)


_launch_fold = Launch(fold_norm_kernel)
_launch_folded = Launch(folded_norm_kernel)
_launch_residual = Launch(residual_product_kernel)


def fold_norm(
    norm: tuple[Tensor | None, Tensor | None], affine: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch `fold_norm_kernel`.

    Args:
        norm: weight [K] and bias [K].
        affine: weight [N, K] and bias [N] of the product behind it.

    Returns:
        The weight of both in one, [N, K] in the dtype of the product's; of each of its rows the sum, and the bias, in
        float32 [N]. No bias if neither has one.
    """
    weight, bias = affine
    (rows, width), biased = weight.shape, bias is not None or norm[1] is not None
    block_rows, columns, warps = tile(width, FORWARD_TILE)
    folded = torch.empty(rows, width, dtype=weight.dtype, device=weight.device)
    sums = torch.empty(rows, dtype=torch.float32, device=weight.device)
    made = torch.empty_like(sums) if biased else None
    _launch_fold(
        (cdiv(rows, block_rows),),
        w_p=weight,
        norm_p=norm[0],
        norm_bias_p=norm[1],
        bias_p=bias,
        folded_p=folded,
        sums_p=sums,
        made_p=made,
        w_s=weight.stride()[0],
        N=rows,
        W=width,
        BM=block_rows,
        BW=columns,
        num_warps=warps,
    )
    return folded, sums, made


def folded_norm(
    x: Tensor,
    of_x: Moments | None,
    weight: Tensor,
    sums: Tensor | None,
    bias: Tensor | None,
    activation: str,
    rms: bool,
    eps: float,
    small: bool = False,
) -> Tensor:
    """Launch `folded_norm_kernel`.

    Args:
        x: [R, K].
        of_x: its moments; None for no norm.
        weight: of the product, the norm's weight in it, [N, K].
        sums: of each of its rows, float32 [N]; None with an RMS norm.
        bias: of the product, with the norm's in it, [N].
        activation: "gelu", "gelu_pytorch_tanh", "quick_gelu", "silu", "relu" or "none".
        rms: RMS norm instead of LayerNorm.
        eps: of the norm.
        small: whether in tiles of which a multiprocessor holds two.

    Returns:
        [R, N] in x's dtype.
    """
    rows, columns = x.shape[0], weight.shape[0]
    plan = plan_of("folded", x, small)
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    _launch_folded(
        plan.grid(rows, columns),
        plan.describe,
        x_p=x,
        w_p=weight,
        sums_p=sums,
        bias_p=bias,
        moments_p=None if of_x is None else of_x.values,
        out_p=out,
        x_s=x.stride()[0],
        w_s=weight.stride()[0],
        out_s=columns,
        M=rows,
        eps=float(eps),
        N=columns,
        K=x.shape[1],
        PART=0 if of_x is None else of_x.columns,
        ACT=activation,
        RMS=rms,
        **plan.constants,
    )
    return out


def activated_product(x: Tensor, affine: tuple[Tensor, Tensor | None], activation: str, small: bool = False) -> Tensor:
    """An activation of a product: `folded_norm_kernel` without a norm.

    Args:
        x: [R, K].
        affine: weight [N, K] and bias [N].
        activation, small: as above.

    Returns:
        [R, N] in x's dtype.
    """
    return folded_norm(x, None, affine[0], None, affine[1], activation, True, 0.0, small)


def residual_product(
    a: Tensor,
    affine: tuple[Tensor, Tensor | None],
    scale: Tensor | None,
    x: Tensor,
    rms: bool | None,
    done: Moments | None = None,
    small: bool = False,
) -> tuple[Tensor, Moments | None]:
    """Launch `residual_product_kernel`.

    Args:
        a: [R, K].
        affine: weight [N, K] and bias [N].
        scale: LayerScale, [N].
        x: what is added to, [R, N]; or a position [P, N], contiguous, for rows of which each P lie side by side.
        rms: whether moments are wanted for an RMS norm or a LayerNorm; None if they are not.
        done: moments that nobody needs any more, whose memory is taken if it fits.
        small: as above.

    Returns:
        The sum [R, N] and its moments.
    """
    weight, bias = affine
    (rows, depth), width = a.shape, weight.shape[0]
    repeats = x.shape[0] != rows
    plan = plan_of("residual", a, small)
    values = None if rms is None else room_for_moments(x, plan.tile, done)
    total = torch.empty(rows, width, dtype=a.dtype, device=a.device)
    _launch_residual(
        plan.grid(rows, width),
        plan.describe,
        a_p=a,
        w_p=weight,
        bias_p=bias,
        scale_p=scale,
        x_p=None if repeats else x,
        position_p=x if repeats else None,
        sum_p=total,
        moments_p=values,
        a_s=a.stride()[0],
        w_s=weight.stride()[0],
        x_s=x.stride()[0],
        sum_s=width,
        positions=x.shape[0],
        M=rows,
        N=width,
        K=depth,
        RMS=bool(rms),
        **plan.constants,
    )
    return total, None if values is None else Moments(values, plan.tile.piece)
