"""Patches: images to one row of pixels per token and back, in the official order (channel, row, column)."""

from __future__ import annotations

import math

from einops import rearrange
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into rows of pixels, one row a token.

    Args:
        images: [B, C, H, W], any dtype; H and W are multiples of `patch_size`.
        patch_size: P, in pixels.

    Returns:
        [B, N, C*P*P] with N = (H/P)*(W/P) tokens in raster order; a row is ordered (channel, row, column).

    Raises:
        ValueError: if `images` is not 4-D or the patch does not divide it.

    Source: `p2l_transform_tensor` of the official release.
    """
    if images.ndim != 4:
        raise ValueError(f"images: expected 4 dimensions [B, C, H, W], got shape {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"images: height and width must be multiples of the patch ({patch_size}), got {height}x{width}"
        )
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(rows: Tensor, patch_size: int, size: tuple[int, int] | None = None) -> Tensor:
    """Put rows of pixels back together into images; the inverse of `patchify`.

    Args:
        rows: [B, N, C*P*P], any dtype.
        patch_size: P, in pixels.
        size: (H, W) of the images in pixels; without it the images are square.

    Returns:
        [B, C, H, W].

    Raises:
        ValueError: if `rows` is not 3-D, a row is no multiple of P*P, or N does not fit `size`.

    Source: `l2p_transform_tensor` of the official release (which knows only squares).
    """
    if rows.ndim != 3 or rows.shape[-1] % (patch_size * patch_size):
        raise ValueError(f"rows: expected [B, N, C*{patch_size}*{patch_size}], got shape {tuple(rows.shape)}")
    height, width = patch_grid(rows.shape[1], patch_size, size)
    return rearrange(rows, "b (h w) (c p q) -> b c (h p) (w q)", h=height, w=width, p=patch_size, q=patch_size)


def patch_grid(tokens: int, patch_size: int, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Rows and columns of the patch grid that `tokens` tokens form: that of `size` (H, W in pixels), else a square.

    Raises:
        ValueError: if `size` is no multiple of the patch, or `tokens` does not fit it, or is no square without it.
    """
    if size is None:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"size: {tokens} tokens form no square grid; give size=(height, width) in pixels")
        return side, side
    height, width = size
    if height <= 0 or width <= 0 or height % patch_size or width % patch_size:
        raise ValueError(f"size: expected positive multiples of the patch ({patch_size}), got {height}x{width}")
    grid = height // patch_size, width // patch_size
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"size: {height}x{width} has {grid[0] * grid[1]} patches of {patch_size}, got {tokens} tokens")
    return grid
