"""Drawing: the image tokens of pictures, a few at a time, each drawn by the head under the transformer's state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from uniflow.diffusion import Diffusion
from uniflow.diffusion import sample as sample_noise_predictor
from uniflow.normalization import normalize, to_uint8
from uniflow.unifluid.guidance import guidance_scales
from uniflow.unifluid.model import UniFluid
from uniflow.unifluid.orders import draw_orders, group_sizes
from uniflow.unifluid.places import Grid
from uniflow.unifluid.slots import picture_slots
from uniflow.unifluid.steps import Steps
from uniflow.unifluid.texts import no_text, padded, prompt_ids
from uniflow_kernels.modules.sampling import Conditioned, normal, replayed
from uniflow_kernels.solvers import Plan, guide, integrate

if TYPE_CHECKING:
    from uniflow.unifluid.features import VisionFeatures
    from uniflow.unifluid.tokens import ImageTokenizer


class Sources(NamedTuple):
    """What a drawing sees of other pictures, those of all rows one after the other.

    features: [P, M, vision_channels]; None for a model that sees none.
    clean: image tokens [P, N, C], normalised, in raster order; None likewise.
    """

    features: Tensor | None
    clean: Tensor | None

    def repeated(self, rows: int) -> Sources:
        """The same for each of so many rows."""
        return Sources(*(None if part is None else part.repeat(rows, 1, 1) for part in self))


@torch.no_grad()
def see_sources(
    model: UniFluid, tokenizer: ImageTokenizer, vision: VisionFeatures | None, sources: Tensor, seen: Tensor
) -> Sources:
    """What a model sees of pictures that it is to draw from.

    Args:
        model: made with `sources`.
        tokenizer: the one whose tokens it was trained on.
        vision: the encoder whose features it was trained on; None for a model that sees clean tokens alone.
        sources: uint8 [P, 3, H, W], of the tokenizer's size.
        seen: uint8 [P, 3, H', W'], the same pictures at the encoder's size.

    Raises:
        ValueError: of a model that draws from text alone, or without a vision encoder that it needs.
    """
    wanted = model.config.sources
    if wanted is None:
        raise ValueError("sources: the model draws from text alone")
    features = None
    if wanted in ("features", "both"):
        if vision is None:
            raise ValueError("vision: the model sees features of its sources, expected their encoder")
        features = vision(normalize(seen))
    clean = None if wanted == "features" else model.normalized(tokenizer.encode(normalize(sources)))
    return Sources(features, clean)


def draw_pictures(
    model: UniFluid,
    tokenizer: ImageTokenizer,
    captions: Sequence[str],
    generator: torch.Generator | None = None,
    sources: Sources | None = None,
    **how: Any,
) -> Tensor:
    """Pictures for captions.

    Args:
        model: in evaluation mode.
        tokenizer: the one whose tokens it was trained on; at one of its sizes if it draws several, see `at_size`.
        captions: B texts.
        generator: for all that is drawn, on the CPU or the model's device.
        sources: what is seen of other pictures (`see_sources`), as many for each caption.
        how: further arguments of `draw_tokens`.

    Returns:
        uint8 [B, 3, H, W].

    Raises:
        ValueError: as `draw_tokens`; if the sources are no multiple of the captions.
    """
    before: list[int] = []
    if sources is not None:
        given = [part for part in sources if part is not None]
        count, rest = divmod(len(given[0]), max(1, len(captions)))
        if rest:
            raise ValueError(f"sources: expected as many for each of {len(captions)} captions, got {len(given[0])}")
        features, clean = (0 if part is None else part.shape[1] for part in sources)
        before = picture_slots(features, clean) * count
    prompts = [prompt_ids(model.text_tokenizer, caption, before) for caption in captions]
    ids, real = (part.to(model.device) for part in padded(prompts, model.text_tokenizer))
    tokens = draw_tokens(model, ids, real, sources=sources, grid=tokenizer.grid, generator=generator, **how)
    return to_uint8(tokenizer.decode(tokens, generator))


@torch.no_grad()
def draw_tokens(
    model: UniFluid,
    ids: Tensor,
    real: Tensor,
    steps: int | None = None,
    *,
    sources: Sources | None = None,
    head_steps: int = 20,
    cfg: float = 1.0,
    cfg_source: float = 1.0,
    cfg_schedule: str = "constant",
    temperature: float = 1.0,
    schedule: str = "linear",
    solver: str = "euler",
    order: Tensor | None = None,
    grid: Grid | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Image tokens for texts. The transformer's keys and values are kept from step to step.

    Guidance is v(none) + cfg_source * (v(sources) - v(none)) + cfg * (v(sources, text) - v(sources)), with the head's
    velocities v under what is in the brackets. Without sources, and with a cfg_source of 1, it has one scale.

    Args:
        model: in evaluation mode.
        ids: int64 [B, T], the texts, padded, the slots of sources before them, see `texts.prompt_ids` and `padded`.
        real: bool [B, T], False for padding.
        steps: in how many steps the tokens come; one token a step if not given. See `orders.group_sizes`.
        sources: what is seen of other pictures, see `see_sources`.
        head_steps: of the head's sampler.
        cfg: guidance scale of the text; 1 is none.
        cfg_source: guidance scale of the sources; 1 is none. Other values take a third pass, of a "flow" head alone.
        cfg_schedule: what becomes of both scales from step to step, see `uniflow.unifluid.guidance.guidance_scales`.
        temperature: of the head's noise, see `FlowHead.sample` and, for a "ddpm" head, `uniflow.diffusion.sample`.
        schedule, solver: see `FlowHead.sample`; not of a "ddpm" head.
        order: int64 [B, N], the places in the order in which they are drawn; drawn itself if not given.
        grid: lines of the pictures' tokens, and tokens a line; the config's if not given.
        generator: for the order and the noise, on any device.

    Returns:
        [B, N, C] in raster order, as the image tokenizer makes them (not normalised), in float32.

    Raises:
        ValueError: if steps or shapes do not fit, the text is too long, there are not as many features or tokens of
            sources as slots for them; for a cfg_source without sources, or of another head; for an unknown
            cfg_schedule, and for a grid that the model does not draw.

    Source: the two scales are those of InstructPix2Pix (Brooks et al. 2023, eq. 3).
    """
    grid = model.config.known_grid(grid)
    batch, count = len(ids), grid[0] * grid[1]
    sizes = group_sizes(count, count if steps is None else steps)
    of_text, of_sources = (guidance_scales(scale, sizes, cfg_schedule) for scale in (cfg, cfg_source))
    if order is None:
        order = draw_orders(batch, count, model.config.order, ids.device, generator)
    elif order.shape != (batch, count):
        raise ValueError(f"order: expected shape {(batch, count)}, got {tuple(order.shape)}")
    seen = Sources(None, None) if sources is None else sources
    model.check_slots(ids, *seen)
    prompts = [(ids, real)]
    if cfg_source != 1.0:
        if sources is None or model.config.head != "flow":
            raise ValueError(f"cfg_source: expected 1 without sources, or of a head that is no flow; got {cfg_source}")
        prompts += [_without_text(model, ids, real), _without_text(model, ids, real & (ids >= 0))]
    elif cfg != 1.0:
        prompts.append(_without_text(model, ids, real))
    branches = len(prompts)
    with_sources = min(branches, 2)  # those that have their slots
    features, clean = seen.repeated(with_sources)
    ids, real = (torch.cat(parts) for parts in zip(*prompts, strict=True))
    order = order.repeat(branches, 1)
    how = _Head(branches, head_steps, temperature, schedule, solver, generator)
    text, begin = ids.shape[1], real.sum(1, keepdim=True)
    transformer = Steps(model, len(ids), text + count, max(sizes))
    slots = model.text_slots(ids, real, features, clean, grid)
    tokens, first = [], 0
    for step, size in enumerate(sizes):
        places = order[:, first : first + size]
        group = torch.full_like(places, step)
        queries = model.query_slots(places, group, begin, text, grid)
        new = how.draw(model, transformer(slots, queries), of_text[step], of_sources[step])
        tokens.append(new)
        slots = model.content_slots(new.repeat(branches, 1, 1), places, group, begin, text, grid)
        first += size
    transformer.end()
    drawn = torch.cat(tokens, dim=1)
    places = order[:batch].unsqueeze(-1).expand_as(drawn)
    return model.denormalized(torch.empty_like(drawn).scatter_(1, places, drawn))


