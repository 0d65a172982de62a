"""Which slot of a sequence sees which, and the transformer's attention under it.

What a layer is told has one of two forms: a mask of all pairs, or where a model trains on a GPU blocks of 128 x 128
pairs, of which FlexAttention skips those that nothing sees. Both are made of one rule, `_seen`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from uniflow.foreign import transformers_package

if TYPE_CHECKING:
    from collections.abc import Callable

NEVER = 1 << 30  # when a slot is visible that no other one sees
_BLOCKS = "blocks_or_"  # before what the transformers package calls attention under a mask of all pairs


class Sight(NamedTuple):
    """Who sees whom: a slot sees its own column, and every column whose `visible` is at most its `sees`.

    Attributes:
        position: of the slots, for the layers' position embedding and windows, int64 [B, S].
        sees: up to when a slot sees, int64 [B, S].
        own: the column with a slot's own key and value, int64 [S].
        visible: from when on a column is seen, int64 [B, K].
        others: the columns' positions, int64 [B, K].
    """

    position: Tensor
    sees: Tensor
    own: Tensor
    visible: Tensor
    others: Tensor

    def rule(self, window: int | None) -> Callable[..., Tensor]:
        """A mask_mod of FlexAttention: rows, heads, slots and columns, int64 -> whether the slot sees the column.

        Within a window of W are the columns at a distance below W, before and behind.
        """
        position, sees, own, visible, others = self

        def seen(row: Tensor, _head: Tensor, slot: Tensor, column: Tensor) -> Tensor:
            there, at = position[row, slot], others[row, column]
            return _seen(there, sees[row, slot], own[slot], visible[row, column], at, column, window)

        return seen

    def dense(self, window: int | None = None) -> Tensor:
        """Of all pairs, bool [B, 1, S, K]."""
        columns = torch.arange(self.visible.shape[1], device=self.own.device)
        position, sees, own = (part.unsqueeze(-1) for part in (self.position, self.sees, self.own))
        visible, others = self.visible.unsqueeze(1), self.others.unsqueeze(1)
        return _seen(position, sees, own, visible, others, columns, window).unsqueeze(1)

    def blocks(self, window: int | None = None) -> BlockMask:
        """Which blocks of pairs a slot sees anything in, and the rule inside them; nothing here waits for a GPU."""
        rows, slots, columns = len(self.sees), len(self.own), self.visible.shape[1]
        return create_block_mask(self.rule(window), rows, None, slots, columns, self.own.device)


def _seen(
    position: Tensor, sees: Tensor, own: Tensor, visible: Tensor, others: Tensor, column: Tensor, window: int | None
) -> Tensor:
    """The rule, of a slot's numbers and a column's."""
    allowed = (visible <= sees) | (column == own)
    return allowed if window is None else allowed & ((position - others).abs() < window)


def attention_of(config: Any) -> str:
    """The attention that a language model is made with, by the name that the transformers package has for it.

    Args:
        config: its configuration.

    Soft-capped attention (Gemma 2) is not in scaled_dot_product_attention, and some models know nothing of that: they
    write it out. Where FlexAttention serves a model, its layers take it for masks in blocks.
    """
    transformers = transformers_package()
    model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    soft_caps = getattr(config, "attn_logit_softcapping", None)
    form = "sdpa" if model._supports_sdpa and not soft_caps else "eager"
    # without a soft cap a model that knows no sdpa has more in its softmax: attention sinks
    if not (model._supports_flex_attn and (model._supports_sdpa or soft_caps)):
        return form
    name = _BLOCKS + form
    transformers.AttentionInterface.register(name, _by_blocks_or(form))
    transformers.AttentionMaskInterface.register(name, _mask_makers()[form])
    return name


def why_not_blocks(backbone: Any, device: torch.device) -> str | None:
    """Why a language model does not train with masks in blocks on a device; None where it does."""
    config = backbone.config
    if device.type != "cuda":
        return f"FlexAttention trains on CUDA, not on {device.type}"
    if not config._attn_implementation.startswith(_BLOCKS):
        return f"the transformers package has no FlexAttention for a {config.model_type}"
    if getattr(config, "attention_dropout", 0.0):
        return "FlexAttention knows no attention_dropout"
    return None


def masks_for(backbone: Any, sight: Sight, windows: dict[str, int | None], dtype: torch.dtype, blocks: bool) -> Any:
    """A mask for each kind of layer.

    Args:
        backbone: the language model.
        sight: who sees whom.
        windows: of the kinds of layers; None is no window.
        dtype: of what the layers compute in.
        blocks: whether it has masks in blocks, see `why_not_blocks`.
    """
    if blocks:
        return {kind: sight.blocks(window) for kind, window in windows.items()}
    masks = {kind: sight.dense(window) for kind, window in windows.items()}
    if backbone.config._attn_implementation.endswith("sdpa"):
        return masks
    nothing = torch.zeros((), dtype=dtype, device=sight.own.device)
    return {kind: nothing.where(mask, torch.finfo(dtype).min) for kind, mask in masks.items()}


def _mask_makers() -> Any:
    """What makes the package's own masks, of text alone, for each form of attention."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS


def _by_blocks_or(form: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Attention as the package calls it, by FlexAttention under a mask in blocks and else in the form that it names."""
    interface = transformers_package().AttentionInterface()

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | BlockMask | None, **how: Any
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(attention_mask, BlockMask):
            # under autocast positions were put in float32, and FlexAttention casts nothing
            query, key = query.to(value.dtype), key.to(value.dtype)
            return interface["flex_attention"](module, query, key, value, attention_mask, **how)
        # each model's own file has its attention written out
        plain = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return interface.get_interface(form, plain)(module, query, key, value, attention_mask, **how)

    return attention
