"""The training step of the flow head: x_t, velocity, loss and all gradients, chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.case import Case, Form, Problem, Work, at, linear_flops, randomised
from uniflow_kernels import FlowHead, flow_matching_loss

PATCH = 14


def build(batch: int, image: int, width: int, depth: int, chunk: int, dtype: str) -> Problem:
    precision = getattr(torch, dtype)
    row = 3 * PATCH**2
    head = randomised(FlowHead(row, width, row, width, depth), precision)
    images, noise = torch.randn(batch, 3, image, image), torch.randn(batch, (image // PATCH) ** 2, row)
    t = torch.rand(noise.shape[:2])
    condition = torch.randn(*t.shape, width, dtype=precision).requires_grad_()

    def in_chunks(chunk: int | None) -> Form:
        def form(head: FlowHead, condition: Tensor, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
            return flow_matching_loss(head, condition, images, t, PATCH, noise, time_scale=1000.0, chunk_tokens=chunk)

        return form

    tokens = t.numel()
    flops = linear_flops(tokens, head)
    no_gradient = linear_flops(tokens, head.input_proj, head.time_embed.mlp[0])
    return Problem(
        inputs=(head, condition, images, t, noise),
        ours=in_chunks(chunk),
        plain=_plain,
        libraries={"one chunk": lambda: in_chunks(None)},
        tokens=tokens,
        forward=Work.of(flops, head, condition, images, t, noise),
        # ours has done this in the forward pass already: "both" is what to compare
        backward=Work.of(2 * flops - no_gradient, head, condition, head, condition),
    )


def _plain(head: FlowHead, condition: Tensor, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    x_t = reference.interpolate(images, t, PATCH, noise).to(condition.dtype)
    velocity = reference.flow_head(head, x_t.flatten(0, 1), 1000 * t.flatten(), condition.flatten(0, 1))
    return reference.velocity_loss(velocity.unflatten(0, t.shape), images, PATCH, noise)


CASES = (
    Case(
        "flow_matching",
        "What does the head's training step cost, chunk by chunk?",
        build,
        cuda=(
            at(batch=8, image=448, width=1024, depth=12, chunk=4096, dtype="bfloat16"),
            at(batch=32, image=448, width=1024, depth=12, chunk=4096, dtype="bfloat16", quick=True, compile=True),
            at(batch=32, image=448, width=1024, depth=12, chunk=4096, dtype="bfloat16"),
        ),
        cpu=(
            at(batch=1, image=224, width=128, depth=3, chunk=64, dtype="float32", quick=True),
            at(batch=4, image=224, width=128, depth=3, chunk=256, dtype="float32", quick=True, compile=True),
            # what "auto" chooses, of more tokens than that
            at(batch=32, image=224, width=128, depth=3, chunk=4096, dtype="float32", quick=True),
        ),
        check_at_most={"batch": 4, "chunk": 1024},
    ),
)
