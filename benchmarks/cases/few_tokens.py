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
from benchmarks.case import Case, Form, Problem, Size, Work, randomised, sampling_flops
from uniflow_kernels import FlowHead


def ours(head: FlowHead, noise: Tensor, condition: Tensor, steps: int, cfg: float) -> Tensor:
    """Noise [M, in], condition [M, z] -> [M, in]."""
    return head.sample(condition, steps, noise=noise, cfg=cfg)


def build(rows: int, steps: int, guidance: int, depth: int, width: int, row: int, dtype: str) -> Problem:
    precision, cfg = getattr(torch, dtype), float(guidance)
    head = randomised(FlowHead(row, width, row, width, depth), precision).requires_grad_(False)
    noise, condition = torch.randn(rows, row, dtype=precision), torch.randn(rows, width, dtype=precision)

    def compiled(compile: Callable[[Form], Form]) -> Form:
        return partial(reference.sample, velocity=compile(reference.flow_head))

    return Problem(
        inputs=(head, noise, condition, steps, cfg),
        ours=ours,
        plain=reference.sample,
        tokens=rows,
        forward=Work.of(sampling_flops(head, rows, steps, cfg), head, noise, condition, noise),
        compiled=compiled,
    )


def _on_cuda(rows: int, steps: int, depth: int, guidance: int = 1) -> Size:
    quick = depth == 6 and steps == 20 and (rows in (1, 64) or guidance != 1)
    return Size(_values(rows, steps, guidance, depth, 1024, "bfloat16"), quick, compile=quick)


def _on_cpu(rows: int, steps: int, guidance: int = 1, compile: bool = False) -> Size:
    return Size(_values(rows, steps, guidance, 3, 128, "float32"), quick=True, compile=compile)


def _large_on_cpu(rows: int, steps: int, guidance: int = 1) -> Size:
    return Size(_values(rows, steps, guidance, 6, 1024, "float32"), quick=False, compile=False)


def _small_head_on_cpu(rows: int, steps: int, depth: int, width: int, dtype: str) -> Size:
    """Of the sizes of heads that people run on CPUs: pocket-tts's (6 of 512, a row) and VibeVoice's (4 of 896, two)."""
    return Size(_values(rows, steps, 1, depth, width, dtype), quick=dtype == "float32", compile=False)


def _values(rows: int, steps: int, guidance: int, depth: int, width: int, dtype: str) -> dict[str, int | str]:
    return {
        "rows": rows,
        "steps": steps,
        "guidance": guidance,
        "depth": depth,
        "width": width,
        "row": 16,
        "dtype": dtype,
    }


CASES = (
    Case(
        "few_tokens",
        "What do all steps of a sampler cost for a handful of rows, and with guidance?",
        build,
        cuda=(
            *(_on_cuda(*size) for size in product((1, 4, 16, 64), (20, 100), (3, 6, 12))),
            *(_on_cuda(4, steps, 6, guidance=2) for steps in (20, 100)),
        ),
        cpu=(
            _on_cpu(1, 20),
            _on_cpu(4, 100),
            _on_cpu(16, 20),
            _on_cpu(16, 20, guidance=2),
            _on_cpu(64, 20, compile=True),
            *(_small_head_on_cpu(1, 1, 6, 512, dtype) for dtype in ("float32", "bfloat16")),
            *(_small_head_on_cpu(2, 10, 4, 896, dtype) for dtype in ("float32", "bfloat16")),
            _large_on_cpu(4, 20),
            _large_on_cpu(4, 20, guidance=2),
            _large_on_cpu(4, 100),
            _large_on_cpu(64, 20, guidance=2),
        ),
    ),
)
