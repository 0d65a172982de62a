"""The activation of the flow head's MLP on a value and its tangent, and its backward pass: SiLU, or SwiGLU.

Names end in _p for a pointer, in _s for the number of elements from one row to the next, in t_p for a pointer of
tangents.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniflow_kernels.triton_kernels.activation import hardware_tanh
from uniflow_kernels.triton_kernels.launch import Launch, cdiv

# tiles of so many elements keep values and tangents in registers at four warps
FORWARD_TILE = 1024
BACKWARD_TILE = 512
_STEPS = 8  # tiles of a backward program, whose sums are one


@triton.jit
def _silu(p, TANH: tl.constexpr):
    """SiLU of p in float32 and its derivative, and the sigmoid; of bfloat16 by tanh, see `activation.sigmoid`."""
    if TANH:
        s = 0.5 + 0.5 * hardware_tanh(0.5 * p, p)
    else:
        s = tl.sigmoid(p)
    value = p * s
    return value, s + value * (1 - s), s


@triton.jit
def _loaded(p_p, bias_p, row, col, inside, p_s):
    """p [BM, BN] in float32, and to it the bias, if there is one."""
    p = tl.load(p_p + row * p_s + col, inside, 0.0).to(tl.float32)
    if bias_p is not None:
        p += tl.load(bias_p + col, inside, 0.0).to(tl.float32)
    return p


@triton.jit(do_not_specialize=["rows"])
def dual_activation_kernel(
    p_p,
    pt_p,
    bias_p,
    u_p,
    ut_p,
    p_s,
    rows,
    H: tl.constexpr,
    SWIGLU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """u = SiLU(p + bias), or SiLU of its first H columns times the others, and its tangent."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]  # [BM, 1]
    col = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]  # [1, BN]
    inside = (row < rows) & (col < H)
    p = _loaded(p_p, bias_p, row, col, inside, p_s)
    pt = tl.load(pt_p + row * p_s + col, inside, 0.0).to(tl.float32)
    u, slope, _ = _silu(p, p_p.dtype.element_ty == tl.bfloat16)
    ut = slope * pt
    if SWIGLU:
        up = _loaded(p_p, bias_p, row, H + col, inside, p_s)
        ut = ut * up + u * tl.load(pt_p + row * p_s + H + col, inside, 0.0).to(tl.float32)
        u *= up
    tl.store(u_p + row * H + col, u.to(u_p.dtype.element_ty), inside)
    tl.store(ut_p + row * H + col, ut.to(u_p.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def dual_activation_backward_kernel(
    du_p,
    dut_p,
    p_p,
    pt_p,
    bias_p,
    dp_p,
    dpt_p,
    partial_p,
    p_s,
    rows,
    H: tl.constexpr,
    SWIGLU: tl.constexpr,
    STEPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Gradients of p and of its tangent; without tangents of p alone. The bias' are p's, summed over the rows.

    partial [programs, H or 2H] gets those sums over the program's rows.
    """
    first = tl.program_id(0).to(tl.int64) * (BM * STEPS)
    col = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]  # [1, BN]
    width: tl.constexpr = 2 * H if SWIGLU else H
    dp_sum = tl.zeros((BN,), tl.float32)
    dup_sum = tl.zeros((BN,), tl.float32)
    for step in range(STEPS):
        row = first + step * BM + tl.arange(0, BM)[:, None]  # [BM, 1]
        inside = (row < rows) & (col < H)
        du = tl.load(du_p + row * H + col, inside, 0.0).to(tl.float32)
        p = _loaded(p_p, bias_p, row, col, inside, p_s)
        u, slope, s = _silu(p, p_p.dtype.element_ty == tl.bfloat16)
        dp = du * slope
        if pt_p is not None:
            dut = tl.load(dut_p + row * H + col, inside, 0.0).to(tl.float32)
            pt = tl.load(pt_p + row * p_s + col, inside, 0.0).to(tl.float32)
            bent = s * (1 - s) * (2 + p * (1 - 2 * s)) * pt  # of the slope
        if SWIGLU:
            up = _loaded(p_p, bias_p, row, H + col, inside, p_s)
            dup = du * u
            dp *= up
            if pt_p is not None:
                upt = tl.load(pt_p + row * p_s + H + col, inside, 0.0).to(tl.float32)
                dp += dut * (bent * up + slope * upt)
                dup += dut * slope * pt
                tl.store(dpt_p + row * width + H + col, (dut * u).to(dp_p.dtype.element_ty), inside)
                dut *= up
            tl.store(dp_p + row * width + H + col, dup.to(dp_p.dtype.element_ty), inside)
            dup_sum += tl.sum(dup, 0)
        elif pt_p is not None:
            dp += dut * bent
        if pt_p is not None:
            tl.store(dpt_p + row * width + col, (dut * slope).to(dp_p.dtype.element_ty), inside)
        tl.store(dp_p + row * width + col, dp.to(dp_p.dtype.element_ty), inside)
        dp_sum += tl.sum(dp, 0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    out = partial_p + tl.program_id(0).to(tl.int64) * width + column
    tl.store(out, dp_sum, column < H)
    if SWIGLU:
        tl.store(out + H, dup_sum, column < H)


_launch = Launch(dual_activation_kernel)
_launch_backward = Launch(dual_activation_backward_kernel)


@lru_cache
def _tile(hidden: int, elements: int) -> tuple[int, int]:
    columns = min(256, triton.next_power_of_2(hidden))
    return elements // columns, columns


def dual_activation(p: tuple[Tensor, Tensor], bias: Tensor | None, u: tuple[Tensor, Tensor]) -> None:
    """Launch `dual_activation_kernel`.

    Args:
        p: value and tangent, [R, H] for SiLU, [R, 2H] for SwiGLU; of one stride.
        bias: to be added to the value first, [H or 2H].
        u: where value and tangent go, [R, H], without gaps.
    """
    rows, hidden = u[0].shape
    block_rows, columns = _tile(hidden, FORWARD_TILE)
    _launch(
        (cdiv(rows, block_rows), cdiv(hidden, columns)),
        p_p=p[0],
        pt_p=p[1],
        bias_p=bias,
        u_p=u[0],
        ut_p=u[1],
        p_s=p[0].stride()[0],
        rows=rows,
        H=hidden,
        SWIGLU=p[0].shape[1] != hidden,
        BM=block_rows,
        BN=columns,
    )


def dual_activation_backward(
    du: tuple[Tensor, Tensor | None],
    p: tuple[Tensor, Tensor | None],
    bias: Tensor | None,
    dp: tuple[Tensor, Tensor | None],
) -> Tensor:
    """Launch `dual_activation_backward_kernel`.

    Args:
        du: gradients of value and tangent, [R, H], without gaps; that of the tangent None if it has none.
        p, bias: as in the forward pass; without its tangent where there is no gradient of one.
        dp: where the gradients go, like p, without gaps.

    Returns:
        The gradient of the bias, [H or 2H] in float32.
    """
    rows, hidden = du[0].shape
    block_rows, columns = _tile(hidden, BACKWARD_TILE)
    programs = cdiv(rows, block_rows * _STEPS)
    partial = torch.empty(programs, p[0].shape[1], dtype=torch.float32, device=p[0].device)
    _launch_backward(
        (programs, cdiv(hidden, columns)),
        du_p=du[0],
        dut_p=du[1],
        p_p=p[0],
        pt_p=p[1],
        bias_p=bias,
        dp_p=dp[0],
        dpt_p=dp[1],
        partial_p=partial,
        p_s=p[0].stride()[0],
        rows=rows,
        H=hidden,
        SWIGLU=p[0].shape[1] != hidden,
        STEPS=_STEPS,
        BM=block_rows,
        BN=columns,
    )
    return partial.sum(0)
