import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import smooth_picture
from uniflow import UniFlow, UniFlowConfig, UniFlowObjective
from uniflow.data import RandomCrops
from uniflow.training import Recipe, train


def take(crops, count):
    return list(itertools.islice(iter(crops), count))


def test_crops_are_uint8_squares_and_follow_the_seed():
    pictures = [smooth_picture((50, 40), 0), smooth_picture((20, 64), 1)]
    one, two, other = (take(RandomCrops(pictures, 16, seed), 20) for seed in (3, 3, 4))
    assert all(crop.shape == (3, 16, 16) and crop.dtype == torch.uint8 for crop in one)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_crops_differ_in_place_size_and_direction():
    # red rises to the right, green downwards
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(64) * 4, np.arange(64)[:, None] * 4
    crops = [crop.float() for crop in take(RandomCrops([Image.fromarray(ramp)], 16), 200)]
    slopes = torch.stack([crop[0, :, -1].mean() - crop[0, :, 0].mean() for crop in crops])
    assert 60 < (slopes < 0).sum() < 140
    assert slopes.abs().max() > 2 * slopes.abs().min()
    assert all(crop[1, -1].mean() > crop[1, 0].mean() for crop in crops)
    assert torch.stack([crop[1].mean() for crop in crops]).std() > 10


def test_pictures_smaller_than_a_crop_are_enlarged(tmp_path):
    smooth_picture((7, 5), 0).save(tmp_path / "x.png")
    assert take(RandomCrops([tmp_path / "x.png"], 16), 1)[0].shape == (3, 16, 16)
    with pytest.raises(ValueError, match="at least one"):
        RandomCrops([], 16)


def make_objective(seed=0):
    torch.manual_seed(seed)
    return UniFlowObjective(UniFlow(UniFlowConfig.preset("tiny", image_size=16)), distill_weight=0.0)


def batches(size=16):
    crops = iter(RandomCrops([smooth_picture((50, 40), 0)], 16))
    while True:
        yield torch.stack([next(crops) for _ in range(size)])


def test_training_reduces_the_loss():
    objective = make_objective()
    losses = train(objective, batches(), Recipe(steps=60, learning_rate=3e-3, warmup_steps=5))
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:5])
    assert not objective.training


def test_training_is_reproducible():
    runs = []
    for _ in range(2):
        objective = make_objective()
        torch.manual_seed(1)
        runs.append(train(objective, batches(4), Recipe(steps=5)))
    assert runs[0] == runs[1]


def test_progress_is_reported_with_rate_and_time_left():
    reports = []
    train(make_objective(), batches(2), Recipe(steps=7), reports.append, report_every=3)
    assert [progress.step for progress in reports] == [3, 6, 7]
    assert reports[-1].spent == 1
    assert reports[-1].seconds_left == 0
    assert all(progress.images_per_second > 0 and math.isfinite(progress.loss) for progress in reports)


def test_a_budget_of_seconds_ends_a_run():
    losses = train(make_objective(), batches(2), Recipe(steps=10**6, seconds=1.0))
    assert 1 < len(losses) < 10**4


def test_a_diverging_run_says_so():
    objective = make_objective()
    with torch.no_grad():
        objective.student.chal_proj.c_fc.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="a lower learning rate may help"):
        train(objective, batches(2), Recipe(steps=3), report_every=1)
