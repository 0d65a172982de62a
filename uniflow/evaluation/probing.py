"""What an encoder's layers know of pictures: classifiers on features that stay as they are. Needs scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from uniflow.teachers import EncoderTeacher

POOLINGS = ("mean", "class")
_QUARTERS = 4


class PooledLayers(nn.Module):
    """Features of pictures: what some of an encoder's layers give, pooled over a picture's tokens.

    Args:
        encoder: to be asked; those of UniFlows and of other folders are read by `EncoderTeacher.from_pretrained`.
        layers: which layers, from 1; those at the quarters of the depth if not given.
        pooling: "mean" of the patches' tokens, or "class", the class token alone.

    Raises:
        ValueError: if there is no such layer, pooling or class token.
    """

    def __init__(self, encoder: EncoderTeacher, layers: Sequence[int] | None = None, pooling: str = "mean") -> None:
        super().__init__()
        depth = len(encoder.encoder.layers)
        if layers is None:
            layers = [-(-depth * quarter // _QUARTERS) for quarter in range(1, _QUARTERS + 1)]
        self.layers = tuple(sorted(set(layers)))
        if not self.layers or not 1 <= self.layers[0] <= self.layers[-1] <= depth:
            raise ValueError(f"layers: expected numbers from 1 to {depth}, got {list(layers)}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
        if pooling == "class" and not encoder.prefix_tokens:
            raise ValueError("pooling: expected mean, since the encoder has no class token, got class")
        self.encoder = encoder
        self.pooling = pooling

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] to features, float32 [layers, B, D]; later layers do not run."""
        prefix, pooled = self.encoder.prefix_tokens, []
        for number, state in enumerate(self.encoder.states(images), start=1):
            if number in self.layers:
                patches = state[:, prefix:]
                pooled.append(patches.mean(1, dtype=torch.float32) if self.pooling == "mean" else state[:, 0].float())
            if number == self.layers[-1]:
                break
        return torch.stack(pooled)


@dataclass(frozen=True)
class Labelled:
    """Features [N, D] in float32, and the class of each, [N]."""

    features: np.ndarray
    labels: np.ndarray


def neighbour_accuracy(seen: Labelled, unseen: Labelled, neighbours: int = 20, temperature: float = 0.07) -> float:
    """How many of the unseen pictures the nearest of those that were seen name rightly, in percent.

    Near is what has a large cosine; each neighbour's voice counts exp(cosine / temperature).

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018), section 3.4;
    20 neighbours are those of Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (2021).

    Raises:
        ValueError: if fewer than so many pictures were seen.
    """
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import normalize

    if not 1 <= neighbours <= len(seen.labels):
        raise ValueError(f"neighbours: expected 1 to {len(seen.labels)}, the pictures that were seen, got {neighbours}")
    # of vectors of length 1 the squared distance is 2 - 2 cosine
    voices = KNeighborsClassifier(
        neighbours, algorithm="brute", weights=lambda distances: np.exp(-np.square(distances) / (2 * temperature))
    )
    voices.fit(normalize(seen.features), seen.labels)
    return 100 * float(voices.score(normalize(unseen.features), unseen.labels))


def linear_accuracy(seen: Labelled, unseen: Labelled, c: float = 1.0, iterations: int = 2000) -> float:
    """How many of the unseen pictures a linear classifier names rightly that learns of those seen, in percent.

    It is a logistic regression on features with mean 0 and deviation 1 over the pictures seen, in float64, to where its
    gradient is below 1e-6: stopped as early as scikit-learn does by default, some would depend on the pictures' order.

    Args:
        seen: to learn of.
        unseen: to be judged by.
        c: scikit-learn's C, the inverse of the penalty's weight: a larger one fits closer.
        iterations: of L-BFGS at most.

    Raises:
        ValueError: if the pictures seen are of one class.

    Warns:
        ConvergenceWarning: of scikit-learn, if the iterations do not suffice.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=c, tol=1e-6, max_iter=iterations))
    classifier.fit(seen.features.astype(np.float64), seen.labels)
    return 100 * float(classifier.score(unseen.features.astype(np.float64), unseen.labels))


def split_by_class(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the pictures to see and of those to hold out, each sorted: of every class about the same share.

    Args:
        labels: [N], the class of each.
        share: of the pictures to be held out.
        seed: the same one gives the same split.

    Raises:
        ValueError: if a class has one picture alone, or the share is not enough for one of each class on both sides.
    """
    from sklearn.model_selection import train_test_split

    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        alone = classes[counts.argmin()]
        raise ValueError(f"labels: expected at least 2 pictures of each class, got 1 of class {alone}")
    random = np.random.RandomState(np.random.MT19937(seed))  # what scikit-learn draws from
    sides = train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=random)
    return np.sort(sides[0]), np.sort(sides[1])
