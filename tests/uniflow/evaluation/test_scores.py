"""Scores of reconstructions: their definitions, means over what processes share, and those of a validation."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tests.conftest import smooth_picture
from uniflow.evaluation import FeatureNetwork, FeatureStatistics, frechet_distance
from uniflow.evaluation.scores import InOrder, ReconstructionScores, exact_mean, resized
from uniflow.evaluation.similarity import psnr, ssim
from uniflow.pictures import to_tensor
from uniflow.training.processes import Processes

CPU = torch.device("cpu")


def pairs(count=4, size=(24, 20)):
    originals = torch.stack([to_tensor(smooth_picture(size, seed)) for seed in range(count)])
    noise = torch.randint(-9, 10, originals.shape, generator=torch.Generator().manual_seed(0))
    return (originals + noise).clamp(0, 255).to(torch.uint8), originals


def test_as_scikit_image_has_them():
    """On 8-bit values, a picture at a time; SSIM in the Gaussian windows of its paper."""
    made, originals = pairs()
    arrays = [[image.permute(1, 2, 0).numpy() for image in images] for images in (originals, made)]
    expected = [peak_signal_noise_ratio(*pair) for pair in zip(*arrays, strict=True)]
    assert psnr(made, originals).tolist() == pytest.approx(expected, rel=1e-5)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = []
    for pair in zip(*arrays, strict=True):
        padded = (np.pad(array, ((5, 5), (5, 5), (0, 0)), mode="reflect") for array in pair)
        everywhere = structural_similarity(*padded, channel_axis=2, full=True, **window)[1]
        expected.append(everywhere[5:-5, 5:-5].mean())
    assert ssim(made, originals).tolist() == pytest.approx(expected, abs=1e-5)


def test_resized_as_pillow():
    made, _ = pairs(2, (45, 45))
    for size in (16, 64):
        for image, mine in zip(made, resized(made, size), strict=True):
            theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BICUBIC)
            assert (to_tensor(theirs).int() - mine.int()).abs().max() <= 1  # Pillow works in fixed point
    assert resized(made, 45) is made


def test_the_sum_of_a_mean_is_rounded_once():
    assert exact_mean([1e16, 1.0, -1e16, math.nan]) == 1 / 3
    assert math.isnan(exact_mean([math.nan]))


class Together(Processes):
    """Processes that act one after the other: the first, last of all, is given what the others gave."""

    def __init__(self, rank, world, given):
        super().__init__(rank, world)
        object.__setattr__(self, "given", given)

    def to_first(self, value):
        self.given[self.rank].append(value)
        rounds = len(self.given[self.rank]) - 1
        return [self.given[rank][rounds] for rank in range(self.world)] if self.first else []


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_blocks_come_to_the_first_process_in_their_order(world):
    blocks, taken, given = 4, [], [[] for _ in range(world)]
    for rank in reversed(range(world)):
        order = InOrder(Together(rank, world, given), blocks, taken.append)
        for block in filter(order.is_mine, range(blocks)):
            if block != 1:  # of which nothing could be read
                order.add(block, (block, "a"))
                order.add(block, (block, "b"))
        order.finish()
    assert taken == [(block, part) for block in (0, 2, 3) for part in "ab"]
    assert {len(rounds) for rounds in given} == {-(-blocks // world)}  # or the processes would wait for ever


def test_the_distance_of_reconstructions(colours):
    made, originals = pairs()
    network = FeatureNetwork(colours, CPU)
    scores = ReconstructionScores(network)
    for part in (slice(0, 3), slice(3, 4)):
        scores.take(scores.of(made[part], originals[part]))
    expected = [FeatureStatistics(12), FeatureStatistics(12)]
    for statistics, images in zip(expected, (originals, made), strict=True):
        statistics.add(network(images))
    assert scores.distance() == pytest.approx(frechet_distance(*expected), rel=1e-9)
    assert scores.means()["psnr"] == pytest.approx(psnr(made, originals).mean().item())
    assert scores.pictures == 4

    known = ReconstructionScores(network, reference=scores.originals)
    scored = known.of(made, originals)
    assert scored.originals is None  # the network runs for the reconstructions alone
    known.take(scored)
    assert known.distance() == pytest.approx(scores.distance(), rel=1e-9)


def test_no_distance_of_one_picture(colours):
    made, originals = pairs(1)
    scores = ReconstructionScores(FeatureNetwork(colours, CPU))
    assert scores.distance() is None
    scores.take(scores.of(made, originals))
    assert scores.distance() is None
    assert ReconstructionScores().distance() is None


def test_scores_do_not_depend_on_autocast():
    """A validation runs under the training's; in bfloat16 SSIM would be off by 1e-2."""
    alone = ReconstructionScores().of(*pairs()).values
    with torch.autocast("cpu", torch.bfloat16):
        under = ReconstructionScores().of(*pairs()).values
    assert all(torch.equal(alone[name], under[name]) for name in ("psnr", "ssim"))
