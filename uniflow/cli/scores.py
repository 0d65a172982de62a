"""Scores over all pictures of a command, apart from the others since torchmetrics takes seconds to import."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from uniflow.cli.inputs import explained
from uniflow.metrics import ReconstructionFID, psnr, ssim


class Scores:
    """PSNR and SSIM of all pictures so far."""

    def __init__(self) -> None:
        self._psnr: list[Tensor] = []
        self._ssim: list[Tensor] = []

    def add(self, results: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
        """Of a batch of uint8 pictures [B, 3, H, W]: [B] and [B]."""
        self._psnr.append(psnr(results, originals))
        self._ssim.append(ssim(results, originals))
        return self._psnr[-1], self._ssim[-1]

    def means(self) -> dict[str, float]:
        """By name; pictures too small for SSIM are left out of its mean."""
        return {"psnr": torch.cat(self._psnr).mean().item(), "ssim": torch.cat(self._ssim).nanmean().item()}

    @property
    def pictures(self) -> int:
        """How many there were."""
        return sum(map(len, self._psnr))

    @property
    def without_ssim(self) -> int:
        """How many of them were too small for SSIM."""
        return int(torch.cat(self._ssim).isnan().sum())


def distance_or_why_not(weights: Path | None, device: torch.device) -> tuple[ReconstructionFID | None, str]:
    """rFID by the Inception weights in a file; or None, and why there is none."""
    if weights is None:
        return None, "it needs torch-fidelity and --fid-weights with its pt_inception-2015-12-05-6726825d.pth"
    try:
        with explained():
            return ReconstructionFID(weights, device), ""
    except ModuleNotFoundError:
        return None, "torch-fidelity is not installed (pip install torch-fidelity)"
