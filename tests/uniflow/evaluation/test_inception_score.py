"""Inception Score against torchmetrics and by hand."""

import math

import pytest
import torch
from torch import nn
from torchmetrics.image.inception import InceptionScore as Theirs

from uniflow.evaluation.inception_score import InceptionScore


def probabilities(count=50, classes=7):
    logits = 3 * torch.randn(count, classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits[:, 0] = logits[:, 0].clamp(max=-500)  # a class that no picture is of, whose probability is zero
    return logits, logits.softmax(1)


def test_as_torchmetrics_has_it():
    """On the same probabilities; it puts pictures in the order of torch's seed, here that of ours."""
    logits, likely = probabilities()
    theirs = Theirs(feature=nn.Identity(), splits=10, normalize=False).set_dtype(torch.float64)
    theirs.update(logits)
    torch.manual_seed(0)
    expected = theirs.compute()
    score = InceptionScore(len(likely))
    for places in torch.arange(50).split(7):
        score.add(places, likely[places])
    mean, deviation = score.result()
    assert mean == pytest.approx(expected[0].item(), rel=1e-6)
    assert deviation * math.sqrt(10 / 9) == pytest.approx(expected[1].item(), rel=1e-6)  # theirs is of a sample
    assert mean > 1.5


def test_splits_hold_all_classes():
    """A folder in the order of its classes: of a sure network the score is how many there are."""
    sure = torch.eye(4).repeat_interleave(1000, 0)
    score = InceptionScore(4000)
    score.add(torch.arange(4000), sure)
    mean, deviation = score.result()
    assert mean == pytest.approx(4, rel=0.01)
    assert deviation < 0.05


def test_pictures_that_are_not_there():
    """Their places are in no split; a split without any has no score."""
    likely = probabilities(12)[1]
    score = InceptionScore(12, splits=2)
    assert score.result() is None
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    there = order[[0, 2, 5, 6, 7, 11]]
    for places in (there[:2], there[2:]):
        score.add(places, likely[places])
    expected = []
    for split in (there[:3], there[3:]):
        rows = likely[split].tolist()
        together = [sum(column) / 3 for column in zip(*rows, strict=True)]
        divergences = [sum(p * math.log(p / q) for p, q in zip(row, together, strict=True) if p > 0) for row in rows]
        expected.append(math.exp(sum(divergences) / 3))
    assert score.result() == pytest.approx((sum(expected) / 2, abs(expected[0] - expected[1]) / 2), rel=1e-12)
    empty = InceptionScore(12, splits=13)
    empty.add(torch.arange(12), likely)
    assert empty.result() is None
