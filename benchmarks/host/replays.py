"""What calls cost in Python before their CUDA graph is replayed; on a CPU the graphs are ones that do nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.host import Timed
from uniflow import UniFlow, UniFlowConfig, encoding, sampler
from uniflow_kernels import FlowHead, backend, graphs
from uniflow_kernels.modules import sampling


def replays(device: torch.device) -> Iterator[Timed]:
    """A call of a decoder, of an encoder and of `FlowHead.sample`, at the size of the base preset."""
    with _graphs_that_do_nothing() if device.type == "cpu" else ExitStack(), torch.no_grad():
        on = torch.device("meta") if device.type == "cpu" else device
        with on:
            model = UniFlow(UniFlowConfig.preset("base")).to(torch.bfloat16).eval()
            images, latents = (torch.empty(shape, dtype=model.dtype) for shape in ((1, 3, 448, 448), (1, 1024, 64)))
            seeds = torch.zeros(1, dtype=torch.int64)
        head = FlowHead(16, 1024, 16, 1024, 12).to(device)
        condition, noise = torch.zeros(1, 1024, device=device), torch.zeros(1, 16, device=device)
        calls = {
            "decoder": partial(model.compile_decoder(1), latents, seed=seeds),
            "encoder": partial(model.compile_encoder(1), images),
            "FlowHead.sample": partial(head.sample, condition, 10, noise=noise),
        }
        for name, call in calls.items():
            for _ in range(2):  # the second of a kind is captured
                call()
            yield Timed(f"{name}, before its replay", call)


@contextmanager
def _graphs_that_do_nothing() -> Iterator[None]:
    with ExitStack() as pretended:
        for module in (sampler, encoding, sampling):
            pretended.enter_context(patch.object(module, "why_not_graph", lambda device, read: None))
        for name in ("Graph", "Place"):
            pretended.enter_context(patch.object(graphs, name, _Nothing))
        # nor does what is called before a capture
        pretended.enter_context(backend("eager"))
        for kind, name in ((sampler.Sampler, "__call__"), (UniFlow, "encode")):
            pretended.enter_context(patch.object(kind, name, lambda *inputs, **how: torch.empty(0)))
        yield


class _Nothing:
    """A graph, or its place."""

    def __init__(self, *what: Any) -> None:
        self.output = torch.empty(0)

    def __call__(self, inputs: Sequence[Tensor | None]) -> Tensor:
        return self.output

    def wait(self) -> None:
        pass
