"""x_t and the velocity loss: a program takes neighbouring tokens and goes over the columns of their rows.

The columns of a block are split into (channel, row, column) once for all its tokens; four of them share a counter of
the noise, and are four neighbours in memory. Row lengths and strides of rows come in units of UNIT elements: multiplied
by a constant, they tell the compiler how wide an access may be.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniflow_kernels.triton_kernels.noise import normals, words_of

_TOKENS = 16
_QUADS = 32  # 128 columns: 588 take five blocks
_WARPS = 4


@triton.jit
def _place(tokens, across, down, batch):
    """Token numbers among k*B*N to (row among k*B, token in the image, image, patch line, patch column)."""
    row = tokens // (across * down)
    token = tokens - row * (across * down)
    line = token // across
    return row, token, row % batch, line, token - line * across


@triton.jit
def _patches(
    images, at, columns, inside, length, scale_and_shift,
    stride_channel, stride_row, stride_column,
    PATCH: tl.constexpr, NORMALIZED: tl.constexpr,
):  # fmt: skip
    """x1 [G, C] in float32; `at` [G] is the offset of each token's first pixel, `inside` [G, C] what exists."""
    channel = columns // (PATCH * PATCH)
    within = columns - channel * (PATCH * PATCH)
    line = within // PATCH
    offset = channel * stride_channel + line * stride_row + (within - line * PATCH) * stride_column  # [C]
    x1 = tl.load(images + at[:, None] + offset[None, :], inside, other=0).to(tl.float32)
    if NORMALIZED:
        scale = tl.load(scale_and_shift + 2 * channel, columns < length, other=0)  # [C]
        shift = tl.load(scale_and_shift + 2 * channel + 1, columns < length, other=0)
        x1 = x1 * scale[None, :] + shift[None, :]
    return x1


