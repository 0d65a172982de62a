"""Heads and layers of other projects as their users have them, and the same after `uniflow_kernels.patch`."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import Case, Problem, Size, Work, at, attention_flops, linear_flops, randomised
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


def _patched(module: nn.Module, *inputs: Any) -> Tensor:
    return module(*inputs)


class Attention(nn.Module):
    """Of three products, as in the layers of the transformers package; heads of 64."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, W] -> [B, S, W]."""
        made = (layer(x).unflatten(-1, (-1, 64)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(*made).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        return x * self.lambda1


class EncoderLayer(nn.Module):
    """DINOv2's, as the transformers package has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention, self.layer_scale1, self.layer_scale2 = Attention(width), LayerScale(width), LayerScale(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, W] -> [B, S, W]."""
        x = self.layer_scale1(self.attention(self.norm1(x))) + x
        return self.layer_scale2(self.mlp(self.norm2(x))) + x


def build_layers(batch: int, length: int, width: int, mode: str, dtype: str) -> Problem:
    """Two layers, of which the second may take what the first left."""
    precision = getattr(torch, dtype)
    layers = randomised(nn.Sequential(EncoderLayer(width), EncoderLayer(width)), precision)
    layers.requires_grad_(mode == "train").train(mode == "train")
    patch(layers, strict=True)
    x = torch.randn(batch, length, width, dtype=precision).requires_grad_(mode == "train")
    flops = linear_flops(batch * length, layers) + 2 * attention_flops(batch, length, width)
    return Problem(
        inputs=(layers, x),
        ours=_patched,
        plain=_own_forwards,
        tokens=batch * length,
        forward=Work.of(flops, layers, x, x),
        backward=Work.of(2 * flops, layers, x, x, layers, x) if mode == "train" else None,
    )


def _own_forwards(layers: nn.Sequential, x: Tensor) -> Tensor:
    for layer in layers:
        x = EncoderLayer.forward(layer, x)  # type: ignore[arg-type]
    return x


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
    Case(
        "dropin_layers",
        "What does `patch` change for layers of a vision transformer?",
        build_layers,
        cuda=tuple(
            at(batch=batch, length=1025, width=width, mode=mode, dtype="bfloat16", quick=width == 1024 and batch == 32)
            for width, (batch, mode) in product((384, 1024), ((1, "eval"), (8, "eval"), (32, "eval"), (32, "train")))
        ),
        cpu=tuple(
            at(batch=batch, length=257, width=384, mode="eval", dtype="float32", quick=batch == 1) for batch in (1, 8)
        ),
        check_at_most={"batch": 2, "length": 257},
    ),
)
