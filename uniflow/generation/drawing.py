"""Drawing latents: noise is followed along the generator's velocity, each picture's from seeds of its own number."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from uniflow.generation.model import FlowTransformer
from uniflow.model import UniFlow
from uniflow_kernels import seeded_noise
from uniflow_kernels.solvers import Plan, guide, integrate


@torch.no_grad()
def draw_latents(
    model: FlowTransformer, seeds: Tensor, labels: Tensor | None, plan: Plan, temperature: float = 1.0
) -> Tensor:
    """Latents as the tokenizer decodes them.

    Args:
        model: in evaluation mode.
        seeds: of the pictures' noise, int64 [B].
        labels: int64 [B], from 0; the number of classes stands for none. Without them no picture has one.
        plan: steps, schedule, solver and guidance, which leads away from what is expected without a label; see
            `usual_schedule`.
        temperature: what the noise is multiplied by.

    Returns:
        [B, N, C], in float32, not standardised.

    Raises:
        ValueError: for a plan that cannot be, for guidance of a model without classes, and for a label out of range.
    """
    plan.check()
    config = model.config
    check_labels(model, labels)
    if plan.cfg != 1.0 and config.classes is None:
        raise ValueError(f"cfg: expected 1 for a generator without classes, which has nothing to guide, got {plan.cfg}")
    seeds = seeds.to(model.device)
    noise = seeded_noise(len(seeds) * config.tokens, config.latent_channels, seeds, device=model.device)
    noise = noise.view(len(seeds), config.tokens, config.latent_channels) * temperature
    if labels is not None:
        labels = labels.to(model.device)
    both = None
    if plan.cfg != 1.0 and config.classes is not None:
        none = torch.full_like(seeds, config.classes)
        both = torch.cat([none if labels is None else labels, none])

    def velocity(x: Tensor, t: float) -> Tensor:
        time = torch.full((), t, dtype=torch.float32, device=x.device)
        if both is None or not plan.guides_at(t):
            return model(x, time, labels).float()
        conditional, null = model(torch.cat([x, x]), time, both).float().chunk(2)
        return guide(conditional, null, plan.cfg)

    return model.restored(integrate(velocity, noise, plan.steps, plan.schedule, plan.solver))


def usual_schedule(model: FlowTransformer) -> str:
    """The schedule of a sampler that goes with the noise levels that the model was trained at."""
    shift = model.config.noise_shift
    return "linear" if shift == 1.0 else f"shifted_{shift}"


def picture_size(model: FlowTransformer, tokenizer: UniFlow) -> tuple[int, int]:
    """(H, W) in pixels of what a generator draws."""
    lines, across = model.config.grid
    patch = tokenizer.config.patch_size
    return lines * patch, across * patch


def check_labels(model: FlowTransformer, labels: Tensor | None) -> None:
    """Raise a ValueError unless labels are a model's."""
    classes = model.config.classes
    if labels is None:
        return
    if classes is None:
        raise ValueError("labels: the generator was made without classes, expected none")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= classes:
        raise ValueError(
            f"labels: expected numbers from 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}"
        )


def picture_seeds(seed: int, numbers: range | list[int]) -> tuple[Tensor, Tensor]:
    """Seeds of pictures by their numbers alone: of the latents' noise and of the decoder's, int64 [B] each."""
    words = [np.random.SeedSequence((seed, number)).generate_state(2, np.uint64) for number in numbers]
    both = np.array(words, np.uint64).reshape(-1, 2) >> np.uint64(1)  # in [0, 2^63)
    latents, decoder = torch.from_numpy(both.astype(np.int64)).unbind(1)
    return latents, decoder
