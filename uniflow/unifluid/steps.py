"""The transformer's steps in drawing: keys and values stay where they are, and on a GPU all steps are alike.

There a step is padded to the largest one and looks at all columns, also those of tokens not yet drawn, which nothing
sees: so one CUDA graph serves all steps but the first. Elsewhere a step looks no further than what is known.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uniflow.unifluid.attention import NEVER, Sight
from uniflow.unifluid.backbone import attend
from uniflow.unifluid.model import Slots, UniFluid
from uniflow_kernels.graphs import GraphCache, Reader, why_not_graph


class Steps:
    """What the transformer has seen of the rows of a drawing; called for each step.

    Args:
        model: in evaluation mode.
        rows: B.
        known: how many slots are known when all is drawn: those of the text, and all tokens.
        widest: the largest number of tokens that a step draws.
    """

    def __init__(self, model: UniFluid, rows: int, known: int, widest: int) -> None:
        self._backbone = model.backbone
        self._alike = all_alike(model.device)
        self._known, self._widest, self._seen = known, widest, 0
        # the last columns are those of queries, and where all steps are alike of what pads the tokens
        self._columns = known + widest * (2 if self._alike else 1)
        with torch.inference_mode(False):  # a graph, which is made outside of it, writes to them
            self._visible = torch.full((rows, self._columns), NEVER, device=model.device)
            self._others = torch.zeros_like(self._visible)
        self._cache = _cache_class()(self._columns)
        self._reader = Reader()
        self._graphs = GraphCache("a UniFluid's step in drawing")

    def __call__(self, new: Slots, queries: Slots) -> Tensor:
        """The states [B, K, D] of K queries.

        Args:
            new: what became known since the last step, and before the first one: text.
            queries: of the tokens that are to be drawn; no later step sees them.
        """
        first, asked, device = self._seen, queries.position.shape[1], new.position.device
        self._seen += new.position.shape[1]
        end = self._columns if self._alike else self._seen + asked
        columns = torch.arange(first, self._seen if self._alike else end, device=device)
        if self._alike and first:
            pads = torch.arange(end - self._widest + self._seen - first, end, device=device)
            columns = torch.cat([columns, pads])
            new, queries = _padded(new, self._widest), _padded(queries, self._widest)
        wide = queries.position.shape[1]
        if self._alike:
            columns = torch.cat([columns, torch.arange(self._known, self._known + wide, device=device)])

        def states(columns: Tensor, embedded: Tensor, position: Tensor, visible: Tensor, sees: Tensor) -> Tensor:
            self._visible.index_copy_(1, columns, visible)
            self._others.index_copy_(1, columns, position)
            self._cache.at(columns, end)
            sight = Sight(position, sees, columns, self._visible[:, :end], self._others[:, :end])
            return attend(self._backbone, embedded, sight, self._cache)[:, -wide:]

        inputs = [columns, *(torch.cat(part, 1) for part in zip(new, queries, strict=True))]
        return (self._replayed(states, inputs) if first else states(*inputs))[:, :asked]

    def end(self) -> None:
        """Drop what the steps were replayed from, once they are done."""
        self._graphs.clear()

    def _replayed(self, states: Callable[..., Tensor], inputs: list[Tensor]) -> Tensor:
        """states(*inputs), from a CUDA graph where that can be."""
        device = inputs[0].device
        if why_not_graph(device, inputs) is not None:
            return states(*inputs)
        read = self._reader(self._backbone)
        if read.hooked or why_not_graph(device, read.tensors) is not None:
            return states(*inputs)
        kept = [self._visible, self._others, *self._cache.tensors()]
        return self._graphs(states, inputs, [*read.tensors, *kept], None, read.structure)


def all_alike(device: torch.device) -> bool:
    """Whether all steps of a drawing have the same shapes: what a graph needs, and more work."""
    return device.type == "cuda"


def _padded(slots: Slots, size: int) -> Slots:
    """So many slots, of which those behind see nothing and are seen by none."""
    more = (0, size - slots.position.shape[1])
    return Slots(
        F.pad(slots.embedded, (0, 0, *more)),
        F.pad(slots.position, more),
        F.pad(slots.visible, more, value=NEVER),
        F.pad(slots.sees, more, value=-1),
    )


@lru_cache
def _cache_class() -> Any:
    """What layers of the transformers package take their keys and values from."""
    from transformers import Cache

    class Kept(Cache):
        """Keys and values [B, heads, columns, D] of each layer."""

        def __init__(self, columns: int) -> None:
            super().__init__(layers=[])
            self._columns = columns
            self._pairs: dict[int, list[Tensor]] = {}

        def at(self, columns: Tensor, end: int) -> None:
            """Which columns the next keys and values are, int64 [S], and up to where all are given."""
            self._at, self._end = columns, end

        def tensors(self) -> list[Tensor]:
            """All that is kept."""
            return [part for pair in self._pairs.values() for part in pair]

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
            """Keep those of a layer, [B, heads, S, D], and give all."""
            given = (key_states, value_states)
            if layer_idx not in self._pairs:
                with torch.inference_mode(False):  # zeros, since what nothing sees may not be NaN
                    self._pairs[layer_idx] = [
                        torch.zeros(*of.shape[:2], self._columns, of.shape[3], dtype=of.dtype, device=of.device)
                        for of in given
                    ]
            for kept, new in zip(self._pairs[layer_idx], given, strict=True):
                kept.index_copy_(2, self._at, new)
            return tuple(kept[:, :, : self._end] for kept in self._pairs[layer_idx])

        def get_seq_length(self, layer_idx: int = 0) -> int:
            """Asked for positions that are not said, which here they are."""
            return 0

    return Kept
