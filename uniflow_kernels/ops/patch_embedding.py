"""Patch embedding: a convolution whose stride is its kernel, as one product on the rows that `patchify` writes.

The weight of such a convolution, [D, C, P, P], is a matrix whose rows have the order of a patch's numbers. So the image
is read once for all that is made of its patches: `patchify` it, and hand the rows around.

Source: equation 1 of the ViT (Dosovitskiy et al. 2021), which is a product too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from uniflow_kernels.choice import requested
from uniflow_kernels.ops.flow_choice import UNMEASURED, dtype_of_products
from uniflow_kernels.ops.patches import patchify
from uniflow_kernels.torch_private import constant


def patch_embedding(
    images: Tensor, weight: Tensor, bias: Tensor | None = None, patches: Tensor | None = None
) -> Tensor:
    """Every patch of the images times a weight: what `conv2d(images, weight, bias, stride=P)` is, one row a token.

    Args:
        images: [B, C, H, W], in the dtype of the weight but under autocast; H and W are multiples of P.
        weight: [D, C, P, P].
        bias: [D].
        patches: `patchify(images, P)`, where that was made already: then the images are not read.

    Returns:
        [B, N, D] with N = (H/P)*(W/P) tokens in raster order. Differentiable in all of them.

    Raises:
        ValueError: if a shape does not fit the others.
    """
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight: expected shape [D, C, P, P], got {tuple(weight.shape)}")
    channels, patch = weight.shape[1:3]
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"images: expected shape [B, {channels}, H, W], got {tuple(images.shape)}")
    if patches is None:
        patches = patchify(images, patch)
    expected = (images.shape[0], (images.shape[2] // patch) * (images.shape[3] // patch), channels * patch * patch)
    if patches.shape != expected:
        raise ValueError(f"patches: expected shape {expected}, one row a patch, got {tuple(patches.shape)}")
    return F.linear(patches, weight.flatten(1), bias)


def embeds_by_product(weight: Tensor) -> bool:
    """Whether `patch_embedding` is the faster form with such a weight; else the convolution is."""
    return _is_faster(weight.device, dtype_of_products(weight))


def explain_patch_embedding(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """What serves on a device in a dtype, and why."""
    if not _is_faster(device, dtype):
        why = "that was faster in float32" if device.type == "cpu" else 'backend("eager")'
        return "a convolution", why
    return "a product on what patchify writes", "measured in docs/layers.md" if device.type == "cpu" else UNMEASURED


@constant
def _is_faster(device: torch.device, dtype: torch.dtype) -> bool:
    if requested() == "eager":
        return False
    # there oneDNN makes convolutions of all dtypes and products of half precision, and slower libraries the others
    return device.type != "cpu" or dtype in (torch.bfloat16, torch.float16)
