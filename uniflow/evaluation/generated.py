"""Sets of pictures by a network's features: what FID, Inception Score, precision and recall are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uniflow.evaluation.frechet import FeatureStatistics
from uniflow.evaluation.inception_score import InceptionScore
from uniflow.evaluation.networks import FeatureNetwork


@dataclass(frozen=True)
class Judged:
    """Of a batch, on the CPU: places among all pictures, int64 [B], features [B, D], and probabilities [B, classes]."""

    places: Tensor
    features: Tensor
    probabilities: Tensor | None


class PictureSet:
    """The statistics of a set's features, some of the features themselves, and its Inception Score.

    Args:
        network: of the features.
        pictures: how many there are, some of which it may not be possible to read.
        kept: of at most how many the features are kept, evenly over the set, 4 D bytes each; of none if 0.
        scored: whether the Inception Score is wanted, where the network gives probabilities.

    Attributes:
        places: of the pictures that there were, in order.
    """

    def __init__(self, network: FeatureNetwork, pictures: int, kept: int, scored: bool) -> None:
        self.network, self.scored = network, scored
        self.places: list[int] = []
        self.inception = InceptionScore(pictures)
        self._statistics: FeatureStatistics | None = None
        self._features: list[Tensor] = []
        # one of each of as many equal parts of the set as are kept
        shares = torch.arange(pictures + 1) * min(kept, pictures) // max(1, pictures)
        self._is_kept = shares[1:] > shares[:-1]

    def of(self, places: Tensor, pictures: Tensor) -> Judged:
        """Judge pictures, uint8 [B, 3, H, W], in whichever process; their places are int64 [B].

        Raises:
            ValueError: if the network fails.
        """
        if not self.scored:
            return Judged(places, self.network(pictures).cpu(), None)
        features, likely = self.network.with_probabilities(pictures)
        return Judged(places, features.cpu(), None if likely is None else likely.cpu())

    def take(self, judged: Judged) -> None:
        """Count a batch in; the first process does so with all, in the pictures' order."""
        self.places += judged.places.tolist()
        if self._statistics is None:
            self._statistics = FeatureStatistics(judged.features.shape[1], self.network.device)
        self._statistics.add(judged.features.to(self.network.device))
        self._features.append(judged.features[self._is_kept[judged.places]])
        if judged.probabilities is not None:
            self.inception.add(judged.places, judged.probabilities)

    def statistics(self) -> FeatureStatistics:
        """Of all, with the features that are kept.

        Raises:
            ValueError: if there were no pictures.
        """
        if self._statistics is None:
            raise ValueError("pictures: expected at least one")
        self._statistics.features = torch.cat(self._features)
        return self._statistics
