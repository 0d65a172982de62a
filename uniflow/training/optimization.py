"""What a step changes and by how much: frozen parts, parameter groups, the learning rate, moving averages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from uniflow.training.interfaces import Student, vision_parts
from uniflow.training.recipe import Recipe, Stage


def freeze(student: Student, stage: Stage) -> None:
    """Let the parameters that the stage trains have gradients, and no others."""
    frozen = student.untrained_parts + (() if stage.train == "all" else student.pretrained_parts)
    if stage.vision_learning_rate is None:
        frozen += vision_parts(student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))


def check_vision(student: Student, recipe: Recipe) -> None:
    """Raise a ValueError, naming the stage, if one is to train a vision encoder that the student does not have."""
    for number, stage in enumerate(recipe.stages):
        if stage.vision_learning_rate is not None and not vision_parts(student):
            raise ValueError(
                f"stages.{number}.vision_learning_rate: expected none, since this {type(student).__name__} has no "
                f"vision encoder of its own, got {stage.vision_learning_rate}"
            )


def make_optimizer(student: Student, stage: Stage, recipe: Recipe) -> torch.optim.AdamW:
    """A fused AdamW for what the stage trains; the rest is frozen.

    The groups of pretrained parts, and of a vision encoder, have their own learning rates; parameters of one dimension
    (norms, biases, scales) do not decay. A group's `peak` is the learning rate that the schedule scales.
    """
    freeze(student, stage)
    parts = [(vision_parts(student), stage.vision_learning_rate), (student.pretrained_parts, stage.encoder_rate)]
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            part = next((place for place, (begins, _) in enumerate(parts) if name.startswith(begins)), len(parts))
            groups.setdefault((part, parameter.ndim > 1), []).append(parameter)
    peaks = [*(peak for _, peak in parts), stage.learning_rate]
    optimizer = torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak": peaks[part],
                "weight_decay": recipe.weight_decay if decays else 0.0,
            }
            for (part, decays), parameters in groups.items()
        ],
        lr=stage.learning_rate,
        betas=recipe.betas,
        fused=True,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # as AdamW would at its first step; a checkpoint then has the same entries at any step
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **moments,
            }
    return optimizer


def set_learning_rates(optimizer: torch.optim.Optimizer, stage: Stage, step: int, spent: float) -> float:
    """Warmup and cosine for step `step` (from 1) of a stage, `spent` being the share of its budget: the factor."""
    warm = min(1.0, step / stage.warmup_steps) if stage.warmup_steps else 1.0
    last = stage.final_learning_rate / stage.learning_rate if stage.learning_rate else 0.0
    factor = warm * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, spent))))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return factor


class MovingAverage:
    """An exponential moving average of a student's parameters, by name in `values`."""

    def __init__(self, student: Student, decay: float) -> None:
        self.follow(student)
        self._update = get_ema_multi_avg_fn(decay)
        self.values = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}

    def follow(self, student: Student) -> None:
        """Average the student's parameters that there are now, whose shapes the values have."""
        self._parameters = [parameter for _, parameter in student.named_parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the parameters as they are now."""
        self._update(list(self.values.values()), self._parameters, 0)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Inside the block the model holds the averages; then its own values again, to the bit."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        self._set(list(self.values.values()))
        try:
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)


@contextmanager
def averaged(average: MovingAverage | None) -> Iterator[None]:
    """Inside the block the model holds its averages, if there are any."""
    with average.in_model() if average is not None else nullcontext():
        yield
