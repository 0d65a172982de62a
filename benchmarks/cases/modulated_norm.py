"""The residual and the norm between attention and MLP: of a DiT's block, one condition a picture, and of a ViT's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Case, Problem, Work, at
from uniflow_kernels import gated_residual_norm, residual_norm


def plain(x: Tensor, q: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    """x and q [B, S, W], gate, shift and scale side by side [B, 1, 3W] -> the sum and its adaptive norm."""
    gate, shift, scale = modulation.chunk(3, -1)
    total = x + gate * q
    return total, F.layer_norm(total, total.shape[-1:], eps=1e-6) * (1 + scale) + shift


def ours(x: Tensor, q: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    """The same."""
    gate, shift, scale = modulation.chunk(3, -1)
    return gated_residual_norm(x, gate, q, shift, scale)


def build(batch: int, length: int, width: int, mode: str, dtype: str) -> Problem:
    kind, trains = getattr(torch, dtype), mode == "train"
    x, q = (torch.randn(batch, length, width, dtype=kind).requires_grad_(trains) for _ in range(2))
    modulation = torch.randn(batch, 1, 3 * width, dtype=kind).requires_grad_(trains)
    return Problem(
        inputs=(x, q, modulation),
        ours=ours,
        plain=plain,
        tokens=batch * length,
        forward=Work.of(0, x, q, modulation, x, x),
        # both gradients that come in, x (or the sum), q, and the gradients of all three
        backward=Work.of(0, x, x, x, q, modulation, x, q, modulation) if trains else None,
    )


def plain_layer(x: Tensor, q: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """x and q [B, S, W]; LayerScale, the norm's weight and bias [3, W] -> the sum and its norm."""
    scale, weight, bias = vectors.unbind()
    total = torch.addcmul(x, q, scale)
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps=1e-6)


def our_layer(x: Tensor, q: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The same."""
    scale, weight, bias = vectors.unbind()
    return residual_norm(x, q, scale, weight=weight, bias=bias, eps=1e-6)


def build_layer(batch: int, length: int, width: int, mode: str, dtype: str) -> Problem:
    kind, trains = getattr(torch, dtype), mode == "train"
    x, q = (torch.randn(batch, length, width, dtype=kind).requires_grad_(trains) for _ in range(2))
    vectors = torch.randn(3, width, dtype=kind).requires_grad_(trains)
    return Problem(
        inputs=(x, q, vectors),
        ours=our_layer,
        plain=plain_layer,
        tokens=batch * length,
        forward=Work.of(0, x, q, x, x),
        # both gradients that come in, the sum, q, and the gradients of x and q
        backward=Work.of(0, x, x, x, q, x, q) if trains else None,
    )


CASES = (
    Case(
        "gated_residual_norm",
        "What do the gated residual and the adaptive norm of a DiT's block cost?",
        build,
        cuda=tuple(
            at(batch=batch, length=256, width=1152, mode=mode, dtype="bfloat16", quick=batch == 32, compile=batch == 32)
            for batch in (2, 32, 256)
            for mode in ("eval", "train")
        ),
        cpu=tuple(
            at(batch=2, length=256, width=384, mode=mode, dtype="float32", quick=True) for mode in ("eval", "train")
        ),
        check_at_most={"batch": 2},
    ),
    Case(
        "residual_norm",
        "What do LayerScale, the residual and the norm of a ViT's layer cost?",
        build_layer,
        cuda=tuple(
            at(
                batch=batch,
                length=1025,
                width=1024,
                mode=mode,
                dtype="bfloat16",
                quick=batch == 32,
                compile=batch == 32,
            )
            for batch in (1, 32, 128)
            for mode in ("eval", "train")
        ),
        cpu=tuple(
            at(batch=2, length=257, width=384, mode=mode, dtype="float32", quick=True) for mode in ("eval", "train")
        ),
        check_at_most={"batch": 2},
    ),
)
