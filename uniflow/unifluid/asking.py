"""Asking: answers to questions about pictures, by the generation of the transformers package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uniflow.unifluid.conversations import end_tokens
from uniflow.unifluid.model import UniFluid


@torch.no_grad()
def answer(model: UniFluid, features: Tensor, ids: Tensor, real: Tensor, longest: int = 64, **how: Any) -> list[str]:
    """Answers to questions about pictures, greedily unless `how` says otherwise.

    Args:
        model: in evaluation mode.
        features: [P, M, vision_channels], of the pictures of all rows, one after the other.
        ids: int64 [B, T], the questions, see `uniflow.unifluid.conversations.question_ids` and `texts.padded`.
        real: bool [B, T], False for padding.
        longest: number of ids an answer may have, where the context has room for them.
        how: arguments of transformers' `generate`, such as do_sample, temperature, num_beams.

    Raises:
        ValueError: if the shapes do not fit together, or the context has no room for an answer.
    """
    room = model.check_context(ids.shape[1] + 1) + 1
    model.check_slots(ids, features)
    embedded, mask = model.question(features, ids, real)
    tokenizer = model.text_tokenizer
    found = model.backbone.generate(
        inputs_embeds=embedded,
        attention_mask=mask,
        max_new_tokens=min(longest, room),
        eos_token_id=end_tokens(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        **{"do_sample": False, **how},
    )
    return [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]
