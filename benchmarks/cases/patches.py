"""Cutting images into rows of pixels, one row a token."""

from __future__ import annotations

import torch

from benchmarks import reference
from benchmarks.case import Case, Problem, Work, at
from uniflow_kernels import patchify


def build(batch: int, image: int, patch: int, dtype: str) -> Problem:
    images = torch.randn(batch, 3, image, image, dtype=getattr(torch, dtype))
    return Problem(
        inputs=(images, patch),
        ours=patchify,
        plain=reference.patchify,
        tokens=batch * (image // patch) ** 2,
        forward=Work.of(0, images, images),
    )


CASES = (
    Case(
        "patchify",
        "How fast are images cut into rows of pixels?",
        build,
        cuda=(
            at(batch=1, image=448, patch=14, dtype="bfloat16"),
            at(batch=32, image=448, patch=14, dtype="bfloat16", quick=True, compile=True),
            at(batch=128, image=448, patch=14, dtype="bfloat16"),
            at(batch=32, image=448, patch=14, dtype="float32"),
        ),
        cpu=(
            at(batch=1, image=224, patch=14, dtype="float32", quick=True),
            at(batch=8, image=224, patch=14, dtype="float32", quick=True, compile=True),
        ),
    ),
)
