"""ImageNet normalisation, as in the release's preprocessor_config.json."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from uniflow_kernels.torch_private import constant

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(images: Tensor) -> Tensor:
    """Pixels to what the encoder reads: (pixels - mean) / std with ImageNet's mean and std.

    Args:
        images: [..., 3, H, W], uint8 in [0, 255] or float in [0, 1].

    Returns:
        Same shape; float32 for uint8, else the dtype of `images`.

    Raises:
        ValueError: for another shape or dtype.
    """
    if images.dtype == torch.uint8:
        images = images.float() / 255
    mean, std = _statistics(images)
    return (images - mean) / std


def denormalize(images: Tensor) -> Tensor:
    """The inverse of `normalize`: float [..., 3, H, W] to pixels in [0, 1], not clamped."""
    mean, std = _statistics(images)
    return images * std + mean


def to_uint8(images: Tensor) -> Tensor:
    """Normalised images [..., 3, H, W] to uint8 pixels, clamped and rounded."""
    return (denormalize(images.float()).clamp(0, 1) * 255).round().to(torch.uint8)


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    if images.ndim < 3 or images.shape[-3] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images: expected float or uint8 of shape [..., 3, H, W], got {images.dtype} {tuple(images.shape)}"
        )
    return _constants(images.device, images.dtype)


@constant  # compiled code holds them, and does not make them in each call
def _constants(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _made_once(device, dtype)


@lru_cache
def _made_once(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # made once a device: a copy to the GPU for each batch would wait for it; usable by autograd whoever comes first
    with torch.inference_mode(False):
        mean, std = (torch.tensor(values, device=device, dtype=dtype) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return mean.view(3, 1, 1), std.view(3, 1, 1)
