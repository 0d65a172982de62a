"""Philox 4x32-10 and Box-Muller as `uniflow_kernels.ops.noise` defines them."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniflow_kernels.triton_kernels import unit_of
from uniflow_kernels.triton_kernels.launch import Launch, cdiv

_ROWS = 16
_QUADS = 32  # 128 columns: 588 take five blocks
_WARPS = 4


@triton.jit
def philox(number, key0, key1, offset0, offset1):
    """Counters `number` (int64) to four uint32 words each."""
    c0 = number.to(tl.uint32)
    c1 = (number >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + offset0.to(tl.uint32, bitcast=True)
    c3 = tl.zeros_like(c0) + offset1.to(tl.uint32, bitcast=True)
    key0 = key0.to(tl.uint32, bitcast=True)
    key1 = key1.to(tl.uint32, bitcast=True)
    multiplier0 = tl.full((), 0xD2511F53, tl.uint32)
    multiplier1 = tl.full((), 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, multiplier0), c0 * multiplier0
        high1, low1 = tl.umulhi(c2, multiplier1), c2 * multiplier1
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 += tl.full((), 0x9E3779B9, tl.uint32)
        key1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def radius(x):
    """sqrt(-2 ln u), u = (x + 1/2) / 2^32 = m * 2^e; ln m by a polynomial that is exact in relative terms."""
    u = x.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = 0.07332145422697067 * f - 0.11659753322601318
    p = p * f + 0.11634723097085953
    p = p * f - 0.12396728992462158
    p = p * f + 0.1425115317106247
    p = p * f - 0.16669149696826935
    p = p * f + 0.2000068873167038
    p = p * f - 0.24999980628490448
    p = p * f + 0.3333333134651184
    log_m = f * f * (p * f - 0.5) + f
    return tl.sqrt(-2.0 * (exponent * 0.6931471805599453 + log_m))


@triton.jit
def direct(length, x):
    """`length` times (cosine, sine): the two upper bits of x are the quadrant, the others the angle in it."""
    angle = ((x & 0x3FFFFFFF).to(tl.int32, bitcast=True) - 0x20000000).to(tl.float32) * 1.4629180792671596e-9
    square = angle * angle
    s = 2.725000058489968e-06 * square - 0.00019840087043121457
    s = s * square + 0.008333331905305386
    s = s * square - 0.1666666716337204
    sine = (s * square * angle + angle) * length
    c = -2.7301013005853747e-07 * square + 2.4800601750030182e-05
    c = c * square - 0.00138888880610466
    c = c * square + 0.0416666679084301
    cosine = (square * (c * square - 0.5) + 1.0) * length
    odd = (x & 0x40000000) != 0
    sign = tl.where((x & 0x80000000) != 0, -1.0, 1.0)
    return tl.where(odd, -sine, cosine) * sign, tl.where(odd, cosine, sine) * sign


@triton.jit
def normals(number, key0, key1, offset0, offset1):
    """Four standard normals of each counter in `number` [..., Q], as [..., 4*Q] in their order."""
    x, y, z, w = philox(number, key0, key1, offset0, offset1)
    n0, n1 = direct(radius(x), y)
    n2, n3 = direct(radius(z), w)
    # join adds an innermost dimension: [.., Q, 2, 2] with the second pair's index last but one
    pairs = tl.join(tl.join(n0, n2), tl.join(n1, n3))
    return tl.reshape(pairs, (number.shape[0], number.shape[1] * 4))


@triton.jit
def key_of(seed, key0, key1):
    """The key: the words of what `seed` (a pointer, or a block of them) points to; the ones given where it is None."""
    if seed is not None:
        value = tl.load(seed)
        key0, key1 = value.to(tl.int32), (value >> 32).to(tl.int32)
    return key0, key1


@triton.jit(do_not_specialize=["first", "offset0", "offset1"])
def seeded_noise_kernel(
    seeds, noise, rows, in_group, first, columns, offset0, offset1,
    UNIT: tl.constexpr, ROWS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Noise [rows, columns]: ROWS rows and QUADS * 4 columns a program; a group of rows has a seed of its own."""
    columns *= UNIT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [R]
    exists = row < rows
    group = tl.where(exists, row, 0) // in_group
    key0, key1 = key_of(seeds + group, 0, 0)
    quad = tl.program_id(1) * QUADS + tl.arange(0, QUADS)  # [Q]
    number = (first + row - group * in_group)[:, None] * ((columns + 3) // 4) + quad[None, :]  # [R, Q]
    values = normals(number, key0[:, None], key1[:, None], offset0, offset1)  # [R, 4*Q]
    column = tl.program_id(1) * QUADS * 4 + tl.arange(0, QUADS * 4)
    inside = exists[:, None] & (column < columns)[None, :]
    tl.store(noise + row[:, None] * columns + column[None, :], values, inside)


_launch = Launch(seeded_noise_kernel)


def seeded_noise(seeds: Tensor, offset: int, first_row: int, noise: Tensor) -> None:
    """Write the noise [rows, columns], contiguous."""
    if not noise.numel():
        return
    rows, columns = noise.shape
    unit = unit_of(columns)
    words = words_of(seeds, offset)
    with torch.cuda.device_of(noise):
        _launch(
            (cdiv(rows, _ROWS), cdiv(columns, _QUADS * 4)),
            seeds=seeds,
            noise=noise,
            rows=rows,
            in_group=rows // len(seeds),
            first=first_row,
            columns=columns // unit,
            offset0=words["offset0"],
            offset1=words["offset1"],
            UNIT=unit,
            ROWS=_ROWS,
            QUADS=_QUADS,
            num_warps=_WARPS,
        )


def words_of(seed: int | Tensor, offset: int) -> dict[str, Any]:
    """The kernels' arguments: `seed` if it is a tensor, and the signed 32-bit words of a number and of the offset.

    The size of a word makes no other kernel.
    """
    held, number = (seed, 0) if isinstance(seed, Tensor) else (None, seed)
    return {
        "seed": held,
        "key0": _signed(number & 0xFFFFFFFF),
        "key1": _signed(number >> 32),
        "offset0": _signed(offset & 0xFFFFFFFF),
        "offset1": _signed(offset >> 32),
    }


def _signed(word: int) -> int:
    return word - (word >> 31 << 32)
