"""Products of the flow head whose epilogues do what surrounds them: it costs no pass over memory of its own.

Every product is A [M, K] times B transposed, in tiles of [BM, BN] results; a program makes one. Where two halves of a
weight meet in the epilogue (shift and scale, or the two halves of a SwiGLU), a program makes both tiles as one of
[BM, 2 BN]: the weight [2N, K] is read as [2, N, K], so that nothing needs to be packed. Tensors are read and written
through TMA descriptors, or, where the architecture has none, through pointers; both read zeros beyond the edges and
write nothing there. Names end in _p for a tensor (or its descriptor) and in _s for the elements from one row to the
next.
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
from uniflow_kernels.triton_kernels.activation import sigmoid
from uniflow_kernels.triton_kernels.flow_head import FORWARD_TILE, tile
from uniflow_kernels.triton_kernels.launch import Launch, cdiv
from uniflow_kernels.triton_kernels.sums import ProgramSums, of_launch


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
    "modulated": Tile(128, 128, 64, 8, 4),
    "up": Tile(128, 256, 64, 8, 4),
    "gated up": Tile(128, 128, 64, 8, 4),
    "down": Tile(128, 128, 64, 8, 4),
    "down backward": Tile(128, 256, 64, 8, 3),
    "gated down backward": Tile(128, 128, 64, 8, 4),
}
# one block's product runs while the other's epilogue does: at most 113 KiB of shared memory and half the registers
_HALF_OF_HOPPER = {
    "modulated": Tile(128, 64, 64, 8, 3),
    "up": Tile(128, 128, 64, 8, 3),
    "gated up": Tile(128, 64, 64, 8, 3),
    "down": Tile(128, 64, 64, 4, 4),
    "down backward": Tile(128, 128, 64, 8, 3),
    "gated down backward": Tile(128, 64, 64, 8, 3),
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
def _place(M, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The first row and column of this program's tile. Eight rows of tiles in turn share B's tiles in the L2 cache."""
    program = tl.program_id(0)
    group = program // (8 * tl.cdiv(N, BN))
    height = tl.minimum(tl.cdiv(M, BM) - group * 8, 8)
    within = program % (8 * tl.cdiv(N, BN))
    return (group * 8 + within % height) * BM, (within // height) * BN


@triton.jit
def _read(t_p, t_s, row, col, rows, COLS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TMA: tl.constexpr):
    """[BM, BN] of a tensor [rows, COLS]."""
    if TMA:
        return t_p.load([row, col])
    else:
        r = row + tl.arange(0, BM)[:, None]
        c = col + tl.arange(0, BN)[None, :]
        return tl.load(t_p + r.to(tl.int64) * t_s + c, (r < rows) & (c < COLS), 0.0)


@triton.jit
def _read_weight(
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
        return _read(w_p, w_s, row, col, N, K, BN, BK, TMA)
    elif TMA:
        return tl.reshape(w_p.load([0, row, col]), (2 * BN, BK))
    else:
        i = tl.arange(0, 2 * BN)[:, None]
        r = row + i % BN
        c = col + tl.arange(0, BK)[None, :]
        return tl.load(w_p + (r + i // BN * N).to(tl.int64) * w_s + c, (r < N) & (c < K), 0.0)


@triton.jit
def _write(t_p, t_s, row, col, rows, COLS: tl.constexpr, tile, TMA: tl.constexpr):
    """Write a tile of a tensor [rows, COLS]."""
    if TMA:
        t_p.store([row, col], tile.to(t_p.dtype))
    else:
        r = row + tl.arange(0, tile.shape[0])[:, None]
        c = col + tl.arange(0, tile.shape[1])[None, :]
        tl.store(t_p + r.to(tl.int64) * t_s + c, tile.to(t_p.dtype.element_ty), (r < rows) & (c < COLS))


@triton.jit
def _columns(v_p, col, N: tl.constexpr, BN: tl.constexpr):
    """[1, BN] of a vector [N], in float32."""
    c = col + tl.arange(0, BN)[None, :]
    return tl.load(v_p + c, c < N, 0.0).to(tl.float32)


@triton.jit
def _halves(tile):
    """[BM, BN] -> left and right, without a change of layout."""
    BM: tl.constexpr = tile.shape[0]
    BN: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _piece(tile, i: tl.constexpr, PIECES: tl.constexpr):
    """The i-th of two or four pieces of a tile's columns. An epilogue takes one at a time, for fewer registers."""
    left, right = _halves(tile)
    if PIECES == 2:
        return left if i == 0 else right
    else:
        first, second = _halves(left if i < 2 else right)
        return first if i % 2 == 0 else second


@triton.jit
def _product(
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
        a = _read(a_p, a_s, row, k, M, K, BM, BK, TMA)
        b = _read_weight(b_p, b_s, col, k, N, K, BN, BK, PAIR, TMA)
        total = tl.dot(a, b.T, total, input_precision="ieee")
    return total


@triton.jit
def _write_moments(moments_p, x, part, row, col, M, N: tl.constexpr, RMS: tl.constexpr):
    """Of x's columns inside N, row by row: the mean, and the sum of squares about it (RMS: about zero)."""
    r = row + tl.arange(0, x.shape[0])
    to = moments_p + 2 * part * M.to(tl.int64) + r
    if not RMS:
        mean = tl.sum(x, 1) / tl.minimum(tl.maximum(N - col, 1), x.shape[1])
        tl.store(to, mean, r < M)
        x = tl.where(col + tl.arange(0, x.shape[1])[None, :] < N, x - mean[:, None], 0.0)
    tl.store(to + M, tl.sum(x * x, 1), r < M)


@triton.jit
def _read_moments(moments_p, row, M, eps, W: tl.constexpr, PART: tl.constexpr, BM: tl.constexpr, RMS: tl.constexpr):
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
def _rounded(tile, like_p, TMA: tl.constexpr):
    """A tile in the dtype of a tensor."""
    return tile.to(like_p.dtype if TMA else like_p.dtype.element_ty)


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
    row, col = _place(M, W, BM, BN)
    first, second = _halves(_product(a_p, a_s, m_p, m_s, row, col, M, W, W, BM, BN, BK, True, TMA))
    mean, rstd = _read_moments(moments_p, row, M, eps, W, PART, BM, RMS)
    for i in tl.static_range(BN // BP):
        c = col + i * BP
        scale, shift = _piece(second, i, BN // BP), _piece(first, i, BN // BP)  # [BM, BP] each
        if SCALE_FIRST:
            scale, shift = shift, scale
        if mbias_p is not None:
            scale += _columns(mbias_p + (0 if SCALE_FIRST else W), c, W, BP)
            shift += _columns(mbias_p + (W if SCALE_FIRST else 0), c, W, BP)
        if scale_p is not None:
            _write(scale_p, scale_s, row, c, M, W, scale, TMA)
        x = _read(x_p, x_s, row, c, M, W, BM, BP, TMA).to(tl.float32)
        h = (x - mean[:, None]) * rstd[:, None]
        if weight_p is not None:
            h *= _columns(weight_p, c, W, BP)
        if bias_p is not None:
            h += _columns(bias_p, c, W, BP)
        _write(h_p, h_s, row, c, M, W, h * (1 + scale) + shift, TMA)


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
    row, col = _place(M, H, BM, BN)
    total = _product(h_p, h_s, w_p, w_s, row, col, M, H, K, BM, BN, BK, GATED, TMA)
    if GATED:
        gates, ups = _halves(total)
    else:
        gates, ups = total, total
    for i in tl.static_range(BN // BP):
        c = col + i * BP
        p = _piece(gates, i, BN // BP)  # [BM, BP]
        if bias_p is not None:
            p += _columns(bias_p, c, H, BP)
        p = _rounded(p, u_p, TMA)  # as it is kept: the backward pass makes the same u of it
        if p_p is not None:
            _write(p_p, p_s, row, c, M, H, p, TMA)
        u = p.to(tl.float32) * sigmoid(p, p.to(tl.float32))
        if GATED:
            up = _piece(ups, i, BN // BP)
            if bias_p is not None:
                up += _columns(bias_p + H, c, H, BP)
            up = _rounded(up, u_p, TMA)
            if up_p is not None:
                _write(up_p, p_s, row, c, M, H, up, TMA)
            u *= up.to(tl.float32)
        _write(u_p, u_s, row, c, M, H, u, TMA)


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
    row, col = _place(M, W, BM, BN)
    gates = _product(a_p, a_s, g_p, g_s, row, 2 * W + col, M, 3 * W, W, BM, BN, BK, False, TMA)
    if gbias_p is not None:
        gates += _columns(gbias_p, 2 * W + col, 3 * W, BN)
    gates = _rounded(gates, sum_p, TMA)  # half the registers, while the second product is made
    qs = _product(u_p, u_s, w_p, w_s, row, col, M, W, H, BM, BN, BK, False, TMA)
    for i in tl.static_range(BN // BP):
        c = col + i * BP
        gate, q = _piece(gates, i, BN // BP), _piece(qs, i, BN // BP)  # [BM, BP] each
        if bias_p is not None:
            q += _columns(bias_p, c, W, BP)
        if gate_p is not None:
            _write(gate_p, gate_s, row, c, M, W, gate, TMA)
        if q_p is not None:
            _write(q_p, q_s, row, c, M, W, q, TMA)
        x = _read(x_p, x_s, row, c, M, W, BM, BP, TMA).to(tl.float32)
        x = _rounded(x + gate.to(tl.float32) * q, sum_p, TMA)
        _write(sum_p, sum_s, row, c, M, W, x, TMA)
        # of the rounded sum, which is what the next norm is given
        _write_moments(moments_p, x.to(tl.float32), c // BP, row, c, M, W, RMS)


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
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    TMA: tl.constexpr,
):
    """dp (and dup) from du = dq @ w [K, H], u once more, and the tile's sums over rows, [row tiles, H or 2H]."""
    row, col = _place(M, H, BM, BN)
    dus = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK):
        dq = _read(dq_p, dq_s, row, k, M, K, BM, BK, TMA)
        w = _read(w_p, w_s, k, col, K, H, BK, BN, TMA)
        dus = tl.dot(dq, w, dus, input_precision="ieee")
    sums_p = partial_p + (row // BM).to(tl.int64) * (2 * H if GATED else H)
    for i in tl.static_range(BN // BP):
        c = col + i * BP
        columns = c + tl.arange(0, BP)
        du = _piece(dus, i, BN // BP)  # [BM, BP]
        p = _read(p_p, p_s, row, c, M, H, BM, BP, TMA)
        s = sigmoid(p, du)
        u = p.to(tl.float32) * s
        dp = du * (s + u * (1 - s))
        if GATED:
            up = _read(up_p, p_s, row, c, M, H, BM, BP, TMA).to(tl.float32)
            dup = du * u
            _write(dup_p, dp_s, row, c, M, H, dup, TMA)
            tl.store(sums_p + H + columns, tl.sum(dup, 0), columns < H)
            dp *= up
            u *= up
        _write(dp_p, dp_s, row, c, M, H, dp, TMA)
        _write(u_p, u_s, row, c, M, H, u, TMA)
        tl.store(sums_p + columns, tl.sum(dp, 0), columns < H)


@triton.jit(do_not_specialize=["M"])
def moments_kernel(x_p, moments_p, x_s, M, W: tl.constexpr, RMS: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr):
    """The moments [1, 2, M] of whole rows."""
    row = tl.program_id(0) * BM
    x = _read(x_p, x_s, row, 0, M, W, BM, BW, False).to(tl.float32)
    _write_moments(moments_p, x, 0, row, 0, M, W, RMS)


class Moments(NamedTuple):
    """Mean and sum of squares about it, float32 [parts, 2, R], of parts of so many `columns` of each of R rows."""

    values: Tensor
    columns: int


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


class _Plan:
    """How a product is made on a kind of GPU, and what its kernel takes for its tensors."""

    def __init__(self, tile: Tile, tma: bool, kinds: dict[str, str]) -> None:
        self.tile, self.kinds = tile, kinds
        self.describe = self._describe if tma else None
        blocks = {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "BP": tile.piece, "TMA": tma}
        self.constants: dict[str, Any] = {**blocks, "num_warps": tile.warps, "num_stages": tile.stages}

    def grid(self, rows: int, columns: int) -> tuple[int]:
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


# how the products' operands are read and written: A "left" in [BM, BK], B [N, K] as a "weight" in [BN, BK], both halves
# of [2N, K] as a "pair" or the first two thirds of [3K, K] as a "first pair", read as [2, N, K] in [2, BN, BK]; B
# "turned" [K, N] in [BK, BN]; and "rows", of which the epilogue takes [BM, BP] at a time
_ROWS = dict.fromkeys(
    ("x_p", "h_p", "scale_p", "p_p", "up_p", "gate_p", "q_p", "sum_p", "dp_p", "dup_p", "u_p"), "rows"
)
_UP = {**_ROWS, "h_p": "left", "w_p": "weight"}
_DOWN_BACKWARD = {**_ROWS, "dq_p": "left", "w_p": "turned"}
_KINDS = {
    "modulated": {**_ROWS, "a_p": "left", "m_p": "first pair"},
    "up": _UP,
    "gated up": {**_UP, "w_p": "pair"},
    "down": {**_ROWS, "a_p": "left", "g_p": "weight", "u_p": "left", "w_p": "weight"},
    "down backward": _DOWN_BACKWARD,
    "gated down backward": _DOWN_BACKWARD,
}


@lru_cache
def _plan_of(name: str, tile: Tile, tma: bool) -> _Plan:
    return _Plan(tile, tma, _KINDS[name])


def _plan(name: str, like: Tensor, small: bool) -> _Plan:
    """Of a product of tensors on a device."""
    made = ARCHITECTURES[architecture(like.device)]
    tiles = made.small if small and made.small else made.tiles
    return _plan_of(name, tiles[name], made.tma)


_launch_moments = Launch(moments_kernel)
_launch_modulated = Launch(modulation_kernel)
_launch_up = Launch(up_kernel)
_launch_down = Launch(down_kernel)
_launch_down_backward = Launch(down_backward_kernel)


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
    plan = _plan("modulated", x, small)
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
    plan = _plan("gated up" if gated else "up", h, small)
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
    plan = _plan("down", x, small)
    parts = cdiv(width, plan.tile.columns) * (plan.tile.columns // plan.tile.piece)
    if done is not None and done.values.shape == (parts, 2, rows):
        values = done.values
    else:
        values = torch.empty(parts, 2, rows, dtype=torch.float32, device=x.device)
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
    dq: Tensor, weight: Tensor, p: Tensor, small: bool = False, sums: ProgramSums | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `down_backward_kernel`.

    Args:
        dq: gradient of the MLP's output, [R, W].
        weight: of its second layer, [W, H].
        p: what its first layer made, [R, H or 2H].
        small: as above.
        sums: where dp's are added up together with those of other launches.

    Returns:
        dp like p, u [R, H], and dp's sums over rows [H or 2H] in float32; these are there when `sums` are added up.
    """
    rows, hidden = dq.shape[0], weight.shape[1]
    gated = p.shape[1] != hidden
    plan = _plan("gated down backward" if gated else "down backward", dq, small)
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
        **plan.constants,
    )
    return dp, u, partial.sum(0) if total is None else total
