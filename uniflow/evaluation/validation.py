"""Scores of a UniFlow while it trains: PSNR, SSIM and rFID on what it is not trained on, and pictures to look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from uniflow.evaluation.networks import FeatureNetwork
from uniflow.model import UniFlow
from uniflow.normalization import normalize, to_uint8
from uniflow.pictures import center_crop, open_picture, to_tensor
from uniflow.training.logs import Validation
from uniflow.training.processes import Processes

if TYPE_CHECKING:  # torchmetrics takes seconds to import, and is an extra
    from uniflow.evaluation.scores import ReconstructionScores

SHOWN = 8  # pictures beside their reconstructions


@dataclass(frozen=True)
class ReconstructionValidator:
    """Reconstructs center crops of picture files in the model's own number of steps, always from the same noise.

    Attributes:
        files: the pictures.
        batch_size: how many at a time, in each process.
        network: of the features for rFID.
    """

    files: Sequence[Path]
    batch_size: int
    network: FeatureNetwork | None = None

    def score(self, student: UniFlow, step: int, processes: Processes) -> Validation:
        """Mean PSNR in dB, SSIM (None for pictures too small for it) and rFID; originals above reconstructions.

        The processes share the pictures, and call the student equally often; the scores do not depend on how many
        they are.
        """
        from uniflow.evaluation.scores import InOrder, ReconstructionScores

        scores = ReconstructionScores(self.network)
        blocks = -(-len(self.files) // self.batch_size)
        order = InOrder(processes, blocks, scores.take)
        for first in range(0, blocks, processes.world):
            block = first + processes.rank
            numbers = range(len(self.files))[block * self.batch_size :][: self.batch_size]
            # a process that has nothing left goes along with any picture, since the others may need its shards
            originals = self._read(numbers or [0], student.config.image_size)
            results = _reconstruct(student, originals, numbers or [0])
            if numbers:
                order.add(block, scores.of(results, originals))
            if first == 0:
                samples = rearrange([originals[:SHOWN], results[:SHOWN]], "rows n c h w -> c (rows h) (n w)")
        order.finish()
        return Validation(step, processes.from_first(lambda: _all_of(scores)), samples)

    def _read(self, numbers: Sequence[int], size: int) -> Tensor:
        return torch.stack([to_tensor(center_crop(open_picture(self.files[number]), size)) for number in numbers])


def _reconstruct(student: UniFlow, originals: Tensor, numbers: Sequence[int]) -> Tensor:
    # each picture has its own noise, whatever process it falls to
    images = student(
        normalize(originals.to(student.device)), seed=torch.tensor(numbers, dtype=torch.int64, device="cpu")
    )
    return to_uint8(images).cpu()


def _all_of(scores: ReconstructionScores) -> dict[str, float | None]:
    means: dict[str, float | None] = dict(scores.means())
    if scores.network is not None:
        means["rfid"] = scores.distance()
    return {name: None if value is None or math.isnan(value) else value for name, value in means.items()}
