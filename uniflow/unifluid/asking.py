"""Asking: answers to questions about pictures, by the generation of the transformers package; how likely some are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from uniflow.unifluid.conversations import PICTURE, Turn, conversation_ids, end_tokens
from uniflow.unifluid.model import UniFluid
from uniflow.unifluid.slots import picture_slots
from uniflow.unifluid.texts import padded, padded_marks


@torch.no_grad()
def answer(model: UniFluid, features: Tensor, ids: Tensor, real: Tensor, longest: int = 64, **how: Any) -> list[str]:
    """Answers to questions about pictures, greedily unless `how` says otherwise.

    Args:
        model: in evaluation mode.
        features: [T, M, vision_channels], of the tiles of the pictures of all rows, one after the other.
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


@torch.no_grad()
def log_likelihoods(
    model: UniFluid, features: Tensor, conversations: Sequence[Sequence[Turn]], tiles: Sequence[int] | None = None
) -> Tensor:
    """How likely the model would answer so: log p(the assistant's turns, each with its end | all that stands before).

    Args:
        model: in evaluation mode.
        features: [T, M, vision_channels], of the tiles of the pictures of all conversations, one after the other.
        conversations: B of them, see `uniflow.unifluid.conversations.conversation_ids`.
        tiles: of each picture; one if not given.

    Returns:
        [B], float32: natural logarithms, summed over the ids of the answers.

    Raises:
        ValueError: for conversations that cannot be, shapes that do not fit together, or too short a context.
    """
    tokenizer = model.text_tokenizer
    counts = [sum(turn.text.count(PICTURE) for turn in turns) for turns in conversations]
    slots = iter(picture_slots(features.shape[1] * count) for count in tiles or [1] * sum(counts))
    found = [
        conversation_ids(tokenizer, turns, list(islice(slots, count)))
        for turns, count in zip(conversations, counts, strict=True)
    ]
    rows = [torch.tensor(ids) for ids, _ in found]
    ids, real = (part.to(features.device) for part in padded(rows, tokenizer))
    answers = padded_marks(rows, [torch.tensor(predicted) for _, predicted in found])
    last = ids.shape[1] - int(answers.any(0).nonzero()[0])
    logits = model.answer_logits(features, ids, real, last).float()
    chosen = logits.log_softmax(-1).gather(2, ids[:, -last:].clamp(min=0).unsqueeze(2)).squeeze(2)  # slots are below 0
    return chosen.where(answers[:, -last:].to(chosen.device), 0).sum(1)
