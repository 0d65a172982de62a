"""The end of a sampler: the last update into pictures of bytes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.case import Case, Problem, Work, at
from uniflow.normalization import IMAGENET_MEAN, IMAGENET_STD
from uniflow_kernels import to_images


def ours(rows: Tensor, velocity: Tensor, dt: float, patch: int) -> Tensor:
    return to_images(rows, patch, velocity=velocity, dt=dt, mean=IMAGENET_MEAN, std=IMAGENET_STD, clamp=True)


def plain(rows: Tensor, velocity: Tensor, dt: float, patch: int, mean: Tensor, std: Tensor) -> Tensor:
    images = reference.unpatchify(rows + dt * velocity, patch)
    return (images * std.to(rows.dtype) + mean.to(rows.dtype)).clamp(0, 1)


def build(batch: int, image: int, patch: int, dtype: str) -> Problem:
    rows, velocity = torch.randn(2, batch, (image // patch) ** 2, 3 * patch**2, dtype=getattr(torch, dtype)).unbind(0)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return Problem(
        inputs=(rows, velocity, 0.25, patch),
        ours=ours,
        plain=partial(plain, mean=mean, std=std),
        tokens=batch * (image // patch) ** 2,
        forward=Work.of(0, rows, velocity, rows),
    )


CASES = (
    Case(
        "to_images",
        "What does it cost to turn the last update into pictures?",
        build,
        cuda=(
            at(batch=1, image=448, patch=14, dtype="bfloat16"),
            at(batch=32, image=448, patch=14, dtype="bfloat16", quick=True, compile=True),
            at(batch=32, image=448, patch=14, dtype="float32"),
        ),
        cpu=(
            at(batch=1, image=224, patch=14, dtype="float32", quick=True),
            at(batch=8, image=224, patch=14, dtype="float32", quick=True, compile=True),
        ),
    ),
)
