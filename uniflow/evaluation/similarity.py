"""How close a reconstruction is: PSNR and SSIM per picture. Needs torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

_SSIM_WINDOW = 11  # pixels, of torchmetrics' Gaussian window; it pads by reflection and so needs more pixels than half


def psnr(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(255² / mean squared error), one a picture; infinite for equal ones.

    The error is that of a picture's 8-bit values, over all of them and the three channels.

    Args:
        reconstructions, originals: uint8 [B, 3, H, W].

    Returns:
        [B], float32.
    """
    a, b = reconstructions.float() / 255, originals.float() / 255
    return torch.stack([peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in zip(a, b, strict=True)])


def ssim(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity, one a picture; NaN for pictures smaller than its window of 11 pixels.

    Of each channel by itself, in a Gaussian window of 11 x 11 pixels and standard deviation 1.5 around each pixel, the
    picture reflected at its borders, with K1 = 0.01, K2 = 0.03 and a range of 255; then the mean over pixels and
    channels.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004), for grey
    pictures and without borders; as torchmetrics has it for colours.

    Args:
        reconstructions, originals: uint8 [B, 3, H, W].

    Returns:
        [B], float32.
    """
    a, b = reconstructions.float() / 255, originals.float() / 255
    if min(originals.shape[-2:]) < _SSIM_WINDOW:
        return a.new_full((len(originals),), float("nan"))
    values = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)
    return values.reshape(len(originals))
