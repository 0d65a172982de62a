"""Cutting images into rows of pixels, one row a token, and putting them together again."""

from __future__ import annotations

import torch

from benchmarks import reference
from benchmarks.case import Case, Problem, Work, at
from uniflow_kernels import patchify, unpatchify


def build(batch: int, image: int, patch: int, dtype: str, layout: str = "contiguous") -> Problem:
    images = torch.randn(batch, 3, image, image, dtype=getattr(torch, dtype))
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    return Problem(
        inputs=(images, patch),
        ours=patchify,
        plain=reference.patchify,
        tokens=batch * (image // patch) ** 2,
        forward=Work.of(0, images, images),
    )


def build_back(batch: int, image: int, patch: int, dtype: str) -> Problem:
    rows = torch.randn(batch, (image // patch) ** 2, 3 * patch * patch, dtype=getattr(torch, dtype))
    return Problem(
        inputs=(rows, patch),
        ours=unpatchify,
        plain=reference.unpatchify,
        tokens=rows.shape[0] * rows.shape[1],
        forward=Work.of(0, rows, rows),
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
            at(batch=32, image=448, patch=14, dtype="bfloat16", layout="channels_last"),
        ),
        cpu=(
            at(batch=1, image=224, patch=14, dtype="float32", quick=True),
            at(batch=8, image=224, patch=14, dtype="float32", quick=True, compile=True),
        ),
    ),
    Case(
        "unpatchify",
        "How fast are rows of pixels put together into images?",
        build_back,
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
