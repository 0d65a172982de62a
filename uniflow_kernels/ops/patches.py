"""Patches: images to one row of pixels per token and back, in the official order (channel, row, column)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uniflow_kernels import cpu_kernels, cuda_kernels, triton_kernels
from uniflow_kernels.choice import requested
from uniflow_kernels.ops.registration import is_watched, kernels_for, register
from uniflow_kernels.torch_private import constant, is_forward_mode


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into rows of pixels, one row a token.

    Args:
        images: [B, C, H, W], any dtype; H and W are multiples of `patch_size`.
        patch_size: P, in pixels.

    Returns:
        [B, N, C*P*P] with N = (H/P)*(W/P) tokens in raster order; a row is ordered (channel, row, column).

    Raises:
        ValueError: if `images` is not 4-D, the patch does not divide it or is less than 1.

    Source: `p2l_transform_tensor` of the official release.
    """
    if images.ndim != 4:
        raise ValueError(f"images: expected 4 dimensions [B, C, H, W], got shape {tuple(images.shape)}")
    check_patch_size(patch_size)
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"images: height and width must be multiples of the patch ({patch_size}), got {height}x{width}"
        )
    if _is_plain(images.device, is_watched(images)):
        return plain_patchify(images, patch_size)
    return patchify_op(images, patch_size)


def unpatchify(rows: Tensor, patch_size: int, size: tuple[int, int] | None = None) -> Tensor:
    """Put rows of pixels back together into images; the inverse of `patchify`.

    Args:
        rows: [B, N, C*P*P], any dtype.
        patch_size: P, in pixels.
        size: (H, W) of the images in pixels; without it the images are square.

    Returns:
        [B, C, H, W].

    Raises:
        ValueError: if `rows` is not 3-D, a row is no multiple of P*P, P is less than 1, or N does not fit `size`.

    Source: `l2p_transform_tensor` of the official release (which knows only squares).
    """
    check_patch_size(patch_size)
    if rows.ndim != 3 or rows.shape[-1] % (patch_size * patch_size):
        raise ValueError(f"rows: expected [B, N, C*{patch_size}*{patch_size}], got shape {tuple(rows.shape)}")
    down, across = patch_grid(rows.shape[1], patch_size, size)
    if _is_plain(rows.device, is_watched(rows)):
        return plain_unpatchify(rows, patch_size, down, across)
    return unpatchify_op(rows, patch_size, down, across)


def check_patch_size(patch_size: int) -> None:
    """Raise a ValueError unless a patch has pixels."""
    if patch_size < 1:
        raise ValueError(f"patch_size: expected a positive number of pixels, got {patch_size}")


