"""What a generator is trained on: latents of a set and their labels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from uniflow.data import Order, Sample, Samples
from uniflow.latent_set import LatentSet


class LatentSamples(Samples):
    """An endless stream of a set's latents, as they are stored, with their labels; every epoch has another order.

    Args:
        latents: the set.
        seed: the same seed gives the same stream.
        flip: whether half of them are those of mirror images.
        labels: whether labels go with them.

    Raises:
        ValueError: if the set has no latents of mirror images, or no labels, and they are asked for.
    """

    def __init__(self, latents: LatentSet, seed: int = 0, flip: bool = True, labels: bool = True) -> None:
        if flip and not latents.manifest.flips:
            raise ValueError(f"flip: {latents.folder} has no latents of mirror images; encode with --flip")
        if labels and latents.labels is None:
            raise ValueError(f"labels: {latents.folder} has none; its pictures are in no classes")
        self.latents = latents
        self.seed = seed
        self.flip = flip
        self.labels = labels
        self._order = Order(latents, seed)

    def __getitem__(self, position: int) -> Sample:
        """A latent [N, C] and its label, or the latent alone."""
        number = self._order.number(position)
        flipped = self.flip and bool(np.random.default_rng((self.seed, position)).random() < 0.5)
        latent = self.latents.latent(number, flipped)
        labels = self.latents.labels if self.labels else None
        value = (latent,) if labels is None else (latent, labels[number])
        return Sample(value, f"latent {number}", [])

    def collate(self, values: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """A batch: latents [B, N, C] and labels, int64 [B], or latents alone."""
        return tuple(map(torch.stack, zip(*values, strict=True)))
