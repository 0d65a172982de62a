"""Scoring a UniFluid while it trains: its losses on what it is not trained on, and pictures it draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from einops import rearrange

from uniflow.normalization import to_uint8
from uniflow.training.logs import Validation
from uniflow.training.processes import Processes
from uniflow.unifluid.captions import CaptionedPictures, Drawings, Readings
from uniflow.unifluid.drawing import Sources, draw_tokens
from uniflow.unifluid.model import UniFluid
from uniflow.unifluid.objective import UniFluidObjective

B = TypeVar("B", Drawings, Readings)

_SEED = 0  # of the orders, times and noise of a score
_ACROSS = 8  # pictures in a row


@dataclass(frozen=True)
class DrawingValidator:
    """The losses on a part of other data, always with the same noise, and a picture for each of some captions.

    Args:
        objective: of which the student is scored.
        samples: the other data; `count` samples of it, `batch_size` at a time.
        shown: what is drawn, captions and sources; None for nothing.
        how: arguments of `draw_tokens`.
    """

    objective: UniFluidObjective
    samples: CaptionedPictures
    count: int
    batch_size: int
    shown: Drawings | None
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
                losses = self.objective(_on(device, drawings), _on(device, readings))
                totals += count * torch.stack([losses.text, losses.image]).double().cpu()
                counts += count
        names = ("validation_text", "validation_image")
        scores: dict[str, float | None] = {
            name: float(total / count) for name, total, count in zip(names, totals, counts, strict=True) if count
        }
        if self.shown is None:
            return Validation(step, scores)
        generator = torch.Generator().manual_seed(_SEED)
        given = _on(device, self.shown)
        tokenizer = self.objective.tokenizer_for(given.images)
        features, clean = self.objective.looked_at(given.sources, given.seen)
        sources = None if features is None and clean is None else Sources(features, clean)
        how = {"sources": sources, "grid": tokenizer.grid, "generator": generator, **self.how}
        tokens = draw_tokens(student, given.ids, given.real, **how)
        pictures = to_uint8(tokenizer.decode(tokens, generator)).cpu()
        short = -len(pictures) % min(_ACROSS, len(pictures))
        pictures = torch.cat([pictures, pictures.new_zeros(short, *pictures.shape[1:])])
        sheet = rearrange(pictures, "(rows n) c h w -> c (rows h) (n w)", n=min(_ACROSS, len(pictures)))
        return Validation(step, scores, sheet)


def _on(device: torch.device, batch: B) -> B:
    moved: list[Any] = [None if tensor is None else tensor.to(device) for tensor in batch]
    return type(batch)(*moved)
