"""The noise of a seed for each picture, as decoding makes it: a kernel against the same in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.case import Case, Problem, Work, at
from uniflow_kernels import seeded_noise
from uniflow_kernels.ops.noise import plain_seeded_noise

PATCH = 14


def ours(seeds: Tensor, rows: int, columns: int) -> Tensor:
    return seeded_noise(rows, columns, seeds, device=seeds.device)


def plain(seeds: Tensor, rows: int, columns: int) -> Tensor:
    return plain_seeded_noise(rows, columns, seeds, 0, seeds.device, 0)


def build(batch: int, image: int) -> Problem:
    rows, columns = batch * (image // PATCH) ** 2, 3 * PATCH**2
    seeds = torch.arange(batch)
    known = plain(seeds, rows, columns)

    def drawn(seeds: Tensor, rows: int, columns: int) -> Tensor:
        """As many numbers of torch's, which have no seeds of their own; what is checked is what is known already."""
        torch.randn(rows, columns, device=seeds.device)
        return known

    return Problem(
        inputs=(seeds, rows, columns),
        ours=ours,
        plain=plain,
        libraries={"torch.randn": lambda: drawn},
        tokens=rows,
        forward=Work.of(0, seeds, torch.empty(rows, columns)),
    )


CASES = (
    Case(
        "seeded_noise",
        "What does it cost to make noise from seeds?",
        build,
        cuda=(at(batch=1, image=448), at(batch=32, image=448, quick=True, compile=True)),
        cpu=(at(batch=1, image=224, quick=True), at(batch=8, image=224, quick=True, compile=True)),
    ),
)
