"""Heads of other projects as their users have them, and the same after `uniflow_kernels.patch`."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Case, Problem, Size, Work, at, linear_flops, randomised
from uniflow_kernels import patch
from uniflow_kernels.modules.flow_layers import TimestepEmbedding


class Block(nn.Module):
    """A block as MAR and its relatives have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[M, W] and [M, W] -> [M, W]."""
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class Last(nn.Module):
    """The layer after the blocks."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[M, W] and [M, W] -> [M, out]."""
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Head(nn.Module):
    """The whole head, as every project of the family calls it."""

    def __init__(self, row: int, width: int, out: int, z: int, depth: int) -> None:
        super().__init__()
        self.time_embed, self.cond_embed = TimestepEmbedding(width), nn.Linear(z, width)
        self.input_proj = nn.Linear(row, width)
        self.res_blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.final_layer = Last(width, out)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """X [M, row], t [M], c [M, z] -> [M, out]."""
        x, y = self.input_proj(x), self.time_embed(t) + self.cond_embed(c)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


# a row of x and of the output, and the condition, for a width of 1024; the condition of a narrower head is narrower
SHAPES = {"MAR": (16, 32, 768), "NextStep-1": (64, 64, 1536), "UniFlow": (588, 588, 1024)}


def build(shape: str, rows: int, width: int, depth: int, mode: str, dtype: str) -> Problem:
    precision = getattr(torch, dtype)
    row, out, z = SHAPES[shape]
    head = randomised(Head(row, width, out, z * width // 1024, depth), precision)
    head.requires_grad_(mode == "train")
    patch(head, strict=True)
    x = torch.randn(rows, row, dtype=precision)
    # a sampler's rows share their time, those of a training step do not
    t = 1000 * (torch.rand(rows) if mode == "train" else torch.rand(1).repeat(rows))
    c = torch.randn(rows, head.cond_embed.in_features, dtype=precision).requires_grad_(mode == "train")
    flops = linear_flops(rows, head)
    no_gradient = linear_flops(rows, head.input_proj, head.time_embed.mlp[0])
    return Problem(
        inputs=(head, x, t, c),
        ours=_patched,
        plain=Head.forward,
        tokens=rows,
        forward=Work.of(flops, head, x, t, c, x),
        backward=Work.of(2 * flops - no_gradient, head, x, t, c, x, head, c) if mode == "train" else None,
    )


def _patched(head: Head, *inputs: Any) -> Tensor:
    return head(*inputs)


def _on_cuda(shape: str, rows: int, mode: str) -> Size:
    width, depth = (1536, 12) if shape == "NextStep-1" else (1024, 6 if shape == "MAR" else 12)
    quick = shape == "MAR" and rows in (64, 32768)
    return at(shape=shape, rows=rows, width=width, depth=depth, mode=mode, dtype="bfloat16", quick=quick)


CASES = (
    Case(
        "dropin",
        "What does `patch` change for a head of another project?",
        build,
        cuda=(
            *(_on_cuda(shape, rows, "eval") for shape, rows in product(SHAPES, (1, 64, 1024))),
            *(_on_cuda(shape, rows, "train") for shape, rows in product(SHAPES, (8192, 32768))),
        ),
        cpu=tuple(
            at(
                shape=shape,
                rows=rows,
                width=width,
                depth=6,
                mode=mode,
                dtype="float32",
                quick=width == 128 and shape == "MAR",
            )
            for shape, rows, width, mode in product(SHAPES, (1, 64, 512), (128, 512), ("eval", "train"))
        ),
        check_at_most={"rows": 4096},
    ),
)
