"""Precision and recall of generated pictures: whose features lie near enough to those of the other set."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

NEIGHBOURS = 3  # of Kynkäänniemi et al., and of ADM's evaluation
_TILE = 1 << 24  # distances at a time, in float64


def precision_recall(
    reference: Tensor, generated: Tensor, neighbours: int = NEIGHBOURS, device: torch.device | None = None
) -> tuple[float, float]:
    """The fraction of generated pictures in the manifold of the reference, and of the reference in that of these.

    A set's manifold is made of balls around its features, each as large as the distance to the `neighbours`-th nearest
    other one of the set; a feature on the border, as far as float64 tells, is inside. Both sets lie on the device in
    float64 meanwhile, beside some tiles of 128 MiB; the work is three products of all features with all.

    Source: Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (2019), eq. 1-3.

    Args:
        reference, generated: [n, D] and [m, D], of any floating dtype.
        neighbours: k.
        device: where it is counted; where the features are if not given.

    Raises:
        ValueError: for features of different widths, or no more than k of a set.
    """
    if reference.ndim != 2 or generated.ndim != 2 or reference.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features: expected [n, D] and [m, D], got {list(reference.shape)} and {list(generated.shape)}"
        )
    if min(len(reference), len(generated)) <= neighbours:
        raise ValueError(
            f"features: expected those of more than {neighbours} pictures of each set, got {len(reference)} and "
            f"{len(generated)}"
        )
    real, made = (each.to(device or each.device, torch.float64) for each in (reference, generated))
    centre = real.mean(0)
    real, made = real - centre, made - centre  # or a large mean would leave little of the distances
    around_real, around_made = (_radii(each, neighbours) for each in (real, made))
    precise, recalled = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for first, distances, rounding in _distances(made, real):
        least = distances - rounding
        precise += int((least <= around_real).any(1).sum())
        recalled |= (least <= around_made[first : first + len(least), None]).any(0)
    return precise / len(made), int(recalled.sum()) / len(real)


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Squared distance from each feature to its k-th nearest other one, [n]."""
    radii = []
    for first, distances, _ in _distances(features, features):
        row = torch.arange(len(distances), device=features.device)
        distances[row, row + first] = torch.inf  # from itself
        radii.append(distances.topk(neighbours, largest=False).values.amax(1))
    return torch.cat(radii)


def _distances(one: Tensor, other: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Squared distances [rows, m] of some rows of one set from all of another; which is the first, and how exact."""
    lengths, width = other.square().sum(1), other.shape[1]
    rows = max(1, _TILE // len(other))
    for first in range(0, len(one), rows):
        part = one[first : first + rows]
        both = part.square().sum(1, keepdim=True) + lengths
        yield first, torch.addmm(both, part, other.T, alpha=-2), both * (4 * width * torch.finfo(both.dtype).eps)
