"""Inception Score: how sure a classifier is of each generated picture, and how many classes it finds among them."""

from __future__ import annotations

import torch
from torch import Tensor

SPLITS = 10  # of Salimans et al.


class InceptionScore:
    """exp of the mean over pictures of KL(p(class | picture) || p(class)), for each of some splits of the pictures.

    Probabilities are added batch by batch, in float64, and not kept. A picture's split is that of its place in a
    permutation of all which is always the same, since folders are in the order of their classes: of a split of a few
    classes p(class) would be another. The same batches in the same order give the same bits.

    Source: Salimans et al., "Improved Techniques for Training GANs" (2016); splits are cut as in its code.

    Args:
        pictures: how many there are.
        splits: of how many the mean and deviation are.
    """

    def __init__(self, pictures: int, splits: int = SPLITS) -> None:
        order = torch.randperm(pictures, generator=torch.Generator().manual_seed(0))
        self._split_of = torch.empty(pictures, dtype=torch.int64)
        for split in range(splits):
            self._split_of[order[split * pictures // splits : (split + 1) * pictures // splits]] = split
        self._counts = torch.zeros(splits, dtype=torch.float64)
        self._certain = torch.zeros(splits, dtype=torch.float64)  # sums of p log p
        self._together: Tensor | None = None  # sums of p, [splits, classes]

    def add(self, places: Tensor, probabilities: Tensor) -> None:
        """Add pictures.

        Args:
            places: of the pictures among all, int64 [B].
            probabilities: of their classes, [B, classes], on the CPU.
        """
        likely, split = probabilities.double(), self._split_of[places]
        if self._together is None:
            self._together = likely.new_zeros(len(self._counts), likely.shape[1])
        self._together.index_add_(0, split, likely)
        self._certain.index_add_(0, split, torch.xlogy(likely, likely).sum(1))
        self._counts.index_add_(0, split, torch.ones_like(split, dtype=torch.float64))

    def result(self) -> tuple[float, float] | None:
        """Mean over the splits and their standard deviation (of the population); None if a split has no picture."""
        if self._together is None or not self._counts.all():
            return None
        shared = self._together / self._counts[:, None]
        scores = (self._certain / self._counts - torch.xlogy(shared, shared).sum(1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()
