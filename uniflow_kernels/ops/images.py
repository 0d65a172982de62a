"""The end of a sampler: the last update, and rows of pixels put together into images that can be shown or written."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from uniflow_kernels import cpu_kernels, triton_kernels
from uniflow_kernels.choice import choose, requested
from uniflow_kernels.ops.patches import check_patch_size, patch_grid, unpatchify
from uniflow_kernels.ops.pixels import check_normalization, per_channel
from uniflow_kernels.ops.registration import is_watched, register
from uniflow_kernels.torch_private import constant, is_forward_mode, is_transforming


def to_images(
    rows: Tensor,
    patch_size: int,
    size: tuple[int, int] | None = None,
    *,
    velocity: Tensor | None = None,
    dt: float = 1.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    clamp: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Images of rows + dt * velocity, denormalised, clamped and converted in one pass.

    Args:
        rows: [B, N, C*P*P], float: the state before the last update, or pixels.
        patch_size: P, in pixels.
        size: (H, W) of the images in pixels; without it the images are square.
        velocity: [B, N, C*P*P], float; nothing is added if not given.
        dt: of the last update.
        mean, std: C numbers each: values become value * std + mean.
        clamp: whether to [0, 1].
        dtype: of the images; that of the rows if not given. torch.uint8 takes values in [0, 1], clamps them and stands
            for 255 times the value, rounded to the nearest (a tie to the even one).

    Returns:
        [B, C, H, W], contiguous; computed in float32 (float64 if the rows are). Differentiable unless uint8.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if the shapes do not fit together, or only one of mean and std is given.

    Source: `l2p_transform_tensor` of the official release after its sampler's last step, and the quick start's
    denormalisation.
    """
    dtype = rows.dtype if dtype is None else dtype
    height, width = _check(rows, patch_size, size, velocity, mean, std, dtype)
    tensors = [rows] if velocity is None else [rows, velocity]
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    read = tuple(tensor.dtype for tensor in tensors)
    if _served_by(rows.device, read, dtype, differentiated, is_watched(*tensors)) == "eager":
        return plain_to_images(rows, velocity, dt, mean, std, patch_size, (height, width), clamp, dtype)
    return to_images_op(rows, velocity, dt, mean, std, patch_size, height, width, clamp or dtype == torch.uint8, dtype)


def plain_to_images(
    rows: Tensor,
    velocity: Tensor | None,
    dt: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    patch_size: int,
    size: tuple[int, int],
    clamp: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`to_images` in plain PyTorch."""
    values = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if velocity is not None:
        values = torch.add(values, velocity, alpha=dt)
    images = unpatchify(values, patch_size, size)
    if mean is not None and std is not None:
        pairs = per_channel(tuple(zip(mean, std, strict=True)), images, images.dtype)[:, :, None, None]
        images = torch.addcmul(pairs[:, 0], images, pairs[:, 1])
    if dtype == torch.uint8:
        return images.clamp(0, 1).mul_(255).round_().to(dtype)
    return (images.clamp(0, 1) if clamp else images).to(dtype).contiguous()


def _check(
    rows: Tensor,
    patch_size: int,
    size: tuple[int, int] | None,
    velocity: Tensor | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> tuple[int, int]:
    """The height and width of the images in pixels."""
    check_patch_size(patch_size)
    if rows.ndim != 3 or rows.shape[-1] % (patch_size * patch_size):
        raise ValueError(f"rows: expected [B, N, C*{patch_size}*{patch_size}], got shape {tuple(rows.shape)}")
    if velocity is not None and velocity.shape != rows.shape:
        raise ValueError(f"velocity: expected shape {tuple(rows.shape)}, as rows, got {tuple(velocity.shape)}")
    for name, tensor in (("rows", rows), ("velocity", velocity)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating point dtype, got {tensor.dtype}")
    if not (dtype.is_floating_point or dtype == torch.uint8):
        raise TypeError(f"dtype: expected a floating point dtype or torch.uint8, got {dtype}")
    check_normalization(mean, std, rows.shape[-1] // (patch_size * patch_size))
    down, across = patch_grid(rows.shape[1], patch_size, size)
    return down * patch_size, across * patch_size


@constant
def _served_by(
    device: torch.device, read: tuple[torch.dtype, ...], written: torch.dtype, differentiated: bool, watched: bool
) -> str:
    """The backend, "triton", "cpu" or "eager"; chosen before the registered op: the plain form stays differentiable.

    On a CPU it also stays open to whoever looks on (`watched`), unless a backend is asked for.
    """
    reason = None
    if differentiated:
        reason = "a gradient is wanted, and the kernel has none"
    elif is_transforming() or is_forward_mode():
        reason = "the kernel has no rules for the transforms of torch.func, nor for dual numbers"
    cpu = cpu_kernels.why_not_images(device, read, written) or reason
    if requested() == "auto" and device.type == "cpu":  # Triton's interpreter must be asked for
        return "eager" if watched or cpu is not None else "cpu"
    triton = next((why for dtype in read if (why := triton_kernels.why_not_on(device, dtype))), None) or reason
    return choose("to_images", {"triton": triton, "cpu": cpu})


def _to_images(
    rows: Tensor,
    velocity: Tensor | None,
    dt: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    patch_size: int,
    height: int,
    width: int,
    clamp: bool,
    dtype: torch.dtype,
) -> Tensor:
    images = _to_images_fake(rows, velocity, dt, mean, std, patch_size, height, width, clamp, dtype)
    affine = None if mean is None or std is None else per_channel(tuple(zip(mean, std, strict=True)), rows)
    kernels: Any = cpu_kernels
    if rows.device.type != "cpu" or requested() == "triton":
        kernels = importlib.import_module("uniflow_kernels.triton_kernels.images")
    kernels.to_images(rows, velocity, dt, affine, patch_size, clamp, images)
    return images


def _to_images_fake(
    rows: Tensor,
    velocity: Tensor | None,
    dt: float,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    patch_size: int,
    height: int,
    width: int,
    clamp: bool,
    dtype: torch.dtype,
) -> Tensor:
    return rows.new_empty(rows.shape[0], rows.shape[2] // patch_size**2, height, width, dtype=dtype)


to_images_op = register(
    "to_images(Tensor rows, Tensor? velocity, float dt, float[]? mean, float[]? std, int patch_size, SymInt height, "
    "SymInt width, bool clamp, ScalarType dtype) -> Tensor",
    _to_images,
    _to_images_fake,
    tags=(torch.Tag.pt2_compliant_tag,),
)