@triton.jit
def _noise(
    noise, base, tokens, start, columns, inside, length, key0, key1, offset0, offset1,
    SEEDED: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """x0 [G, C] in float32, seeded or loaded from `base` [G]."""
    if SEEDED:
        quads = (length + 3) // 4
        number = tokens[:, None] * quads + (start // 4 + tl.arange(0, QUADS))[None, :]  # [G, C/4]
        return normals(number, key0, key1, offset0, offset1)
    else:
        return tl.load(noise + base[:, None] + columns[None, :], inside, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["key0", "key1", "offset0", "offset1"])
def interpolate_kernel(
    images, scale_and_shift, t, noise, x_t, key0, key1, offset0, offset1,
    tokens_in_all, batch, down, across, length, columns,
    stride_image, stride_channel, stride_row, stride_column, noise_row, noise_token,
    PATCH: tl.constexpr, NORMALIZED: tl.constexpr, SEEDED: tl.constexpr, T_PER_TOKEN: tl.constexpr,
    UNIT: tl.constexpr, TOKENS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """x_t [k*B*N, columns] of TOKENS tokens a program."""
    length *= UNIT
    columns *= UNIT
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [G]
    exists = tokens < tokens_in_all
    row, token, image, line, left = _place(tokens, across, down, batch)
    at = image * stride_image + line * PATCH * stride_row + left * PATCH * stride_column
    base = (row * noise_row + token * noise_token) * UNIT
    time = tl.load(t + (tokens if T_PER_TOKEN else row), exists, other=0)[:, None]
    for start in range(0, columns, QUADS * 4):
        column = start + tl.arange(0, QUADS * 4)  # [C]
        inside = exists[:, None] & (column < length)[None, :]  # [G, C]
        x1 = _patches(
            images,
            at,
            column,
            inside,
            length,
            scale_and_shift,
            stride_channel,
            stride_row,
            stride_column,
            PATCH,
            NORMALIZED,
        )
        x0 = _noise(noise, base, tokens, start, column, inside, length, key0, key1, offset0, offset1, SEEDED, QUADS)
        value = tl.where(inside, x1 * time + x0 * (1.0 - time), 0.0)
        place = tokens[:, None] * columns + column[None, :]
        tl.store(x_t + place, value.to(x_t.dtype.element_ty), exists[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["key0", "key1", "offset0", "offset1"])
def velocity_loss_kernel(
    velocity, images, scale_and_shift, noise, coefficients, gradient, losses, key0, key1, offset0, offset1,
    tokens_in_all, batch, down, across, length, columns,
    stride_image, stride_channel, stride_row, stride_column, noise_row, noise_token, velocity_row, velocity_token,
    PATCH: tl.constexpr, NORMALIZED: tl.constexpr, SEEDED: tl.constexpr, PER_TOKEN: tl.constexpr,
    GRADIENT: tl.constexpr, UNIT: tl.constexpr, TOKENS: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Each token's loss, and its gradient [k*B*N, columns], of TOKENS tokens a program."""
    length *= UNIT
    columns *= UNIT
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [G]
    exists = tokens < tokens_in_all
    row, token, image, line, left = _place(tokens, across, down, batch)
    at = image * stride_image + line * PATCH * stride_row + left * PATCH * stride_column
    base = (row * noise_row + token * noise_token) * UNIT
    velocity_base = (row * velocity_row + token * velocity_token) * UNIT
    coefficient = tl.load(coefficients + (tokens if PER_TOKEN else tokens * 0), exists, other=0)  # [G]
    counts = exists & (coefficient != 0)  # a token that does not count may hold anything
    sums = tl.zeros((TOKENS, QUADS * 4), tl.float32)
    for start in range(0, columns, QUADS * 4):
        column = start + tl.arange(0, QUADS * 4)  # [C]
        inside = counts[:, None] & (column < length)[None, :]  # [G, C]
        x1 = _patches(
            images,
            at,
            column,
            inside,
            length,
            scale_and_shift,
            stride_channel,
            stride_row,
            stride_column,
            PATCH,
            NORMALIZED,
        )
        x0 = _noise(noise, base, tokens, start, column, inside, length, key0, key1, offset0, offset1, SEEDED, QUADS)
        v = tl.load(velocity + velocity_base[:, None] + column[None, :], inside, other=0).to(tl.float32)
        error = tl.where(inside, v + (x0 - x1), 0.0)
        sums += error * error
        if GRADIENT:
            place = tokens[:, None] * columns + column[None, :]
            value = (2.0 * coefficient)[:, None] * error
            written = exists[:, None] & (column < columns)[None, :]
            tl.store(gradient + place, value.to(gradient.dtype.element_ty), written)
    tl.store(losses + tokens, coefficient * tl.sum(sums, 1), exists)


def interpolate(
    images: Tensor, t: Tensor, noise: Tensor | None, scale_and_shift: Tensor | None, seed: int, offset: int,
    patch_size: int, repeats: int, columns: int, x_t: Tensor,
) -> None:  # fmt: skip
    """Write x_t [k*B, N, columns]."""
    if not x_t.numel():
        return
    numbers, _, flags = _source(images, noise, scale_and_shift, patch_size, x_t)
    with torch.cuda.device_of(images):
        interpolate_kernel[(triton.cdiv(x_t.shape[0] * x_t.shape[1], _TOKENS),)](
            images, scale_and_shift, t.float().contiguous(), noise, x_t, *words_of(seed, offset), *numbers,
            T_PER_TOKEN=t.ndim == 2, **flags,
        )  # fmt: skip


def velocity_loss(
    velocity: Tensor, images: Tensor, noise: Tensor | None, coefficients: Tensor, scale_and_shift: Tensor | None,
    seed: int, offset: int, patch_size: int, repeats: int, gradient: Tensor | None, losses: Tensor,
) -> None:  # fmt: skip
    """Write each token's loss [k*B, N], and the gradient of their sum unless it is None."""
    if not velocity.numel():
        return
    numbers, strides, flags = _source(images, noise, scale_and_shift, patch_size, velocity, *velocity.stride()[:2])
    with torch.cuda.device_of(images):
        velocity_loss_kernel[(triton.cdiv(losses.numel(), _TOKENS),)](
            velocity, images, scale_and_shift, noise, coefficients.contiguous(), gradient, losses,
            *words_of(seed, offset), *numbers, *strides,
            PER_TOKEN=coefficients.numel() > 1, GRADIENT=gradient is not None, **flags,
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
    unit = next(unit for unit in (8, 4, 1) if all(number % unit == 0 for number in in_elements))
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
