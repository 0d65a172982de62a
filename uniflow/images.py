"""Pictures and tensors: reading, fitting to a size as the release does, ImageNet normalisation, writing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize(images: Tensor) -> Tensor:
    """Pixels to what the encoder reads: (pixels - mean) / std with ImageNet's mean and std.

    Args:
        images: [..., 3, H, W], uint8 in [0, 255] or float in [0, 1].

    Returns:
        Same shape; float32 for uint8, else the dtype of `images`.

    Source: the release's preprocessor_config.json.
    """
    if images.dtype == torch.uint8:
        images = images.float() / 255
    mean, std = _statistics(images)
    return (images - mean) / std


def denormalize(images: Tensor) -> Tensor:
    """The inverse of `normalize`: [..., 3, H, W] to pixels in [0, 1] (not clamped)."""
    mean, std = _statistics(images)
    return images * std + mean


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    if images.ndim < 3 or images.shape[-3] != 3 or not images.is_floating_point():
        raise ValueError(f"images: expected float or uint8 of shape [..., 3, H, W], got {images.dtype} {tuple(images.shape)}")
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std
