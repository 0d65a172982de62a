"""A simple training loop: AdamW, warmup and cosine, a budget of steps or of seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from uniflow.normalization import normalize
from uniflow.objective import UniFlowObjective


@dataclass(frozen=True)
class Recipe:
    """How to train.

    The loop ends after `steps` steps or, if given, after `seconds` seconds, whichever comes first; the learning rate
    rises for `warmup_steps` and falls as a half cosine over whichever budget is further spent.
    """

    steps: int
    seconds: float | None = None
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    max_gradient_norm: float = 1.0


@dataclass(frozen=True)
class Progress:
    """Where a run is: steps done, share of the budget spent, the last loss, throughput and time left."""

    step: int
    spent: float
    loss: float
    images_per_second: float
    seconds_left: float


def train(
    objective: UniFlowObjective,
    batches: Iterable[Tensor],
    recipe: Recipe,
    report: Callable[[Progress], None] | None = None,
    report_every: int = 10,
) -> list[float]:
    """Train `objective.student` in place and leave it in evaluation mode.

    Args:
        objective: on the device to train on.
        batches: uint8 images [B, 3, H, W], at least `recipe.steps` of them.
        recipe: see `Recipe`.
        report: called every `report_every` steps and after the last; reading the loss waits for the device, so not
            every step.
        report_every: in steps.

    Returns:
        The total loss of every step.

    Raises:
        FloatingPointError: if the loss is no longer finite (noticed when it is next read).
    """
    student = objective.student
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    objective.train()
    losses: list[Tensor] = []
    images_seen = 0
    start = time.perf_counter()
    for step, batch in enumerate(batches, start=1):
        elapsed = time.perf_counter() - start
        spent = max(step / recipe.steps, elapsed / recipe.seconds if recipe.seconds else 0.0)
        warm = min(1.0, step / recipe.warmup_steps) if recipe.warmup_steps else 1.0
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, spent)))

        total = objective(normalize(batch.to(student.device, non_blocking=True))).total
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), recipe.max_gradient_norm)
        optimizer.step()

        losses.append(total.detach())
        images_seen += len(batch)
        last = spent >= 1
        if last or step % report_every == 0:
            loss = float(losses[-1])
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step}; a lower learning rate may help")
            if report is not None:
                elapsed = time.perf_counter() - start
                report(Progress(step, min(1.0, spent), loss, images_seen / elapsed, elapsed * max(0.0, 1 / spent - 1)))
        if last:
            break
    objective.eval()
    return torch.stack(losses).tolist() if losses else []
