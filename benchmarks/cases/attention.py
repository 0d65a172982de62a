"""Attention of the encoder's shape, against the release's own, which writes its scores, and on each path."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.case import Case, Problem, Work, at, attention_flops
from uniflow_kernels import attention
from uniflow_kernels.ops.attention import BACKENDS, OWN, PACKAGES, attend_on


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [B, S, H, D] -> [B, S, H, D]."""
    return reference.attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def build(batch: int, length: int, heads: int, head_dim: int, dtype: str) -> Problem:
    shape = (batch, length, heads, head_dim)
    q, k, v = (torch.randn(shape, dtype=getattr(torch, dtype)).requires_grad_() for _ in range(3))
    flops = attention_flops(batch, length, heads * head_dim)
    return Problem(
        inputs=(q, k, v),
        ours=attention,
        plain=plain,
        tokens=batch * length,
        forward=Work.of(flops, q, k, v, q),
        # five products of the scores' size (the scores again, dv, dp, dq, dk) for the forward pass's two
        backward=Work.of(5 * flops // 2, q, k, v, q, q, q, k, v),
    )


def build_paths(batch: int, tokens: int, width: int, dtype: str) -> Problem:
    """Sixteen heads of a width; of a picture so many tokens."""
    return replace(
        build(batch, tokens, 16, width, dtype),
        ours=partial(attend_on, OWN),
        libraries={path: partial(partial, attend_on, path, only=True) for path in (*BACKENDS, *PACKAGES)},
    )


CASES = (
    Case(
        "attention",
        "How fast is attention without a mask at the encoder's shapes?",
        build,
        cuda=(
            at(batch=1, length=1025, heads=16, head_dim=64, dtype="bfloat16"),
            at(batch=32, length=1025, heads=16, head_dim=64, dtype="bfloat16", quick=True, compile=True),
            at(batch=32, length=1024, heads=16, head_dim=64, dtype="bfloat16"),
            at(batch=128, length=257, heads=16, head_dim=64, dtype="bfloat16"),
            at(batch=4, length=4097, heads=16, head_dim=64, dtype="bfloat16"),
        ),
        cpu=(
            at(batch=1, length=65, heads=4, head_dim=32, dtype="float32", quick=True),
            at(batch=8, length=65, heads=4, head_dim=32, dtype="float32", quick=True, compile=True),
        ),
        check_at_most={"batch": 1},
    ),
    Case(
        "attention_paths",
        "Which of PyTorch's backends and of flash-attn 2 and 3 is the fastest, by dtype and tokens of a picture?",
        build_paths,
        cuda=tuple(
            at(batch=batch, tokens=tokens, width=64, dtype=dtype, quick=dtype == "bfloat16", compile=False)
            for batch, tokens in ((128, 257), (64, 577), (32, 1025), (16, 2305), (8, 4097))
            for dtype in ("bfloat16", "float16")
        ),
        cpu=(),  # one of them alone serves there, and nothing is chosen
        check_at_most={"batch": 1},
    ),
)
