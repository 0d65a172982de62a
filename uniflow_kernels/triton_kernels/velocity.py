"""x_t and the velocity loss: a program takes neighbouring tokens and goes over the columns of their rows.

Four columns of a block share a counter of the noise, and are four neighbours in memory. Row lengths and strides of rows
come in units of UNIT elements: multiplied by a constant, they tell the compiler how wide an access may be.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniflow_kernels.source import Source
from uniflow_kernels.triton_kernels import unit_of
from uniflow_kernels.triton_kernels.launch import Launch, cdiv
from uniflow_kernels.triton_kernels.noise import key_of, normals, words_of
from uniflow_kernels.triton_kernels.patches import GRID, first_pixels, pixels_of

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


@triton.jit(do_not_specialize=["key0", "key1", "offset0", "offset1", "first_row", *GRID])
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


@triton.jit(do_not_specialize=["key0", "key1", "offset0", "offset1", "first_row", *GRID])
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


_launch_interpolate = Launch(interpolate_kernel)
_launch_velocity_loss = Launch(velocity_loss_kernel)


def interpolate(source: Source, scale_and_shift: Tensor | None, t: Tensor, x_t: Tensor) -> None:
    """Write x_t [k*B, N, columns]."""
    if not x_t.numel():
        return
    with torch.cuda.device_of(x_t):
        _launch_interpolate(
            (cdiv(x_t.shape[0] * x_t.shape[1], _TOKENS),),
            t=t.float().contiguous(),
            x_t=x_t,
            T_PER_TOKEN=t.ndim == 2,
            **_arguments(source, scale_and_shift, x_t),
        )


def velocity_loss(
    source: Source,
    scale_and_shift: Tensor | None,
    velocity: Tensor,
    coefficients: Tensor | float,
    gradient: Tensor | None,
    losses: Tensor,
) -> None:
    """Write each token's loss [k*B, N], and the gradient of their sum unless it is None."""
    if not velocity.numel():
        return
    each, every = (coefficients.contiguous(), 0.0) if isinstance(coefficients, Tensor) else (None, coefficients)
    of_row, of_token, _ = velocity.stride()
    with torch.cuda.device_of(velocity):
        _launch_velocity_loss(
            (cdiv(losses.numel(), _TOKENS),),
            velocity=velocity,
            coefficients=each,
            coefficient=float(every),
            gradient=gradient,
            losses=losses,
            PER_TOKEN=each is not None,
            GRADIENT=gradient is not None,
            **_arguments(source, scale_and_shift, velocity, velocity_row=of_row, velocity_token=of_token),
        )


def _arguments(source: Source, scale_and_shift: Tensor | None, rows: Tensor, **strides: int) -> dict[str, Any]:
    """What both kernels are given by name: tensors and numbers of the source, row lengths and strides in units.

    `rows` has the shape that is written or read; `strides` are further ones.
    """
    images, noise, (lines, across) = source.images, source.noise, source.grid
    count, tokens, columns = rows.shape
    noise_row, noise_token = (0, 0) if noise is None else noise.stride()[:2]
    numbers = {"length": source.length, "columns": columns, "noise_row": noise_row, "noise_token": noise_token}
    numbers.update(strides)
    unit = unit_of(*numbers.values())
    stride_image, stride_channel, stride_row, stride_column = images.stride()
    return {
        **{name: number // unit for name, number in numbers.items()},
        **words_of(source.seed, source.offset),
        "images": images,
        "scale_and_shift": scale_and_shift,
        "noise": noise,
        "first_row": source.first_row,
        "tokens_in_all": count * tokens,
        "batch": len(images),
        "down": lines,
        "across": across,
        "stride_image": stride_image,
        "stride_channel": stride_channel,
        "stride_row": stride_row,
        "stride_column": stride_column,
        "PATCH": source.patch_size,
        "NORMALIZED": scale_and_shift is not None,
        "SEEDED": noise is None,
        "UNIT": unit,
        "TOKENS": _TOKENS,
        "QUADS": _QUADS,
        "num_warps": _WARPS,
    }
