"""Few rows, many steps: the head of an autoregressive model at inference.

The GPU time here is that of all steps in one CUDA graph, for every form; the wall time is that of the call, which
replays a graph of its own in ours and launches step by step in the others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.case import Case, Form, Problem, Size, Work, at, linear_flops, randomised
from uniflow_kernels import FlowHead


def ours(head: FlowHead, noise: Tensor, condition: Tensor, steps: int) -> Tensor:
    """Noise [M, in], condition [M, z] -> [M, in]."""
    return head.sample(condition, steps, noise=noise)


def sampler_work(head: FlowHead, noise: Tensor, condition: Tensor, steps: int) -> Work:
    """The sampler without guidance: the condition is embedded once, and so is the time of each step."""
    rows = len(noise)
    flops = linear_flops(rows, head.cond_embed) + steps * linear_flops(1, head.time_embed)
    flops += steps * linear_flops(rows, head.input_proj, head.res_blocks, head.final_layer)
    return Work.of(flops, head, noise, condition, noise)


def build(rows: int, steps: int, depth: int, width: int, row: int, dtype: str) -> Problem:
    precision = getattr(torch, dtype)
    head = randomised(FlowHead(row, width, row, width, depth), precision).requires_grad_(False)
    noise, condition = torch.randn(rows, row, dtype=precision), torch.randn(rows, width, dtype=precision)

    def compiled(compile: Callable[[Form], Form]) -> Form:
        return partial(reference.sample, velocity=compile(reference.flow_head))

    return Problem(
        inputs=(head, noise, condition, steps),
        ours=ours,
        plain=reference.sample,
        tokens=rows,
        forward=sampler_work(head, noise, condition, steps),
        compiled=compiled,
    )


def _on_cuda(rows: int, steps: int, depth: int) -> Size:
    quick = depth == 6 and steps == 20 and rows in (1, 64)
    return at(rows=rows, steps=steps, depth=depth, width=1024, row=16, dtype="bfloat16", quick=quick, compile=quick)


CASES = (
    Case(
        "few_tokens",
        "What do all steps of a sampler cost for a handful of rows?",
        build,
        cuda=tuple(_on_cuda(*size) for size in product((1, 4, 16, 64), (20, 100), (3, 6, 12))),
        cpu=(
            at(rows=1, steps=4, depth=3, width=128, row=16, dtype="float32", quick=True),
            at(rows=16, steps=4, depth=3, width=128, row=16, dtype="float32", quick=True),
            at(rows=64, steps=4, depth=3, width=128, row=16, dtype="float32", quick=True, compile=True),
        ),
    ),
)
