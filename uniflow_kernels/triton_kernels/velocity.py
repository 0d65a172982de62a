"""x_t and the velocity loss: a program takes neighbouring tokens and goes over the columns of their rows.

Four columns of a block share a counter of the noise, and are four neighbours in memory. Row lengths and strides of rows
come in units of UNIT elements: multiplied by a constant, they tell the compiler how wide an access may be.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniflow_kernels.triton_kernels import unit_of
from uniflow_kernels.triton_kernels.noise import key_of, normals, words_of
from uniflow_kernels.triton_kernels.patches import first_pixels, pixels_of

_TOKENS = 16
_QUADS = 32  # 128 columns: 588 take five blocks
_WARPS = 4


@triton.jit
def _ends(
    images, scale_and_shift, noise, seed, key0, key1, offset0, offset1, noise_rows, at, base, start, inside, length,
    stride_channel, stride_row, stride_column,
    PATCH: tl.constexpr, NORMALIZED: tl.constexpr, SEEDED: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """x1 and x0 [G, C] in float32 of the columns from `start`; `inside` [G, C] says what exists.

    `at` and `base` [G] are the offsets of each token's first pixel and of its row of noise; seeded noise has the rows
    `noise_rows` [G] of its seed.
    """
    columns = start + tl.arange(0, QUADS * 4)  # [C]
    channel, offsets = pixels_of(columns, stride_channel, stride_row, stride_column, PATCH)
    x1 = tl.load(images + at[:, None] + offsets[None, :], inside, other=0).to(tl.float32)
    if NORMALIZED:
        scale = tl.load(scale_and_shift + 2 * channel, columns < length, other=0)  # [C]
        shift = tl.load(scale_and_shift + 2 * channel + 1, columns < length, other=0)
        x1 = x1 * scale[None, :] + shift[None, :]
    if SEEDED:
        key0, key1 = key_of(seed, key0, key1)
        number = noise_rows[:, None] * ((length + 3) // 4) + (start // 4 + tl.arange(0, QUADS))[None, :]  # [G, C/4]
        x0 = normals(number, key0, key1, offset0, offset1)
    else:
        x0 = tl.load(noise + base[:, None] + columns[None, :], inside, other=0).to(tl.float32)
    return x1, x0


@triton.jit(do_not_specialize=["key0", "key1", "offset0", "offset1", "first_row"])
def interpolate_kernel(
    images, scale_and_shift, t, noise, x_t, seed, key0, key1, offset0, offset1, first_row,
    tokens_in_all, batch, down, across, length, columns,
    stride_image, stride_channel, stride_row, stride_column, noise_row, noise_token,
    PATCH: tl.constexpr, NORMALIZED: tl.constexpr, SEEDED: tl.constexpr, T_PER_TOKEN: tl.constexpr,
    UNIT: tl.constexpr, TOKENS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """x_t [k*B*N, columns] of TOKENS tokens a program."""
    length *= UNIT
    columns *= UNIT
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [G]
    noise_rows = tokens + first_row
    exists = tokens < tokens_in_all
    row, token, at = first_pixels(tokens, batch, down, across, stride_image, stride_row, stride_column, PATCH)
    base = (row * noise_row + token * noise_token) * UNIT
    time = tl.load(t + (tokens if T_PER_TOKEN else row), exists, other=0)[:, None]
    for start in range(0, columns, QUADS * 4):
        column = start + tl.arange(0, QUADS * 4)  # [C]
        inside = exists[:, None] & (column < length)[None, :]  # [G, C]
        x1, x0 = _ends(
            images, scale_and_shift, noise, seed, key0, key1, offset0, offset1, noise_rows, at, base, start, inside,
            length, stride_channel, stride_row, stride_column, PATCH, NORMALIZED, SEEDED, QUADS,
        )  # fmt: skip
        value = tl.where(inside, x1 * time + x0 * (1.0 - time), 0.0)
        place = tokens[:, None] * columns + column[None, :]
        tl.store(x_t + place, value.to(x_t.dtype.element_ty), exists[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["key0", "key1", "offset0", "offset1", "first_row"])
def velocity_loss_kernel(
    velocity, images, scale_and_shift, noise, coefficients, coefficient, gradient, losses,
    seed, key0, key1, offset0, offset1, first_row, tokens_in_all, batch, down, across, length, columns,
    stride_image, stride_channel, stride_row, stride_column, noise_row, noise_token, velocity_row, velocity_token,
    PATCH: tl.constexpr, NORMALIZED: tl.constexpr, SEEDED: tl.constexpr, PER_TOKEN: tl.constexpr,
    GRADIENT: tl.constexpr, UNIT: tl.constexpr, TOKENS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Each token's loss, and its gradient [k*B*N, columns], of TOKENS tokens a program."""
    length *= UNIT
    columns *= UNIT
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [G]
    noise_rows = tokens + first_row
    exists = tokens < tokens_in_all
    row, token, at = first_pixels(tokens, batch, down, across, stride_image, stride_row, stride_column, PATCH)
    base = (row * noise_row + token * noise_token) * UNIT
    velocity_base = (row * velocity_row + token * velocity_token) * UNIT
    if PER_TOKEN:
        factor = tl.load(coefficients + tokens, exists, other=0)  # [G]
    else:
        factor = tl.zeros((TOKENS,), tl.float32) + coefficient
    counts = exists & (factor != 0)  # a token that does not count may hold anything
    sums = tl.zeros((TOKENS, QUADS * 4), tl.float32)
    for start in range(0, columns, QUADS * 4):
        column = start + tl.arange(0, QUADS * 4)  # [C]
        inside = counts[:, None] & (column < length)[None, :]  # [G, C]
        x1, x0 = _ends(
            images, scale_and_shift, noise, seed, key0, key1, offset0, offset1, noise_rows, at, base, start, inside,
            length, stride_channel, stride_row, stride_column, PATCH, NORMALIZED, SEEDED, QUADS,
        )  # fmt: skip
        v = tl.load(velocity + velocity_base[:, None] + column[None, :], inside, other=0).to(tl.float32)
        error = tl.where(inside, v + (x0 - x1), 0.0)
        sums += error * error
        if GRADIENT:
            place = tokens[:, None] * columns + column[None, :]
            value = (2.0 * factor)[:, None] * error
            written = exists[:, None] & (column < columns)[None, :]
            tl.store(gradient + place, value.to(gradient.dtype.element_ty), written)
    tl.store(losses + tokens, factor * tl.sum(sums, 1), exists)


