"""Scoring a UniFluid while it trains: its losses on what it is not trained on, and pictures it draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange

from uniflow.training.logs import Validation
from uniflow.training.processes import Processes
from uniflow.unifluid.captions import CaptionedPictures
from uniflow.unifluid.drawing import draw_pictures
from uniflow.unifluid.model import UniFluid
from uniflow.unifluid.objective import UniFluidObjective

_SEED = 0  # of the orders, times and noise of a score
_ACROSS = 8  # pictures in a row


@dataclass(frozen=True)
class DrawingValidator:
    """The losses on a part of other data, always with the same noise, and a picture for each of some captions.

    Args:
        objective: of which the student is scored.
        samples: the other data; `count` samples of it, `batch_size` at a time.
        captions: to draw.
        how: arguments of `draw_tokens`.
    """

    objective: UniFluidObjective
    samples: CaptionedPictures
    count: int
    batch_size: int
    captions: Sequence[str]
    how: dict[str, Any]

    def score(self, student: UniFluid, step: int, processes: Processes) -> Validation:
        """Every process works on all of it, since all must call a student whose parameters are spread over them."""
        device = student.device
        totals, counts = torch.zeros(2, 2, dtype=torch.float64, device="cpu").unbind()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(_SEED)
            for first in range(0, self.count, self.batch_size):
                positions = range(first, min(first + self.batch_size, self.count))
                drawings, readings = self.samples.collate([self.samples[position].value for position in positions])
                # what either loss is a mean of
                count = torch.tensor([readings.answer.sum(), len(drawings.images)], dtype=torch.int64, device="cpu")
                batch = (type(part)(*(tensor.to(device) for tensor in part)) for part in (drawings, readings))
                losses = self.objective(*batch)
                totals += count * torch.stack([losses.text, losses.image]).double().cpu()
                counts += count
        names = ("validation_text", "validation_image")
        scores: dict[str, float | None] = {
            name: float(total / count) for name, total, count in zip(names, totals, counts, strict=True) if count
        }
        if not self.captions:
            return Validation(step, scores)
        generator = torch.Generator().manual_seed(_SEED)
        pictures = draw_pictures(student, self.objective.tokenizer, self.captions, generator, **self.how).cpu()
        short = -len(pictures) % min(_ACROSS, len(pictures))
        pictures = torch.cat([pictures, pictures.new_zeros(short, *pictures.shape[1:])])
        sheet = rearrange(pictures, "(rows n) c h w -> c (rows h) (n w)", n=min(_ACROSS, len(pictures)))
        return Validation(step, scores, sheet)
