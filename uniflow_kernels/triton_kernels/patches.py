"""Patches cut out of images, and put back: a program moves some columns of neighbouring tokens.

The columns of a block are split into (channel, row, column) once for all its tokens. Offsets are 64-bit numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from uniflow_kernels.triton_kernels import unit_of
from uniflow_kernels.triton_kernels.launch import Launch, cdiv

_TOKENS = 16
_COLUMNS = 128
_WARPS = 4
# a kernel is not compiled anew, for half a second, because one of these became 1 or a multiple of 16; `across` and the
# number of tokens stay out of it: without what is known of them the registers triple
GRID = ("batch", "down")


@triton.jit
def first_pixels(
    tokens, batch, down, across, stride_image, stride_row, stride_column,
    PATCH: tl.constexpr,
):  # fmt: skip
    """Token numbers (int64) among k*B*N to (row among k*B, token in the image, offset of the patch's first pixel)."""
    row = tokens // (down * across)
    token = tokens - row * (down * across)
    line = token // across
    left = token - line * across
    return row, token, (row % batch) * stride_image + line * PATCH * stride_row + left * PATCH * stride_column


@triton.jit
def pixels_of(columns, stride_channel, stride_row, stride_column, PATCH: tl.constexpr):
    """Columns of a row to their channels and their offsets from the first pixel."""
    channel = columns // (PATCH * PATCH)
    within = columns - channel * (PATCH * PATCH)
    line = within // PATCH
    left = within - line * PATCH
    return channel, channel.to(tl.int64) * stride_channel + (line * stride_row + left * stride_column)


@triton.jit(do_not_specialize=GRID)
def patches_kernel(
    images, rows, tokens_in_all, batch, down, across, length,
    stride_image, stride_channel, stride_row, stride_column, rows_image, rows_token, rows_column,
    PATCH: tl.constexpr, CUT: tl.constexpr, UNIT: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Images to rows if CUT, else rows to images: TOKENS tokens and COLUMNS columns a program."""
    length *= UNIT
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # [G]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [C]
    row, token, at = first_pixels(tokens, batch, down, across, stride_image, stride_row, stride_column, PATCH)
    base = (row * rows_image + token * rows_token) * UNIT
    places = rows + base[:, None] + columns.to(tl.int64)[None, :] * rows_column
    exists = tokens < tokens_in_all
    inside = exists[:, None] & (columns < length)[None, :]
    if CUT:
        # in a shape of their own, in which neighbouring threads have neighbouring pixels: in that of the rows a thread
        # has what it stores at once, and would load it one after the other, each time from the same sectors
        alone = tl.program_id(1) * COLUMNS + (tl.arange(0, COLUMNS // 32)[:, None] * 32 + tl.arange(0, 32)[None, :])
        _, offsets = pixels_of(alone, stride_channel, stride_row, stride_column, PATCH)
        found = tl.load(images + at[:, None, None] + offsets[None], exists[:, None, None] & (alone < length)[None])
        tl.store(places, tl.reshape(found, (TOKENS, COLUMNS)), inside)
    else:
        _, offsets = pixels_of(columns, stride_channel, stride_row, stride_column, PATCH)
        tl.store(images + at[:, None] + offsets[None, :], tl.load(places, inside), inside)


_launch = Launch(patches_kernel)


def patchify(images: Tensor, rows: Tensor, patch_size: int) -> None:
    """Write `rows` [B, N, C*P*P]."""
    _move(images, rows, patch_size, cut=True)


def unpatchify(rows: Tensor, images: Tensor, patch_size: int) -> None:
    """Write `images` [B, C, H, W]."""
    _move(images, rows, patch_size, cut=False)


def _move(images: Tensor, rows: Tensor, patch_size: int, cut: bool) -> None:
    if not rows.numel():
        return
    batch, _, height, width = images.shape
    tokens, length = rows.shape[0] * rows.shape[1], rows.shape[2]
    unit = unit_of(length, *rows.stride()[:2])
    with torch.cuda.device_of(images):
        _launch(
            (cdiv(tokens, _TOKENS), cdiv(length, _COLUMNS)),
            images=images,
            rows=rows,
            tokens_in_all=tokens,
            batch=batch,
            down=height // patch_size,
            across=width // patch_size,
            length=length // unit,
            stride_image=images.stride(0),
            stride_channel=images.stride(1),
            stride_row=images.stride(2),
            stride_column=images.stride(3),
            rows_image=rows.stride(0) // unit,
            rows_token=rows.stride(1) // unit,
            rows_column=rows.stride(2),
            PATCH=patch_size,
            CUT=cut,
            UNIT=unit,
            TOKENS=_TOKENS,
            COLUMNS=_COLUMNS,
            num_warps=_WARPS,
        )
