"""Cutting images into rows of pixels, one row a token, and putting them together again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import reference
from benchmarks.case import Case, Problem, Work, at
from uniflow_kernels import patchify, unpatchify
from uniflow_kernels.ops.patch_embedding import patch_embedding


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


def build_embedding(batch: int, image: int, patch: int, width: int, dtype: str) -> Problem:
    """With gradients of the weights, which is all that training wants."""
    precision, tokens = getattr(torch, dtype), batch * (image // patch) ** 2
    images = torch.randn(batch, 3, image, image, dtype=precision)
    weight = (torch.randn(width, 3, patch, patch) * (3 * patch * patch) ** -0.5).to(precision).requires_grad_()
    bias = torch.randn(width, dtype=precision).requires_grad_()
    made = torch.empty(tokens, width, dtype=precision, device="meta")
    flops = 2 * tokens * weight.numel()
    return Problem(
        inputs=(images, weight, bias),
        ours=patch_embedding,
        plain=_convolution,
        tokens=tokens,
        forward=Work.of(flops, images, weight, made),
        backward=Work.of(flops, images, made, weight),
    )


def _convolution(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)


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
    Case(
        "patch_embedding",
        "How fast is a patch embedding as a product on patches, beside the convolution?",
        build_embedding,
        cuda=tuple(
            at(batch=batch, image=448, patch=14, width=1024, dtype="bfloat16", quick=batch == 32, compile=batch == 32)
            for batch in (1, 8, 32, 128)
        ),
        cpu=(
            at(batch=1, image=224, patch=14, width=640, dtype="bfloat16", quick=True),
            at(batch=8, image=224, patch=14, width=640, dtype="bfloat16"),
            at(batch=1, image=224, patch=14, width=640, dtype="float32"),
        ),
    ),
)