def _without_text(model: UniFluid, ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts of which only the slots of sources are left, and what stands for a dropped text."""
    kept = real & (ids < 0)
    left = no_text(model.text_tokenizer, len(ids), ids.device)
    ids, real = ids.where(kept, model.text_tokenizer.pad_token_id), kept.clone()
    first = ids.shape[1] - left.shape[1]
    ids[:, first:], real[:, first:] = left, True
    return ids, real


class _Head(NamedTuple):
    """How the head is sampled: under how many states a token, and as the arguments of `draw_tokens` say."""

    branches: int
    head_steps: int
    temperature: float
    schedule: str
    solver: str
    generator: torch.Generator | None

    def draw(self, model: UniFluid, states: Tensor, cfg: float, cfg_source: float) -> Tensor:
        """Tokens [B, K, C], normalised, under states [B, K, D], or [2B, K, D] and [3B, K, D] with guidance."""
        if self.branches == 3:
            return self._guided_by_both(model, states, cfg, cfg_source).float()
        condition, null = states.chunk(2) if self.branches == 2 else (states, None)
        if model.config.head != "ddpm":
            tokens = model.head.sample(
                condition,
                self.head_steps,
                generator=self.generator,
                schedule=self.schedule,
                solver=self.solver,
                cfg=cfg,
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
                cfg=cfg,
                null_condition=null,
                temperature=self.temperature,
            )
        return tokens.float()

    def _guided_by_both(self, model: UniFluid, states: Tensor, cfg: float, cfg_source: float) -> Tensor:
        """Under states with sources and text, with sources, and with neither, in one pass of the head a step."""
        head, plan = model.head, Plan(self.head_steps, self.schedule, self.solver)
        plan.check()
        shape = (len(states) // 3, states.shape[1], model.config.token_channels)
        noise = normal(shape, states.device, self.generator) * self.temperature

        def steps_of(noise: Tensor, states: Tensor) -> Tensor:
            times = {t: model.time_scale * t for t in plan.times()}
            conditioned = Conditioned(head, states, list(times.values()))

            def velocity(x: Tensor, t: float) -> Tensor:
                both, source, none = conditioned(x.repeat(3, 1, 1), times[t]).chunk(3)
                return guide(source, none, cfg_source) + cfg * (both - source)

            return integrate(velocity, noise, plan.steps, plan.schedule, plan.solver).to(states.dtype)

        return replayed(head, steps_of, (noise, states), (plan, cfg, cfg_source, model.time_scale))
