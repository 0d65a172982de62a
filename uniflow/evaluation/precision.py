"""What products in a lower precision do to a UniFlow's numbers: it beside the same model in full precision."""

from __future__ import annotations

import torch
from torch import Tensor

from uniflow.model import UniFlow


@torch.inference_mode()
def cosines(lowered: UniFlow, exact: UniFlow, images: Tensor) -> dict[str, Tensor]:
    """Cosine similarities between two models' numbers, each model working on its own from the images on.

    Args:
        lowered, exact: of one config.
        images: [B, C, H, W], normalised.

    Returns:
        By name, the mean over a picture's tokens, [B] in float32: "layer 1" and so on for each layer's output (class
        and register tokens too), "latents", "block 1" and so on for each global block's, and "condition", what the flow
        head is given.
    """
    found = {}
    pairs = zip(lowered.layer_states(images), exact.layer_states(images), strict=True)
    for number, (ours, theirs) in enumerate(pairs, start=1):
        found[f"layer {number}"] = _cosine(ours, theirs)
    ours, theirs = lowered.latents(ours), exact.latents(theirs)
    found["latents"] = _cosine(ours, theirs)
    size = (images.shape[-2], images.shape[-1])
    of_both = (_conditions(model, latents, size) for model, latents in ((lowered, ours), (exact, theirs)))
    for number, (ours, theirs) in enumerate(zip(*of_both, strict=True), start=1):
        found["condition" if number > len(exact.global_blocks) else f"block {number}"] = _cosine(ours, theirs)
    return found


def _conditions(model: UniFlow, latents: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """The output of each global block, and the condition."""
    states: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *of: states.append(of[-1])) for block in model.global_blocks]
    try:
        condition = model.condition(latents, size)
    finally:
        for hook in hooks:
            hook.remove()
    return [*states, condition]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """[B, N, D] twice -> [B]."""
    return torch.cosine_similarity(a.float(), b.float(), dim=-1).mean(1)
