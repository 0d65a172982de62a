"""Scores on what is not trained on; for UniFlow PSNR and SSIM, and some reconstructions to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from uniflow.model import UniFlow
from uniflow.normalization import normalize, to_uint8
from uniflow.pictures import center_crop, open_picture, to_tensor
from uniflow.training.logs import Validation
from uniflow.training.processes import Processes

SHOWN = 8  # pictures beside their reconstructions


class Validator(Protocol):
    """What scores a student now and then."""

    def score(self, student: Any, step: int, processes: Processes) -> Validation:
        """Scores of the objective's student, which is in evaluation mode; all processes come here together."""
        ...


@dataclass(frozen=True)
class ReconstructionValidator:
    """Reconstructs center crops of picture files in the model's own number of steps, always from the same noise."""

    files: Sequence[Path]
    batch_size: int

    def score(self, student: UniFlow, step: int, processes: Processes) -> Validation:
        """Mean PSNR in dB and SSIM (None for pictures too small for it); samples: originals above reconstructions.

        The processes share the pictures, and call the student equally often.
        """
        from uniflow.metrics import psnr, ssim  # torchmetrics takes seconds to import, and is an extra

        totals = torch.zeros(3, dtype=torch.float64, device="cpu")  # PSNR, SSIM, pictures
        for first in range(0, len(self.files), self.batch_size * processes.world):
            mine = range(first + processes.rank, first + self.batch_size * processes.world, processes.world)
            numbers = [number for number in mine if number < len(self.files)]
            # a process that has nothing left goes along with any picture, since the others may need its shards
            originals = self._read(numbers or [0], student.config.image_size)
            results = _reconstruct(student, originals, numbers or [0])
            if numbers:
                sums = torch.stack([psnr(results, originals).sum(), ssim(results, originals).sum()])
                totals += torch.cat([sums.double(), sums.new_tensor([len(numbers)])])
            if first == 0:
                samples = rearrange([originals[:SHOWN], results[:SHOWN]], "rows n c h w -> c (rows h) (n w)")
        db, similarity, pictures = processes.average(totals.to(student.device)).tolist()
        too_small = math.isnan(similarity)  # for SSIM's window
        scores = {"psnr": db / pictures, "ssim": None if too_small else similarity / pictures}
        return Validation(step, scores, samples)

    def _read(self, numbers: Sequence[int], size: int) -> Tensor:
        return torch.stack([to_tensor(center_crop(open_picture(self.files[number]), size)) for number in numbers])


def _reconstruct(student: UniFlow, originals: Tensor, numbers: Sequence[int]) -> Tensor:
    # each picture has its own noise, whatever process it falls to
    images = student(
        normalize(originals.to(student.device)), seed=torch.tensor(numbers, dtype=torch.int64, device="cpu")
    )
    return to_uint8(images).cpu()
