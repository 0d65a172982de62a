"""How close a reconstruction is: PSNR and SSIM per picture, and rFID where it can be computed. Needs torchmetrics."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance

_SSIM_WINDOW = 11  # pixels, of torchmetrics' Gaussian window; it pads by reflection and so needs more pixels than half


def psnr(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, one a picture; infinite for equal pictures.

    Args:
        reconstructions, originals: uint8 [B, 3, H, W].

    Returns:
        [B], float32.
    """
    a, b = reconstructions.float() / 255, originals.float() / 255
    return torch.stack([peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in zip(a, b, strict=True)])


def ssim(reconstructions: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity, one a picture; NaN for pictures smaller than its window of 11 pixels.

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


class ReconstructionFID:
    """Fréchet distance between Inception features of originals and reconstructions (rFID).

    Args:
        weights: file of torch-fidelity's Inception network (pt_inception-2015-12-05-6726825d.pth).
        device: where the network runs.

    Raises:
        ModuleNotFoundError: if torch-fidelity is not installed.
        FileNotFoundError: if there is no such file.
    """

    def __init__(self, weights: Path, device: torch.device) -> None:
        if not weights.is_file():
            raise FileNotFoundError(f"no such file: {weights}")
        self.distance = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(weights)).to(device)
        self.device = device

    def update(self, reconstructions: Tensor, originals: Tensor) -> None:
        """Add uint8 pictures [B, 3, H, W]."""
        self.distance.update(originals.to(self.device), real=True)
        self.distance.update(reconstructions.to(self.device), real=False)

    def compute(self) -> float:
        """The distance over all pictures so far; at least two are needed."""
        return float(self.distance.compute())
