"""In which order image tokens come, and how many at a time."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from uniflow_kernels.ops.noise import where_drawn
from uniflow_kernels.torch_private import constant


def draw_orders(
    batch: int, tokens: int, order: str, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Places in the order of their tokens, int64 [batch, tokens]; a permutation for each picture, or the raster's.

    Args:
        batch: pictures.
        tokens: N of a picture.
        order: "random" or "raster".
        device: of the result.
        generator: to draw it with, of any device.
    """
    if order == "raster":
        return torch.arange(tokens, device=device).expand(batch, tokens)
    drawn_on = where_drawn(generator, device)
    drawn = torch.rand(batch, tokens, dtype=torch.float32, device=drawn_on, generator=generator)
    return drawn.argsort(dim=1).to(device)


@lru_cache
def group_sizes(tokens: int, steps: int) -> tuple[int, ...]:
    """How many tokens each step gives: few at first, more when much is known.

    After step s of S, N * cos(pi/2 * s/S) tokens are left, rounded down, but every step gives at least one and leaves
    one for each step that follows.

    Raises:
        ValueError: if steps is not in [1, tokens].

    Source: the cosine schedule of MaskGIT and MAR.
    """
    if not 1 <= steps <= tokens:
        raise ValueError(f"steps: expected between 1 and {tokens}, the picture's tokens, got {steps}")
    sizes, left = [], tokens
    for step in range(1, steps + 1):
        wanted = int(tokens * math.cos(math.pi / 2 * step / steps)) if step < steps else 0
        following = min(max(wanted, steps - step), left - 1)
        sizes.append(left - following)
        left = following
    return tuple(sizes)


@constant  # else every line of it would be traced
def _groups_by_steps(tokens: int) -> Tensor:
    return _table(tokens)


@lru_cache
def _table(tokens: int) -> Tensor:
    """Row S - 1: the step that each token comes in when there are S of them; int64 [tokens, tokens] on the CPU."""
    rows = [
        torch.repeat_interleave(torch.tensor(group_sizes(tokens, steps), dtype=torch.int64, device="cpu"))
        for steps in range(1, tokens + 1)
    ]
    return torch.stack(rows)


def draw_groups(batch: int, tokens: int, device: torch.device) -> Tensor:
    """The step of each token, by rank, for a number of steps that is drawn for each picture; int64 [batch, tokens].

    Drawn on the CPU, where the table lies: N * N numbers, 8 MB for 1024 tokens.
    """
    steps = torch.randint(tokens, (batch,), device="cpu")
    groups = _groups_by_steps(tokens)[steps]
    return groups.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else groups.to(device)
