"""The transformer's steps in drawing: keys and values stay where they are, and on a GPU all steps are alike.

There a step is padded to the largest one and looks at all columns, those not known yet too, which nothing sees: so one
CUDA graph serves all steps but the first. Elsewhere it looks no further than what is known.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uniflow.foreign import transformers_package
from uniflow.unifluid.attention import NEVER, Sight
from uniflow.unifluid.backbone import attend
from uniflow.unifluid.model import Slots, UniFluid
from uniflow_kernels.graphs import GraphCache, Reader, why_not_graph


class Steps:
    """What a drawing's transformer has seen, and its next step.

    Args:
        model: in evaluation mode.
        rows: B.
        known: how many slots will be known when all is drawn, text and tokens.
        widest: the largest number of tokens that a step draws.
    """

    def __init__(self, model: UniFluid, rows: int, known: int, widest: int) -> None:
        self.backbone = model.backbone
        self.alike = all_alike(model.device)
        self.widest = widest
        self.known, self.seen = known, 0
        # behind what is known have their columns the queries and, where steps are padded, what pads them
        columns = known + widest * (2 if self.alike else 1)
        self.visible = torch.full((rows, columns), NEVER, device=model.device)
        self.others = torch.zeros_like(self.visible)
        self.cache = _cache_class()(columns)
        self.reader = Reader()
        self.graphs = GraphCache("a transformer's step in drawing")

    def __call__(self, new: Slots, queries: Slots) -> Tensor:
        """The states [B, K, D] of K queries.

        Args:
            new: what is known since the last step, or at first: text.
            queries: of the tokens that are drawn in this step; no later step sees them.
        """
        first, size, asked = self.seen, new.position.shape[1], queries.position.shape[1]
        self.seen += size
        device = new.position.device
        own = torch.arange(first, self.seen, device=device)
        behind = self.known if self.alike else self.seen
        if self.alike and first:
            pads = torch.arange(self.known + self.widest + size, self.known + 2 * self.widest, device=device)
            own = torch.cat([own, pads])
            new, queries = padded_slots(new, self.widest), padded_slots(queries, self.widest)
        wide = queries.position.shape[1]
        own = torch.cat([own, torch.arange(behind, behind + wide, device=device)])
        inputs = [own, *(torch.cat(part, 1) for part in zip(new, queries, strict=True))]
        end = self.visible.shape[1] if self.alike else behind + wide

        def states(own: Tensor, embedded: Tensor, position: Tensor, visible: Tensor, sees: Tensor) -> Tensor:
            self.visible.index_copy_(1, own, visible)
            self.others.index_copy_(1, own, position)
            self.cache.at(own, end)
            sight = Sight(position, sees, own, self.visible[:, :end], self.others[:, :end])
            return attend(self.backbone, embedded, sight, self.cache)[:, -wide:]

        return self._replayed(states, inputs, bool(first))[:, :asked]

    def _replayed(self, states: Any, inputs: list[Tensor], is_alike: bool) -> Tensor:
        """states(*inputs), from a CUDA graph where that can be."""
        if not is_alike or why_not_graph(inputs[0].device, inputs) is not None:
            return states(*inputs)
        read = self.reader(self.backbone)
        if read.hooked or why_not_graph(inputs[0].device, read.tensors) is not None:
            return states(*inputs)
        kept = [self.visible, self.others, *self.cache.tensors()]
        return self.graphs(states, inputs, [*read.tensors, *kept], None, read.structure)


def all_alike(device: torch.device) -> bool:
    """Whether all steps of a drawing have the same shapes, which is more work, and what graphs need."""
    return device.type == "cuda"


def padded_slots(slots: Slots, size: int) -> Slots:
    """So many slots; those behind see nothing and are seen by none."""
    more = (0, size - slots.position.shape[1])
    return Slots(
        F.pad(slots.embedded, (0, 0, *more)),
        F.pad(slots.position, more),
        F.pad(slots.visible, more, value=NEVER),
        F.pad(slots.sees, more, value=-1),
    )


@lru_cache
def _cache_class() -> Any:
    class Kept(transformers_package().Cache):
        """Keys and values [B, heads, columns, D] of each layer, written where `at` says and read up to an end."""

        def __init__(self, columns: int) -> None:
            super().__init__(layers=[])
            self.columns = columns
            self.pairs: dict[int, tuple[Tensor, Tensor]] = {}

        def at(self, own: Tensor, end: int) -> None:
            self.own, self.end = own, end

        def tensors(self) -> list[Tensor]:
            return [part for pair in self.pairs.values() for part in pair]

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
            if layer_idx not in self.pairs:  # nothing that is not there is seen, but zero times NaN would be
                self.pairs[layer_idx] = tuple(
                    part.new_zeros(*part.shape[:2], self.columns, part.shape[3]) for part in (key_states, value_states)
                )
            kept = self.pairs[layer_idx]
            for part, given in zip(kept, (key_states, value_states), strict=True):
                part.index_copy_(2, self.own, given)
            return tuple(part[:, :, : self.end] for part in kept)

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return 0

    return Kept
