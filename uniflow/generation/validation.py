"""Scoring a generator while it trains: its loss on other latents, and pictures it draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from uniflow.generation.drawing import draw_latents, picture_seeds, picture_size, usual_schedule
from uniflow.generation.model import FlowTransformer
from uniflow.generation.objective import FlowTransformerObjective
from uniflow.generation.samples import LatentSamples
from uniflow.model import UniFlow
from uniflow.normalization import to_uint8
from uniflow.training.logs import Validation
from uniflow.training.processes import Processes
from uniflow_kernels.solvers import Plan

_SEED = 0  # of the times and noise of a score
_VALIDATED = 1024  # latents that are scored, at most


@dataclass(frozen=True)
class GeneratorValidator:
    """The loss on a part of another set, always with the same noise, and a sheet of drawn pictures.

    Attributes:
        objective: of which the student is scored.
        samples: of the other set; None for no score.
        tokenizer: decodes what is drawn; None for no pictures.
        batch_size: latents and pictures at a time.
        rows, columns: of the sheet, a row a class.
        steps, cfg: see `draw_latents`.
    """

    objective: FlowTransformerObjective
    samples: LatentSamples | None
    tokenizer: UniFlow | None
    batch_size: int
    rows: int
    columns: int
    steps: int
    cfg: float

    def score(self, student: FlowTransformer, step: int, processes: Processes) -> Validation:
        """Every process works on all of it, since all must call a student whose parameters are spread over them."""
        scores: dict[str, float | None] = {} if self.samples is None else {"validation": self._loss(self.samples)}
        return Validation(step, scores, None if self.tokenizer is None else self._sheet(student, self.tokenizer))

    def _loss(self, samples: LatentSamples) -> float:
        device, total = self.objective.student.device, 0.0
        count = min(len(samples.latents), _VALIDATED)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(_SEED)
            for first in range(0, count, self.batch_size):
                positions = range(first, min(first + self.batch_size, count))
                batch = samples.collate([samples[position].value for position in positions])
                loss = self.objective(*(tensor.to(device) for tensor in batch)).total
                total += float(loss) * len(positions)
        return total / count

    def _sheet(self, student: FlowTransformer, tokenizer: UniFlow) -> Tensor:
        classes = student.config.classes
        rows = self.rows if classes is None else min(self.rows, classes)
        plan = Plan(self.steps, usual_schedule(student), cfg=1.0 if classes is None else self.cfg)
        numbers, pictures, size = range(rows * self.columns), [], picture_size(student, tokenizer)
        for first in range(0, len(numbers), self.batch_size):
            part = list(numbers[first : first + self.batch_size])
            seeds, decoder_seeds = picture_seeds(_SEED, part)
            labels = None if classes is None else torch.tensor(part, dtype=torch.int64, device="cpu") // self.columns
            latents = draw_latents(student, seeds, labels, plan)
            pictures.append(to_uint8(tokenizer.decode(latents, seed=decoder_seeds, size=size)).cpu())
        return rearrange(torch.cat(pictures), "(rows n) c h w -> c (rows h) (n w)", n=self.columns)
