"""Layer-wise adaptive self-distillation: every layer of the student against the same layer of the teacher."""

from __future__ import annotations

import torch

from benchmarks import reference
from benchmarks.case import Case, Problem, Work, at
from uniflow_kernels import layerwise_distillation

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


CASES = (
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
