"""Precision and recall against their definition, counted pair by pair."""

import math

import pytest
import torch

from uniflow.evaluation import manifolds
from uniflow.evaluation.manifolds import precision_recall


def by_hand(reference, generated, k):
    """Equations 1 to 3 of the paper, with Python's numbers."""

    def inside(features, manifold):
        radii = [
            sorted(math.dist(a, b) for j, b in enumerate(manifold) if j != i)[k - 1] for i, a in enumerate(manifold)
        ]
        found = [any(math.dist(f, m) <= r for m, r in zip(manifold, radii, strict=True)) for f in features]
        return sum(found) / len(features)

    reference, generated = reference.tolist(), generated.tolist()
    return inside(generated, reference), inside(reference, generated)


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("tile", [1, 100, 1 << 24])
def test_as_defined(neighbours, tile, monkeypatch):
    """Of any number of tiles; on whole numbers, whose distances are often equal to a radius; far from zero."""
    monkeypatch.setattr(manifolds, "_TILE", tile)
    generator = torch.Generator().manual_seed(neighbours)
    whole = torch.randint(0, 9, (60, 4), generator=generator).float()
    spread = torch.randn(50, 4, generator=generator) * torch.tensor([1.0, 2.0, 0.5, 1.0])
    moved = whole[30:] + torch.tensor([4.0, 0, 0, 0])
    for reference, generated in ((whole[:30], moved), (spread[:20], 1.2 * spread[20:] + 0.3)):
        expected = by_hand(reference, generated, neighbours)
        assert all(0.1 < value < 1 for value in expected)
        assert precision_recall(reference, generated, neighbours) == expected
    far = whole[:30] + 4096, moved + 4096
    assert precision_recall(*far, neighbours) == by_hand(*far, neighbours)


def test_collapsed_and_scattered():
    """One picture again and again is precise and recalls nothing; pictures all over recall all and are not precise."""
    reference = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    collapsed = reference[:1].repeat(20, 1)  # at a distance of exactly zero, in balls without an extent
    assert precision_recall(reference, collapsed) == (1.0, 1 / 40)
    scattered = torch.cat([reference, 100 + 50 * reference])
    assert precision_recall(reference, scattered) == (0.5, 1.0)


def test_sets_that_do_not_serve():
    with pytest.raises(ValueError, match=r"expected \[n, D\] and \[m, D\], got \[9, 3\] and \[9, 4\]"):
        precision_recall(torch.zeros(9, 3), torch.zeros(9, 4))
    with pytest.raises(ValueError, match="more than 3 pictures of each set, got 9 and 3"):
        precision_recall(torch.zeros(9, 3), torch.zeros(3, 3))
