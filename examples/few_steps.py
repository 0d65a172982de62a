"""Tune a head that was trained by flow matching into one that draws in one step, on points of a ring.

    python examples/few_steps.py [STEPS]

Prints the energy distance between drawn points and the data (0 for equal distributions) by the number of steps, of flow
matching, then of mean flow and self-distillation, each tuned for as long.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from uniflow.flow import sample_intervals, sample_t
from uniflow_kernels import FlowHead, mean_flow_loss, self_distillation_loss

H = TypeVar("H", bound=nn.Module)
ROWS = 1024


def points(count: int, generator: torch.Generator) -> Tensor:
    """Eight clouds on a ring, [count, 2]."""
    angle = torch.randint(8, (count,), generator=generator) * (torch.pi / 4)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2, generator=generator)


def flow_matching(head: FlowHead, condition: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    """The velocity at one time."""
    t = sample_t((len(data), 1), "uniform")
    velocity = head(torch.lerp(noise, data, t), 1000 * t[:, 0], condition)
    return (velocity - (data - noise)).square().mean()


def mean_flow(head: FlowHead, condition: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    """The mean velocity between two times."""
    return mean_flow_loss(head, condition, data, sample_intervals((len(data),), 0.5, "uniform"), noise)


def self_distillation(head: FlowHead, condition: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    """The same, learnt from the head itself."""
    return self_distillation_loss(head, condition, data, sample_intervals((len(data),), 0.5, "uniform"), noise)


def trained(head: H, loss: Callable[[H, Tensor, Tensor, Tensor], Tensor], steps: int) -> H:
    """The average of the weights over a training of so many steps."""
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=0.0)
    average = copy.deepcopy(head)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 100) * (1 - step / steps)
        data, noise = points(ROWS, generator), torch.randn(ROWS, 2, generator=generator)
        optimizer.zero_grad()
        loss(head, torch.zeros(ROWS, 1), data, noise).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for mean, now in zip(average.parameters(), head.parameters(), strict=True):
                mean.lerp_(now, max(0.001, 9 / (10 + step)))
    return average


@torch.no_grad()
def energy_distance(draw: Callable[[Tensor, Tensor, int], Tensor], steps: int, count: int = 4000) -> float:
    """Of what draw(condition, noise, steps) makes from the data."""
    generator = torch.Generator().manual_seed(2)
    data, noise = points(count, generator), torch.randn(count, 2, generator=generator)
    drawn = draw(torch.zeros(count, 1), noise, steps)
    pairs = (drawn, data), (drawn, drawn), (data, data)
    across, of_drawn, of_data = (torch.cdist(a, b).mean().item() for a, b in pairs)
    return 2 * across - of_drawn - of_data


def main(steps: int) -> None:
    """Train, tune and print."""
    torch.manual_seed(0)
    first = trained(FlowHead(2, 128, 2, 1, 3), flow_matching, steps)
    starts = {flow_matching: first, mean_flow: first.for_intervals(), self_distillation: first.for_intervals()}
    print(f"{'objective':20}{'seconds':>8}" + "".join(f"{count:>9}" for count in (20, 4, 2, 1)))
    for loss, start in starts.items():
        begun = time.perf_counter()
        head = trained(copy.deepcopy(start), loss, steps)
        seconds = time.perf_counter() - begun
        distances = (energy_distance(partial(_draw, head), count) for count in (20, 4, 2, 1))
        print(f"{loss.__name__:20}{seconds:8.0f}" + "".join(f"{distance:9.4f}" for distance in distances))


def _draw(head: FlowHead, condition: Tensor, noise: Tensor, steps: int) -> Tensor:
    return head.sample(condition, steps, noise=noise)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 600)
