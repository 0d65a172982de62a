"""Drawing: the image tokens of pictures, a few at a time, each drawn by the head under the transformer's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from uniflow.diffusion import Diffusion
from uniflow.diffusion import sample as sample_noise_predictor
from uniflow.foreign import transformers_package
from uniflow.normalization import to_uint8
from uniflow.unifluid.model import Earlier, UniFluid
from uniflow.unifluid.orders import draw_orders, group_sizes
from uniflow.unifluid.texts import no_text, padded, prompt_ids

if TYPE_CHECKING:
    from uniflow.unifluid.tokens import ImageTokenizer


def draw_pictures(
    model: UniFluid,
    tokenizer: ImageTokenizer,
    captions: Sequence[str],
    generator: torch.Generator | None = None,
    **how: Any,
) -> Tensor:
    """Pictures for captions.

    Args:
        model: in evaluation mode.
        tokenizer: the one whose tokens it was trained on.
        captions: B texts.
        generator: for all that is drawn, on the CPU or the model's device.
        how: further arguments of `draw_tokens`.

    Returns:
        uint8 [B, 3, H, W].

    Raises:
        ValueError: as `draw_tokens`.
    """
    prompts = [prompt_ids(model.text_tokenizer, caption) for caption in captions]
    ids, real = (part.to(model.device) for part in padded(prompts, model.text_tokenizer))
    tokens = draw_tokens(model, ids, real, generator=generator, **how)
    return to_uint8(tokenizer.decode(tokens, generator))


@torch.no_grad()
def draw_tokens(
    model: UniFluid,
    ids: Tensor,
    real: Tensor,
    steps: int | None = None,
    *,
    head_steps: int = 20,
    cfg: float = 1.0,
    temperature: float = 1.0,
    schedule: str = "linear",
    solver: str = "euler",
    order: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Image tokens for texts. The transformer's keys and values are kept from step to step.

    Args:
        model: in evaluation mode.
        ids: int64 [B, T], the texts, padded on the left.
        real: bool [B, T], False for padding.
        steps: in how many steps the tokens come; one token a step if not given. See `orders.group_sizes`.
        head_steps: of the head's sampler.
        cfg: guidance scale; 1 is none. It leads away from what the model expects without the text.
        temperature: of the head's noise, see `FlowHead.sample` and, for a "ddpm" head, `uniflow.diffusion.sample`.
        schedule, solver: see `FlowHead.sample`; not of a "ddpm" head.
        order: int64 [B, N], the places in the order in which they are drawn; drawn itself if not given.
        generator: for the order and the noise, on any device.

    Returns:
        [B, N, C] in raster order, as the image tokenizer makes them (not normalised), in float32.

    Raises:
        ValueError: if steps or shapes do not fit, or the text is too long.
    """
    batch, count = len(ids), model.config.tokens
    sizes = group_sizes(count, count if steps is None else steps)
    if order is None:
        order = draw_orders(batch, count, model.config.order, ids.device, generator)
    elif order.shape != (batch, count):
        raise ValueError(f"order: expected shape {(batch, count)}, got {tuple(order.shape)}")
    guided = cfg != 1.0
    if guided:  # once more without the text
        null = no_text(model.text_tokenizer, batch, ids.device)
        padding = (ids.shape[1] - null.shape[1], 0)
        ids = torch.cat([ids, F.pad(null, padding, value=model.text_tokenizer.pad_token_id)])
        real = torch.cat([real, F.pad(torch.ones_like(null, dtype=torch.bool), padding)])
        order = order.repeat(2, 1)
    how = _Head(head_steps, cfg, temperature, schedule, solver, generator)
    cache = transformers_package().DynamicCache()
    text, begin = ids.shape[1], real.sum(1, keepdim=True)
    slots = [model.text_slots(ids, real)]
    earlier, tokens = None, []
    first = 0
    for step, size in enumerate(sizes):
        places = order[:, first : first + size]
        group = torch.full_like(places, step)
        queries = model.query_slots(places, group, begin, text)
        states = model.states([*slots, queries], cache, earlier)[:, -size:]
        cache.crop(-size)  # no later step sees the queries
        new = how.draw(model, states)
        tokens.append(new)
        earlier = Earlier.of(slots, earlier)
        known = new.repeat(2, 1, 1) if guided else new
        slots = [model.content_slots(known, places, group, begin, text)]
        first += size
    drawn = torch.cat(tokens, dim=1)
    places = order[:batch].unsqueeze(-1).expand_as(drawn)
    return model.denormalized(torch.empty_like(drawn).scatter_(1, places, drawn))


class _Head(NamedTuple):
    """How the head is sampled; the names are those of `draw_tokens`."""

    head_steps: int
    cfg: float
    temperature: float
    schedule: str
    solver: str
    generator: torch.Generator | None

    def draw(self, model: UniFluid, states: Tensor) -> Tensor:
        """Tokens [B, K, C], normalised, under states [B, K, D], or [2B, K, D] with guidance."""
        condition, null = states.chunk(2) if self.cfg != 1.0 else (states, None)
        if model.config.head != "ddpm":
            tokens = model.head.sample(
                condition,
                self.head_steps,
                generator=self.generator,
                schedule=self.schedule,
                solver=self.solver,
                cfg=self.cfg,
                null_condition=null,
                temperature=self.temperature,
                time_scale=model.time_scale,
            )
        else:
            tokens = sample_noise_predictor(
                model.head,
                condition,
                Diffusion(self.head_steps),
                generator=self.generator,
                cfg=self.cfg,
                null_condition=null,
                temperature=self.temperature,
            )
        return tokens.float()
