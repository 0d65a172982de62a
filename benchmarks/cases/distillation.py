"""Layer-wise adaptive self-distillation: every layer of the student against the same layer of the teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import reference
from benchmarks.case import Case, Problem, Work, at
from uniflow_kernels import compared_residual_norm, layerwise_distillation

BETA = 2.0


def build(layers: int, batch: int, length: int, width: int, dtype: str) -> Problem:
    def states() -> list[torch.Tensor]:
        return [torch.randn(batch, length, width, dtype=getattr(torch, dtype)) for _ in range(layers)]

    student, teacher = [state.requires_grad_() for state in states()], states()
    elements = layers * student[0].numel()
    return Problem(
        inputs=(student, teacher, BETA),
        ours=lambda student, teacher, beta: layerwise_distillation(student, teacher, beta)[0],
        plain=reference.layerwise_distillation,
        tokens=batch * length,
        forward=Work.of(6 * elements, student, teacher),
        # the forward pass could write each layer's gradient up to its weight: then one read and one write
        backward=Work.of(elements, student, student),
    )


def plain_boundary(x: Tensor, q: Tensor, vectors: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, q and teacher [B, S, W]; LayerScale, the norm's weight and bias [3, W] -> the sum, its norm, the distance."""
    scale, weight, bias = vectors.unbind()
    total = torch.addcmul(x, q, scale)
    h = F.layer_norm(total, total.shape[-1:], weight, bias, eps=1e-6)
    return total, h, reference.layerwise_distillation([total], [teacher], BETA)


def our_boundary(x: Tensor, q: Tensor, vectors: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same."""
    scale, weight, bias = vectors.unbind()
    return compared_residual_norm(x, q, scale, teacher=teacher, weight=weight, bias=bias, eps=1e-6)


def build_boundary(batch: int, length: int, width: int, dtype: str) -> Problem:
    kind = getattr(torch, dtype)
    x, q, teacher = (torch.randn(batch, length, width, dtype=kind) for _ in range(3))
    vectors = torch.randn(3, width, dtype=kind).requires_grad_()
    return Problem(
        inputs=(x.requires_grad_(), q.requires_grad_(), vectors, teacher),
        ours=our_boundary,
        plain=plain_boundary,
        tokens=batch * length,
        forward=Work.of(0, x, q, teacher, x, x),
        # both gradients that come in, the sum, q and the teacher, and the gradients of x and q
        backward=Work.of(0, x, x, x, q, teacher, x, q),
    )


CASES = (
    Case(
        "compared_residual_norm",
        "What does a layer's end cost in training beside a teacher: residual, norm and distance, with their gradients?",
        build_boundary,
        cuda=tuple(
            at(batch=batch, length=1025, width=1024, dtype="bfloat16", quick=batch == 32, compile=batch == 32)
            for batch in (1, 32, 128)
        ),
        cpu=(at(batch=2, length=257, width=384, dtype="float32", quick=True),),
        check_at_most={"batch": 2},
    ),
    Case(
        "distillation",
        "How fast is the layer-wise distillation loss and its gradient?",
        build,
        cuda=(
            at(layers=24, batch=8, length=1024, width=1024, dtype="bfloat16", quick=True),
            at(layers=24, batch=32, length=1024, width=1024, dtype="bfloat16", quick=True, compile=True),
        ),
        cpu=(
            at(layers=4, batch=1, length=64, width=128, dtype="float32", quick=True),
            at(layers=4, batch=8, length=64, width=128, dtype="float32", quick=True, compile=True),
        ),
        check_at_most={"batch": 4},
    ),
)
