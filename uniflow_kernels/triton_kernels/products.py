"""Products whose epilogues do what surrounds them, which costs no pass over memory of its own: what all of them share.

Every product is A [M, K] times B transposed, in tiles of [BM, BN] results; a program makes one. Where two halves of a
weight meet in the epilogue (shift and scale, or the two halves of a SwiGLU), a program makes both tiles as one of
[BM, 2 BN]: the weight [2N, K] is read as [2, N, K], so that nothing needs to be packed. Tensors are read and written
through TMA descriptors, or, where the architecture has none, through pointers; both read zeros beyond the edges and
write nothing there. Names end in _p for a tensor (or its descriptor) and in _s for the elements from one row to the
next. Those of the flow head stand in `flow_products`, those of transformer layers in `layer_products`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from uniflow_kernels.triton_kernels import architecture
from uniflow_kernels.triton_kernels.flow_head import FORWARD_TILE, tile
from uniflow_kernels.triton_kernels.launch import Launch, cdiv


class Tile(NamedTuple):
    """BM rows and BN columns of a result (of each half of a pair), made from BK columns of A at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def piece(self) -> int:
        """Columns that the epilogue takes at a time."""
        return self.columns // (4 if self.columns > 128 else 2)


class Architecture(NamedTuple):
    """How the products are made on GPUs of one compute capability."""

    tma: bool
    dtypes: tuple[torch.dtype, ...]
    tiles: dict[str, Tile]
    small: dict[str, Tile] | None = None  # of which a multiprocessor holds two, if there are such tiles


# tensor cores multiply no float32; whether TF32 may stand in is the caller's choice, which the library's products heed
_HALF = (torch.bfloat16, torch.float16)
_HOPPER = {
    "folded": Tile(128, 256, 64, 8, 4),
    "residual": Tile(128, 128, 64, 8, 4),
    "modulated": Tile(128, 128, 64, 8, 4),
    "up": Tile(128, 256, 64, 8, 4),
    "gated up": Tile(128, 128, 64, 8, 4),
    "down": Tile(128, 128, 64, 8, 4),
    "down backward": Tile(128, 256, 64, 8, 3),
    "gated down backward": Tile(128, 128, 64, 8, 4),
    "layer's down backward": Tile(128, 256, 64, 8, 3),
}
# one block's product runs while the other's epilogue does: at most 113 KiB of shared memory and half the registers
_HALF_OF_HOPPER = {
    "folded": Tile(128, 128, 64, 8, 3),
    "residual": Tile(128, 64, 64, 4, 4),
    "modulated": Tile(128, 64, 64, 8, 3),
    "up": Tile(128, 128, 64, 8, 3),
    "gated up": Tile(128, 64, 64, 8, 3),
    "down": Tile(128, 64, 64, 4, 4),
    "down backward": Tile(128, 128, 64, 8, 3),
    "gated down backward": Tile(128, 64, 64, 8, 3),
    "layer's down backward": Tile(128, 64, 64, 8, 3),
}
_SHALLOW = {name: tile._replace(depth=32) for name, tile in _HOPPER.items()}  # at most 99 KiB of shared memory
# by compute capability, times ten; 0 is Triton's interpreter. Chosen by what ptxas makes of them: tests/compile
ARCHITECTURES = {
    0: Architecture(
        False,
        (torch.float32, *_HALF),
        dict.fromkeys(_HOPPER, Tile(128, 128, 128, 4, 1)),
        dict.fromkeys(_HOPPER, Tile(128, 64, 128, 4, 1)),
    ),
    80: Architecture(False, _HALF, _SHALLOW),
    86: Architecture(False, _HALF, _SHALLOW),
    89: Architecture(False, _HALF, _SHALLOW),
    90: Architecture(True, _HALF, _HOPPER, _HALF_OF_HOPPER),
    100: Architecture(True, _HALF, _HOPPER),
    120: Architecture(True, _HALF, _SHALLOW),
}


