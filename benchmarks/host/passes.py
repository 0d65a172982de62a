"""What a block of the flow head costs on each path, and a chunk of the head's training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.case import randomised
from benchmarks.host import Timed
from uniflow_kernels import FlowHead, flow_matching_loss
from uniflow_kernels.modules import chunks, flow_head
from uniflow_kernels.ops.flow_blocks import Affine, Block, Form, FromLayers
from uniflow_kernels.ops.flow_passes import Pass

ROWS, WIDTH, PATCH, DEPTH = 16, 64, 2, 6
_LINES = 4  # of patches of an image
_SHORT = 2  # blocks of the stack that is taken away from one of DEPTH


def blocks(device: torch.device) -> Iterator[Timed]:
    """A block's forward pass as in inference and as in training, and its backward pass, on both paths.

    The time of a stack of blocks, less that of a shorter one, by the number of blocks between them.
    """
    for path in ("rows", "products"):
        for name, keep in (("inference", "nothing"), ("training", "all")):
            yield _a_block(f"block forward in {name}, {path}", partial(_forward, path=path, keep=keep), device)
        yield _a_block(f"block backward, {path}", partial(_backward, path=path), device)


def chunk(device: torch.device) -> Iterator[Timed]:
    """A chunk of `flow_matching_loss` with its gradients, of a head of 12 blocks: four chunks less two, by two."""
    row = 3 * PATCH**2
    kinds = {
        "": (torch.bfloat16, "rows"),
        ", products": (torch.bfloat16, "products"),
        ", a float32 head under autocast": (torch.float32, "rows"),
    }
    with patch.object(chunks, "_launches", lambda tensor: True):  # gradients are added as on a GPU
        for kind, (dtype, path) in kinds.items():
            head = randomised(FlowHead(row, WIDTH, row, WIDTH, 12), dtype).to(device)
            four, two = (partial(_loss, head, *_batch(count, dtype, device), path) for count in (4, 2))
            yield Timed(f"chunk of flow_matching_loss{kind}", four, two, per=2)


def _a_block(name: str, stack: Callable[[torch.device, int], Callable[[], object]], device: torch.device) -> Timed:
    return Timed(name, stack(device, DEPTH), stack(device, _SHORT), DEPTH - _SHORT)


def _stack(device: torch.device, depth: int, keep: str) -> Pass:
    empty = partial(torch.zeros, dtype=torch.bfloat16, device=device)

    def affine(out: int) -> Affine:
        return Affine(empty(out, WIDTH), empty(out))

    each = [Block(Affine(empty(WIDTH), empty(WIDTH)), affine(WIDTH), affine(WIDTH)) for _ in range(depth)]
    layers = FromLayers(empty(ROWS, WIDTH), [affine(3 * WIDTH) for _ in range(depth)], affine(2 * WIDTH))
    return Pass(empty(ROWS, WIDTH), each, layers, Form(), keep=keep)


def _forward(device: torch.device, depth: int, path: str, keep: str) -> Callable[[], object]:
    return partial(_stack(device, depth, keep).forward, path)


def _backward(device: torch.device, depth: int, path: str) -> Callable[[], object]:
    stack = _stack(device, depth, "all")
    out, kept = stack.forward(path)
    return partial(stack.backward, torch.zeros_like(out), stack.unflatten(kept), weight_gradients=True, path=path)


def _loss(head: FlowHead, condition: Tensor, images: Tensor, t: Tensor, path: str) -> None:
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=condition.dtype == torch.float32)
    with patch.object(flow_head, "choose_path", lambda call, *_: path), autocast:
        loss = flow_matching_loss(head, condition, images, t, PATCH, seed=1, time_scale=1000.0, chunk_tokens=_LINES**2)
    loss.backward()


def _batch(images: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    pictures = torch.zeros(images, 3, _LINES * PATCH, _LINES * PATCH, device=device)
    condition = torch.zeros(images, _LINES**2, WIDTH, dtype=dtype, device=device).requires_grad_()
    return condition, pictures, torch.zeros(images, _LINES**2, device=device)
