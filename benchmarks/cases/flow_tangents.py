"""Velocity and tangent of a flow head, as objectives for few steps need them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from benchmarks.case import Case, Problem, Work, at, linear_flops, randomised
from uniflow_kernels import FlowHead


def plain(head: FlowHead, x: Tensor, t: Tensor, c: Tensor, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """By torch.func.jvp, for the rows x and the times t."""
    return cast(tuple[Tensor, Tensor], torch.func.jvp(lambda x, t: head(x, t, c), (x, t), (dx, dt)))


def build(tokens: int, width: int, depth: int, row: int, mode: str, dtype: str) -> Problem:
    kind, trains = getattr(torch, dtype), mode == "train"
    head = randomised(FlowHead(row, width, row, width, depth, times=2), kind).requires_grad_(trains)
    x, dx = torch.randn(2, tokens, row, dtype=kind)
    t = 1000 * torch.rand(tokens, 2)
    dt = torch.tensor([1000.0, 0.0]).repeat(tokens, 1)
    c = torch.randn(tokens, width, dtype=kind).requires_grad_(trains)
    flops = 2 * linear_flops(tokens, head)
    return Problem(
        inputs=(head, x, t, c, dx, dt),
        ours=FlowHead.jvp,
        plain=plain,
        tokens=tokens,
        forward=Work.of(flops, head, x, t, c, dx, dt, x, x),
        backward=Work.of(2 * flops, head, x, t, c, dx, dt, x, x, head, c) if trains else None,
    )


CASES = (
    Case(
        "flow_tangents",
        "What do a velocity and its derivative cost in one pass?",
        build,
        cuda=tuple(
            at(tokens=tokens, width=1024, depth=12, row=64, mode=mode, dtype=dtype, quick=tokens == 4096)
            for tokens in (64, 4096)
            for mode in ("eval", "train")
            for dtype in ("float32", "bfloat16")
        ),
        cpu=tuple(
            at(tokens=64, width=256, depth=3, row=16, mode=mode, dtype="float32", quick=True)
            for mode in ("eval", "train")
        ),
        check_at_most={"tokens": 64},
    ),
)