@triton.jit
def place(M, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The first row and column of this program's tile. Eight rows of tiles in turn share B's tiles in the L2 cache."""
    program = tl.program_id(0)
    group = program // (8 * tl.cdiv(N, BN))
    height = tl.minimum(tl.cdiv(M, BM) - group * 8, 8)
    within = program % (8 * tl.cdiv(N, BN))
    return (group * 8 + within % height) * BM, (within // height) * BN


@triton.jit
def read(t_p, t_s, row, col, rows, COLS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """[BM, BN] of a tensor [rows, COLS]."""
    if TMA:
        return t_p.load([row, col])
    else:
        r = row + tl.arange(0, BM)[:, None]
        c = col + tl.arange(0, BN)[None, :]
        return tl.load(t_p + r.to(tl.int64) * t_s + c, (r < rows) & (c < COLS), 0.0)


@triton.jit
def read_weight(
    w_p,
    w_s,
    row,
    col,
    N: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PAIR: tl.constexpr,
    TMA: tl.constexpr,
):
    """[BN, BK] of a weight [N, K]; as a pair [2 BN, BK] of [2, N, K]: rows of its first half, then of its second."""
    if not PAIR:
        return read(w_p, w_s, row, col, N, K, BN, BK, TMA)
    elif TMA:
        return tl.reshape(w_p.load([0, row, col]), (2 * BN, BK))
    else:
        i = tl.arange(0, 2 * BN)[:, None]
        r = row + i % BN
        c = col + tl.arange(0, BK)[None, :]
        return tl.load(w_p + (r + i // BN * N).to(tl.int64) * w_s + c, (r < N) & (c < K), 0.0)


@triton.jit
def write(t_p, t_s, row, col, rows, COLS: tl.constexpr, tile, TMA: tl.constexpr):
    """Write a tile of a tensor [rows, COLS]."""
    if TMA:
        t_p.store([row, col], tile.to(t_p.dtype))
    else:
        r = row + tl.arange(0, tile.shape[0])[:, None]
        c = col + tl.arange(0, tile.shape[1])[None, :]
        tl.store(t_p + r.to(tl.int64) * t_s + c, tile.to(t_p.dtype.element_ty), (r < rows) & (c < COLS))


@triton.jit
def vector(v_p, col, N: tl.constexpr, BN: tl.constexpr):
    """[1, BN] of a vector [N], in float32."""
    c = col + tl.arange(0, BN)[None, :]
    return tl.load(v_p + c, c < N, 0.0).to(tl.float32)


@triton.jit
def halves(tile):
    """[BM, BN] -> left and right, without a change of layout."""
    BM: tl.constexpr = tile.shape[0]
    BN: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def piece_of(tile, i: tl.constexpr, PIECES: tl.constexpr):
    """The i-th of two or four pieces of a tile's columns. An epilogue takes one at a time, for fewer registers."""
    left, right = halves(tile)
    if PIECES == 2:
        return left if i == 0 else right
    else:
        first, second = halves(left if i < 2 else right)
        return first if i % 2 == 0 else second


@triton.jit
def product(
    a_p,
    a_s,
    b_p,
    b_s,
    row,
    col,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PAIR: tl.constexpr,
    TMA: tl.constexpr,
):
    """A [M, K] @ B [N, K] transposed -> [BM, BN] in float32, or [BM, 2 BN] of a pair."""
    total = tl.zeros((BM, 2 * BN if PAIR else BN), tl.float32)
    for k in tl.range(0, K, BK):
        a = read(a_p, a_s, row, k, M, K, BM, BK, TMA)
        b = read_weight(b_p, b_s, col, k, N, K, BN, BK, PAIR, TMA)
        total = tl.dot(a, b.T, total, input_precision="ieee")
    return total


@triton.jit
def write_moments(moments_p, x, part, row, col, M, N: tl.constexpr, RMS: tl.constexpr):
    """Of x's columns inside N, row by row: the mean, and the sum of squares about it (RMS: about zero)."""
    r = row + tl.arange(0, x.shape[0])
    to = moments_p + 2 * part * M.to(tl.int64) + r
    if not RMS:
        mean = tl.sum(x, 1) / tl.minimum(tl.maximum(N - col, 1), x.shape[1])
        tl.store(to, mean, r < M)
        x = tl.where(col + tl.arange(0, x.shape[1])[None, :] < N, x - mean[:, None], 0.0)
    tl.store(to + M, tl.sum(x * x, 1), r < M)


@triton.jit
def read_moments(moments_p, row, M, eps, W: tl.constexpr, PART: tl.constexpr, BM: tl.constexpr, RMS: tl.constexpr):
    """Mean and 1/std [BM] of rows of W, from the moments [parts, 2, M] of their parts of PART columns each.

    Sums of squares about the parts' own means are added, never squares of means subtracted: nothing cancels.
    """
    PARTS: tl.constexpr = (W + PART - 1) // PART
    part = tl.arange(0, triton.next_power_of_2(PARTS))[:, None]
    r = row + tl.arange(0, BM)[None, :]
    inside = (part < PARTS) & (r < M)
    at = moments_p + (2 * part).to(tl.int64) * M + r
    squares = tl.load(at + M, inside, 0.0)  # [parts, BM]
    mean = tl.zeros((BM,), tl.float32)
    if not RMS:
        count = tl.minimum(tl.maximum(W - part * PART, 0), PART).to(tl.float32)
        means = tl.load(at, inside, 0.0)
        mean = tl.sum(count * means, 0) / W
        apart = means - mean[None, :]
        squares += count * apart * apart
    return mean, tl.rsqrt(tl.sum(squares, 0) / W + eps)


@triton.jit
def rounded(tile, like_p, TMA: tl.constexpr):
    """A tile in the dtype of a tensor."""
    return tile.to(like_p.dtype if TMA else like_p.dtype.element_ty)


@triton.jit(do_not_specialize=["M"])
def moments_kernel(x_p, moments_p, x_s, M, W: tl.constexpr, RMS: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr):
    """The moments [1, 2, M] of whole rows."""
    row = tl.program_id(0) * BM
    x = read(x_p, x_s, row, 0, M, W, BM, BW, False).to(tl.float32)
    write_moments(moments_p, x, 0, row, 0, M, W, RMS)


class Moments(NamedTuple):
    """Mean and sum of squares about it, float32 [parts, 2, R], of parts of so many `columns` of each of R rows."""

    values: Tensor
    columns: int


def room_for_moments(x: Tensor, tile: Tile, done: Moments | None) -> Tensor:
    """Where a product with this tile leaves the moments of rows like x [R, W]: in what is `done` if that fits."""
    rows, width = x.shape
    parts = cdiv(width, tile.columns) * (tile.columns // tile.piece)
    if done is not None and done.values.shape == (parts, 2, rows):
        return done.values
    return torch.empty(parts, 2, rows, dtype=torch.float32, device=x.device)


def why_not(
    device: torch.device, dtype: torch.dtype, row_widths: tuple[int, ...], tensors: list[Tensor], small: bool = False
) -> str | None:
    """Why these products cannot be made of such tensors, None if they can.

    Args:
        device: of all tensors.
        dtype: of the products' operands.
        row_widths: lengths of all matrices' rows.
        tensors: what is given as an operand, vectors too.
        small: whether in tiles of which a multiprocessor holds two.
    """
    arch = architecture(device)
    if arch not in ARCHITECTURES:
        return f"it has no tiles for compute capability {arch / 10}"
    tma, dtypes, *_ = ARCHITECTURES[arch]
    if small and ARCHITECTURES[arch].small is None:
        return f"it has no small tiles for compute capability {arch / 10}"
    if dtype not in dtypes:
        return f"it takes {' and '.join(map(str, dtypes))}, not {dtype}"
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        return "elements of a row do not follow each other"
    matrices = [tensor for tensor in tensors if tensor.ndim == 2]
    steps = [*row_widths, *(matrix.stride(0) for matrix in matrices)]
    if tma and (any(step * dtype.itemsize % 16 for step in steps) or any(m.data_ptr() % 16 for m in matrices)):
        return "TMA takes rows that begin at multiples of 16 bytes"
    if tma and any(matrix.stride(0) < matrix.shape[1] for matrix in matrices):
        return "TMA takes rows that do not overlap"
    return None


class Plan:
    """How a product is made on a kind of GPU, and what its kernel takes for its tensors."""

    def __init__(self, tile: Tile, tma: bool, kinds: dict[str, str]) -> None:
        self.tile, self.kinds = tile, kinds
        self.describe = self._describe if tma else None
        blocks = {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "BP": tile.piece, "TMA": tma}
        self.constants: dict[str, Any] = {**blocks, "num_warps": tile.warps, "num_stages": tile.stages}

    def grid(self, rows: int, columns: int) -> tuple[int]:
        """Of a result [rows, columns]."""
        return (cdiv(rows, self.tile.rows) * cdiv(columns, self.tile.columns),)

    def _describe(self, name: str, matrix: Tensor) -> Any:
        """The descriptor of an operand of that name, or the tensor itself where the kernel takes a pointer."""
        if name not in self.kinds:
            return matrix
        kind, tile, (stride, one) = self.kinds[name], self.tile, matrix.stride()
        shape, strides = list(matrix.shape), [stride, one]
        if kind == "left":
            block = [tile.rows, tile.depth]
        elif kind == "weight":
            block = [tile.columns, tile.depth]
        elif kind == "turned":
            block = [tile.depth, tile.columns]
        elif kind == "rows":
            block = [tile.rows, tile.piece]
        else:
            half = shape[0] // 2 if kind == "pair" else shape[1]
            shape, strides, block = [2, half, shape[1]], [half * stride, stride, one], [2, tile.columns, tile.depth]
        return TensorDescriptor(matrix, shape, strides, block)


# how operands are read and written: A "left" in [BM, BK], B [N, K] as a "weight" in [BN, BK], both halves
# of [2N, K] as a "pair" or the first two thirds of [3K, K] as a "first pair", read as [2, N, K] in [2, BN, BK]; B
# "turned" [K, N] in [BK, BN]; and "rows", of which the epilogue takes [BM, BP] at a time
_ROWS = dict.fromkeys(
    ("x_p", "h_p", "scale_p", "p_p", "up_p", "gate_p", "q_p", "sum_p", "dp_p", "dup_p", "u_p"), "rows"
)
_UP = {**_ROWS, "h_p": "left", "w_p": "weight"}
_DOWN_BACKWARD = {**_ROWS, "dq_p": "left", "w_p": "turned"}
KINDS = {
    "folded": {"x_p": "left", "w_p": "weight", "out_p": "rows"},
    "residual": {"a_p": "left", "w_p": "weight", "x_p": "rows", "sum_p": "rows"},
    "modulated": {**_ROWS, "a_p": "left", "m_p": "first pair"},
    "up": _UP,
    "gated up": {**_UP, "w_p": "pair"},
    "down": {**_ROWS, "a_p": "left", "g_p": "weight", "u_p": "left", "w_p": "weight"},
    "down backward": _DOWN_BACKWARD,
    "gated down backward": _DOWN_BACKWARD,
    "layer's down backward": _DOWN_BACKWARD,
}


@lru_cache
def _plan_of(name: str, tile: Tile, tma: bool) -> Plan:
    return Plan(tile, tma, KINDS[name])


def plan_of(name: str, like: Tensor, small: bool) -> Plan:
    """Of a product of tensors on a device."""
    made = ARCHITECTURES[architecture(like.device)]
    tiles = made.small if small and made.small else made.tiles
    return _plan_of(name, tiles[name], made.tma)


_launch_moments = Launch(moments_kernel)


def moments(x: Tensor, rms: bool) -> Moments:
    """Of whole rows of x [R, W]."""
    rows, width = x.shape
    values = torch.empty(1, 2, rows, dtype=torch.float32, device=x.device)
    block_rows, columns, warps = tile(width, FORWARD_TILE)
    grid = (cdiv(rows, block_rows),)
    _launch_moments(
        grid,
        x_p=x,
        moments_p=values,
        x_s=x.stride()[0],
        M=rows,
        W=width,
        RMS=rms,
        BM=block_rows,
        BW=columns,
        num_warps=warps,
    )
    return Moments(values, width)