def patch_grid(tokens: int, patch_size: int, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Rows and columns of the patch grid that `tokens` tokens form: that of `size` (H, W in pixels), else a square.

    Raises:
        ValueError: if `size` is no multiple of the patch, or `tokens` does not fit it, or is no square without it.
    """
    if size is None:
        side = round(tokens**0.5)  # math.isqrt cannot be compiled for any number
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


# --- in plain PyTorch ---


def plain_patchify(images: Tensor, patch_size: int) -> Tensor:
    """`patchify` by views and one copy."""
    cut = _cut(images, patch_size)
    batch, channels, down, _, across, _ = cut.shape
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, down * across, channels * patch_size**2)


def plain_unpatchify(rows: Tensor, patch_size: int, down: int, across: int) -> Tensor:
    """`unpatchify` by views and one copy."""
    cut = _cut_rows(rows, down, across, patch_size)
    return cut.reshape(*cut.shape[:2], down * patch_size, across * patch_size)


def patches_into(rows: Tensor, images: Tensor, patch_size: int) -> None:
    """`patchify` into memory that is there, in its dtype: rows [B, N, C*P*P], of any strides."""
    cut = _cut(images, patch_size)
    _cut_rows(rows, cut.shape[2], cut.shape[4], patch_size).copy_(cut)


def _cut(images: Tensor, patch_size: int) -> Tensor:
    """A view [B, C, H/P, P, W/P, P]."""
    batch, channels, height, width = images.shape
    return images.view(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)


def _cut_rows(rows: Tensor, down: int, across: int, patch_size: int) -> Tensor:
    """The same view of rows: [B, C, down, P, across, P]."""
    channels = rows.shape[2] // patch_size**2
    cut = rows.view(rows.shape[0], down, across, channels, patch_size, patch_size)
    return cut.permute(0, 3, 1, 4, 2, 5)


# --- registered ops: each is the other's gradient ---


@constant
def _is_plain(device: torch.device, watched: bool) -> bool:
    """Whether nothing but plain PyTorch moves patches on this device. A compiled graph keeps the answer.

    Asked before the registered op and not inside it, so that the plain form stays open to torch.compile, torch.func and
    double backward; on a CPU wherever they look on (`watched`), unless a backend is asked for.
    """
    if device.type == "cpu" and requested() == "auto" and (watched or is_forward_mode()):
        return True
    return _kernels("patchify", device) is None


def _kernels(op: str, device: torch.device, channels: int = 1, patch_size: int = 1, itemsize: int = 4) -> Any:
    """The module whose kernels move such patches, or None for plain PyTorch. The dtype does not count, but its size."""

    def why_not(name: str) -> str | None:
        size = None if itemsize <= 8 else f"it moves elements of up to 8 bytes, not of {itemsize}"
        if name == "cpu":
            return cpu_kernels.why_not_on(device) or size
        if name == "triton":
            return triton_kernels.why_not_on(device, torch.float32) or size
        reason = cuda_kernels.why_not_on(device) or size
        return reason or cuda_kernels.why_not_patch(channels, patch_size, itemsize=itemsize)

    return kernels_for(op, "patches", device, why_not)


def _patchify(images: Tensor, patch_size: int) -> Tensor:
    images = images.resolve_conj().resolve_neg()  # what moves elements does not see how they are meant
    rows = _patchify_fake(images, patch_size)
    kernels = _kernels("patchify", images.device, images.shape[1], patch_size, images.itemsize)
    if kernels is None:
        patches_into(rows, images, patch_size)
    else:
        kernels.patchify(images, rows, patch_size)
    return rows


def _patchify_fake(images: Tensor, patch_size: int) -> Tensor:
    batch, channels, height, width = images.shape
    return images.new_empty(batch, (height // patch_size) * (width // patch_size), channels * patch_size**2)


def _patchify_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, ctx.patch_size = inputs
    ctx.grid = images.shape[2] // ctx.patch_size, images.shape[3] // ctx.patch_size


def _patchify_backward(ctx: Any, incoming: Tensor) -> dict[str, Any]:
    return {"images": unpatchify_op(incoming, ctx.patch_size, *ctx.grid)}


patchify_op = register(
    "patchify(Tensor images, SymInt patch_size) -> Tensor",
    _patchify,
    _patchify_fake,
    _patchify_setup,
    _patchify_backward,
    linear=True,
)


def _unpatchify(rows: Tensor, patch_size: int, down: int, across: int) -> Tensor:
    rows = rows.resolve_conj().resolve_neg()
    images = _unpatchify_fake(rows, patch_size, down, across)
    kernels = _kernels("unpatchify", rows.device, images.shape[1], patch_size, rows.itemsize)
    if kernels is None:
        _cut(images, patch_size).copy_(_cut_rows(rows, down, across, patch_size))
    else:
        kernels.unpatchify(rows, images, patch_size)
    return images


def _unpatchify_fake(rows: Tensor, patch_size: int, down: int, across: int) -> Tensor:
    return rows.new_empty(
        rows.shape[0], rows.shape[2] // (patch_size * patch_size), down * patch_size, across * patch_size
    )


def _unpatchify_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.patch_size, *_ = inputs


def _unpatchify_backward(ctx: Any, incoming: Tensor) -> dict[str, Any]:
    return {"rows": patchify_op(incoming, ctx.patch_size)}


unpatchify_op = register(
    "unpatchify(Tensor rows, SymInt patch_size, SymInt down, SymInt across) -> Tensor",
    _unpatchify,
    _unpatchify_fake,
    _unpatchify_setup,
    _unpatchify_backward,
    linear=True,
)
