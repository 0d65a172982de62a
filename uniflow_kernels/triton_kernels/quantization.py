"""Rows in 8-bit floats: the largest magnitude of each, and its numbers brought to 448 by it, in one pass over memory.

Names end in _p for a pointer and in _s for the number of elements from one row to the next.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniflow_kernels.triton_kernels.launch import Launch, cdiv

_TILE = 2048  # elements of narrow rows that a program takes together
_PER_THREAD = 16  # elements of a tile, which stay in registers between the two


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(
    x_p, q_p, scale_p, x_s, rows, smallest, LARGEST: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr
):
    """q = x * (1 / scale) and scale = max |x| / LARGEST, of each row; divided as IEEE 754 has it, as on a CPU."""
    index = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    row, col = index[:, None], tl.arange(0, BW)[None, :]
    inside = (row < rows) & (col < W)
    x = tl.load(x_p + row * x_s + col, inside, 0.0).to(tl.float32)
    scale = tl.maximum(tl.math.div_rn(tl.max(tl.abs(x), 1), tl.full((BM,), LARGEST, tl.float32)), smallest)
    q = x * tl.math.div_rn(tl.full((BM,), 1.0, tl.float32), scale)[:, None]
    tl.store(q_p + row * W + col, q.to(q_p.dtype.element_ty), inside)
    tl.store(scale_p + index, scale, index < rows)


_launch = Launch(quantize_kernel)


@lru_cache
def tile_of(width: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps that hold it."""
    columns = triton.next_power_of_2(width)
    rows = max(1, _TILE // columns)
    return rows, columns, min(16, max(4, rows * columns // (32 * _PER_THREAD)))


def quantize(rows: Tensor, largest: float, smallest: float) -> tuple[Tensor, Tensor]:
    """Rows [R, W] in float8_e4m3fn, and the scale of each, [R, 1] in float32.

    Args:
        rows: their elements lie side by side.
        largest: to which the largest magnitude of a row is brought.
        smallest: scale, of rows of zeros.
    """
    count, width = rows.shape
    q = torch.empty(count, width, dtype=torch.float8_e4m3fn, device=rows.device)
    scale = torch.empty(count, 1, dtype=torch.float32, device=rows.device)
    block_rows, columns, warps = tile_of(width)
    _launch(
        (cdiv(count, block_rows),),
        x_p=rows,
        q_p=q,
        scale_p=scale,
        x_s=rows.stride()[0],
        rows=count,
        smallest=smallest,
        LARGEST=largest,
        W=width,
        BM=block_rows,
        BW=columns,
        num_warps=warps,
    )
    return q, scale
