"""The activation of the flow head's MLP, and its backward pass: SiLU, or SwiGLU; and those of transformer layers.

Names end in _p for a pointer and in _s for the number of elements from one row to the next.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniflow_kernels.triton_kernels.launch import Launch, cdiv
from uniflow_kernels.triton_kernels.sums import ProgramSums, of_launch

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TILE = 2048  # elements of a tile that keep a program's values in registers at four warps


@triton.jit
def hardware_tanh(x, beside):
    """tanh of float32 by one instruction, to a relative error of 2^-11 (PTX ISA, tanh.approx); exact if interpreted."""
    if _INTERPRETED:
        return 2 * tl.sigmoid(2 * x) - 1
    else:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f,f", [x, beside], tl.float32, True, 1)


@triton.jit
def sigmoid(x, beside):
    """Of any float dtype, in float32, in the layout of another tensor: else Triton may make it once for each layout."""
    return sigmoid_for(x.to(tl.float32), beside, x.dtype)


@triton.jit
def sigmoid_for(x, beside, dtype: tl.constexpr):
    """Of float32 x, for results that are rounded to a dtype; `beside` as above.

    For bfloat16 by tanh: half as much work, and an error of 2^-12 at most, where rounding the results to bfloat16 has
    2^-9 of them. float16 rounds eight times as finely, and a gradient by tanh would break the 2x rule there.
    """
    if dtype == tl.bfloat16:
        return 0.5 + 0.5 * hardware_tanh(0.5 * x, beside)
    else:
        return tl.sigmoid(x)


@triton.jit
def gelu_share(p, beside, dtype: tl.constexpr):
    """GELU(p) / p, which is Phi(p), of float32 p for results that are rounded to a dtype; `beside` as above."""
    if dtype == tl.bfloat16:
        # an odd polynomial for the logit of Phi: fitted, p Phi(p) is wrong by 2.6e-5 at most. By erf the kernels have
        # about twice as many instructions
        square = tl.minimum(p * p, 36.0)  # beyond it Phi is 0 or 1, and the polynomial would turn
        return sigmoid_for(p * (1.59501317 + square * (0.0740136542 - 0.000703417275 * square)), beside, dtype)
    else:
        return 0.5 * (1 + tl.erf(p * 0.7071067811865476))


@triton.jit
def activation_and_slope(p, beside, dtype: tl.constexpr, ACT: tl.constexpr):
    """An activation of p, one of a dtype, and its derivative: both in float32, in the layout of another tensor."""
    wide = p.to(tl.float32)
    if ACT == "silu":
        s = sigmoid(p, beside)
        u = wide * s
        slope = s + u * (1 - s)
    elif ACT == "gelu":
        s = gelu_share(wide, beside, dtype)
        u = wide * s
        if dtype == tl.bfloat16:  # of the polynomial: wrong by 1.1e-4 at most, and no exponential
            square = tl.minimum(wide * wide, 36.0)
            slope = s + u * (1 - s) * (1.59501317 + square * (0.2220409626 - 0.003516386375 * square))
        else:
            slope = s + 0.3989422804014327 * wide * tl.exp2(-0.7213475204444817 * wide * wide)
    elif ACT == "gelu_pytorch_tanh":
        square = wide * wide
        logit = 1.5957691216057308 * wide * (1 + 0.044715 * square)
        s = sigmoid_for(logit, beside, dtype)
        u = wide * s
        slope = s + u * sigmoid_for(-logit, beside, dtype) * (1.5957691216057308 + 0.21406859270366874 * square)
    elif ACT == "quick_gelu":
        s = sigmoid_for(1.702 * wide, beside, dtype)
        u = wide * s
        slope = s + 1.702 * u * (1 - s)
    else:
        tl.static_assert(ACT == "relu")
        u = tl.maximum(wide, 0.0)
        slope = (wide > 0).to(tl.float32)
    return u, slope


@triton.jit(do_not_specialize=["rows"])
def activation_kernel(
    p_p, u_p, p_s, u_s, rows, H: tl.constexpr, SWIGLU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """u = SiLU(p), or SiLU(p[:, :H]) * p[:, H:]."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]  # [BM, 1]
    col = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]  # [1, BN]
    inside = (row < rows) & (col < H)
    p = tl.load(p_p + row * p_s + col, inside, 0.0)
    u = p.to(tl.float32) * sigmoid(p, p.to(tl.float32))
    if SWIGLU:
        u *= tl.load(p_p + row * p_s + H + col, inside, 0.0).to(tl.float32)
    tl.store(u_p + row * u_s + col, u.to(u_p.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def activation_backward_kernel(
    du_p,
    p_p,
    dp_p,
    u_p,
    partial_p,
    du_s,
    p_s,
    dp_s,
    u_s,
    rows,
    H: tl.constexpr,
    SWIGLU: tl.constexpr,
    STEPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dp from du; u once more, for the weight gradient; dp's sums over the program's rows, [programs, H or 2H]."""
    first = tl.program_id(0).to(tl.int64) * (BM * STEPS)
    col = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]  # [1, BN]
    dp_sum = tl.zeros((BN,), tl.float32)
    dup_sum = tl.zeros((BN,), tl.float32)
    for step in range(STEPS):
        row = first + step * BM + tl.arange(0, BM)[:, None]  # [BM, 1]
        inside = (row < rows) & (col < H)
        du = tl.load(du_p + row * du_s + col, inside, 0.0).to(tl.float32)
        p = tl.load(p_p + row * p_s + col, inside, 0.0)
        s = sigmoid(p, du)
        u = p.to(tl.float32) * s
        dp = du * (s + u * (1 - s))
        if SWIGLU:
            up = tl.load(p_p + row * p_s + H + col, inside, 0.0).to(tl.float32)
            dup = du * u
            dp *= up
            u *= up
            tl.store(dp_p + row * dp_s + H + col, dup.to(dp_p.dtype.element_ty), inside)
            dup_sum += tl.sum(dup, 0)
        tl.store(dp_p + row * dp_s + col, dp.to(dp_p.dtype.element_ty), inside)
        tl.store(u_p + row * u_s + col, u.to(u_p.dtype.element_ty), inside)
        dp_sum += tl.sum(dp, 0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    width: tl.constexpr = 2 * H if SWIGLU else H
    out = partial_p + tl.program_id(0).to(tl.int64) * width + column
    tl.store(out, dp_sum, column < H)
    if SWIGLU:
        tl.store(out + H, dup_sum, column < H)


_launch = Launch(activation_kernel)
_launch_backward = Launch(activation_backward_kernel)


@lru_cache
def _tile(hidden: int) -> tuple[int, int]:
    columns = min(256, triton.next_power_of_2(hidden))
    return max(1, TILE // columns), columns


def activation(p: Tensor, hidden: int) -> Tensor:
    """SiLU of p [R, H], or SwiGLU of p [R, 2H] -> [R, H]."""
    rows = p.shape[0]
    u = torch.empty(rows, hidden, dtype=p.dtype, device=p.device)
    block_rows, columns = _tile(hidden)
    _launch(
        (cdiv(rows, block_rows), cdiv(hidden, columns)),
        p_p=p,
        u_p=u,
        p_s=p.stride()[0],
        u_s=u.stride()[0],
        rows=rows,
        H=hidden,
        SWIGLU=p.shape[1] != hidden,
        BM=block_rows,
        BN=columns,
    )
    return u


def activation_backward(du: Tensor, p: Tensor, sums: ProgramSums | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of `activation`.

    Args:
        du: [R, H]; overwritten for SiLU.
        p: [R, H or 2H].
        sums: where dp's are added up together with those of other launches.

    Returns:
        dp like p, u [R, H], and dp's sums over rows [H or 2H] in float32; these are there when `sums` are added up.
    """
    rows, hidden = du.shape
    gated = p.shape[1] != hidden
    dp = torch.empty_like(p) if gated else du
    u = torch.empty(rows, hidden, dtype=p.dtype, device=p.device)
    block_rows, columns = _tile(hidden)
    steps = 8
    programs = cdiv(rows, block_rows * steps)
    partial, total = of_launch(sums, programs, p.shape[1:], p.device)
    _launch_backward(
        (programs, cdiv(hidden, columns)),
        du_p=du,
        p_p=p,
        dp_p=dp,
        u_p=u,
        partial_p=partial,
        du_s=du.stride()[0],
        p_s=p.stride()[0],
        dp_s=dp.stride()[0],
        u_s=u.stride()[0],
        rows=rows,
        H=hidden,
        SWIGLU=gated,
        STEPS=steps,
        BM=block_rows,
        BN=columns,
    )
    return dp, u, partial.sum(0) if total is None else total