def interpolate(
    images: Tensor, t: Tensor, noise: Tensor | None, scale_and_shift: Tensor | None, seed: int | Tensor, offset: int,
    first_row: int, patch_size: int, repeats: int, columns: int, x_t: Tensor,
) -> None:  # fmt: skip
    """Write x_t [k*B, N, columns]."""
    if not x_t.numel():
        return
    numbers, _, flags = _source(images, noise, scale_and_shift, patch_size, x_t)
    with torch.cuda.device_of(images):
        interpolate_kernel[(triton.cdiv(x_t.shape[0] * x_t.shape[1], _TOKENS),)](
            images, scale_and_shift, t.float().contiguous(), noise, x_t, *words_of(seed, offset), first_row,
            *numbers, T_PER_TOKEN=t.ndim == 2, **flags,
        )  # fmt: skip


def velocity_loss(
    velocity: Tensor, images: Tensor, noise: Tensor | None, coefficients: Tensor | float,
    scale_and_shift: Tensor | None, seed: int | Tensor, offset: int, first_row: int, patch_size: int, repeats: int,
    gradient: Tensor | None, losses: Tensor,
) -> None:  # fmt: skip
    """Write each token's loss [k*B, N], and the gradient of their sum unless it is None."""
    if not velocity.numel():
        return
    numbers, strides, flags = _source(images, noise, scale_and_shift, patch_size, velocity, *velocity.stride()[:2])
    factors = (coefficients.contiguous(), 0.0) if isinstance(coefficients, Tensor) else (None, coefficients)
    with torch.cuda.device_of(images):
        velocity_loss_kernel[(triton.cdiv(losses.numel(), _TOKENS),)](
            velocity, images, scale_and_shift, noise, *factors, gradient, losses,
            *words_of(seed, offset), first_row, *numbers, *strides,
            PER_TOKEN=factors[0] is not None, GRADIENT=gradient is not None, **flags,
        )  # fmt: skip


def _source(
    images: Tensor, noise: Tensor | None, scale_and_shift: Tensor | None, patch_size: int, rows: Tensor,
    *row_strides: int,
) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:  # fmt: skip
    """The kernels' numbers, `row_strides` in units, and the constants."""
    batch, channels, height, width = images.shape
    length, columns = channels * patch_size**2, rows.shape[2]
    noise_strides = (0, 0) if noise is None else noise.stride()[:2]
    in_elements = (length, columns, *noise_strides, *row_strides)
    unit = unit_of(*in_elements)
    length, columns, *strides = (number // unit for number in in_elements)
    shape = (batch, height // patch_size, width // patch_size, length, columns)
    numbers = (rows.shape[0] * rows.shape[1], *shape, *images.stride(), *strides[:2])
    flags = {
        "PATCH": patch_size,
        "NORMALIZED": scale_and_shift is not None,
        "SEEDED": noise is None,
        "UNIT": unit,
        "TOKENS": _TOKENS,
        "QUADS": _QUADS,
        "num_warps": _WARPS,
    }
    return numbers, tuple(strides[2:]), flags
