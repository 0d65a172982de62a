import math
from itertools import pairwise

import pytest
import torch

from uniflow.flow import euler, guide, guides_at, sample_t, schedule_steps


@pytest.mark.parametrize("schedule", ["linear", "pow_0.25", "pow_1", "pow_3"])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_schedules_go_from_noise_to_image(schedule, steps):
    times, sizes = zip(*schedule_steps(steps, schedule), strict=True)
    assert times[0] == 0
    assert math.isclose(times[-1] + sizes[-1], 1, abs_tol=1e-12)
    for i in range(steps - 1):
        assert math.isclose(times[i] + sizes[i], times[i + 1], abs_tol=1e-12)


def test_linear_steps_are_equal():
    assert schedule_steps(4) == ((0.0, 0.25), (0.25, 0.25), (0.5, 0.25), (0.75, 0.25))


def test_pow_follows_its_formula():
    for i, (t, dt) in enumerate(schedule_steps(5, "pow_0.5")):
        level, following = ((5 - i) / 5) ** 2, ((5 - i - 1) / 5) ** 2
        assert math.isclose(t, 1 - level, rel_tol=1e-12)
        assert math.isclose(dt, level - following, rel_tol=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "pow", "pow_", "pow_0", "pow_-1", "pow_inf", "pow_nan", "pow_1_2"])
def test_unknown_schedules_are_refused(schedule):
    with pytest.raises(ValueError, match="schedule: expected 'linear' or 'pow_'"):
        schedule_steps(4, schedule)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        schedule_steps(0)


def test_euler_is_exact_on_a_constant_field():
    noise, image = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    kept = noise.clone()
    for steps in (1, 3):
        assert torch.allclose(euler(lambda x, t: image - noise, noise, steps), image, atol=1e-6)
    assert torch.equal(noise, kept)


def test_euler_converges_with_order_one():
    # dx/dt = x from x(0) = 1 ends at e
    start = torch.ones((), dtype=torch.float64)
    errors = [abs(euler(lambda x, t: x, start, n).item() - math.e) for n in (50, 100, 200)]
    for coarse, fine in pairwise(errors):
        assert 1.9 < coarse / fine < 2.1


def test_guidance():
    v, null = torch.randn(4), torch.randn(4)
    assert torch.allclose(guide(v, null, 1.0), v, atol=1e-6)
    assert torch.equal(guide(v, null, 0.0), null)
    assert torch.allclose(guide(v, null, 2.5), null + 2.5 * (v - null))


def test_the_interval_is_of_sigma():
    # noise level 1 - t = sigma / (1 + sigma): sigma 1 is t = 0.5, sigma 3 is t = 0.25
    assert [guides_at(t, (1.0, 3.0)) for t in (0.2, 0.25, 0.4, 0.5, 0.51)] == [False, True, True, True, False]
    assert guides_at(0.0, None)
    assert guides_at(0.0, (0.0, math.inf))
    assert not guides_at(0.0, (0.0, 1e3))
    for interval in ((2.0, 1.0), (-0.5, 1.0)):
        with pytest.raises(ValueError, match="cfg_interval"):
            guides_at(0.5, interval)


def test_t_distributions():
    generator = torch.Generator().manual_seed(0)
    uniform = sample_t((100_000,), "uniform", generator=generator)
    lognormal = sample_t((100_000,), "lognormal", generator=generator)
    fat = sample_t((100_000,), "fat_lognormal", generator=generator)
    for t in (uniform, lognormal, fat):
        assert t.dtype == torch.float32
        assert 0 <= t.min() < t.max() <= 1
        assert abs(t.mean() - 0.5) < 0.005
    # P(t < 0.05): 0.05 if uniform, P(N(0,1) < logit 0.05) = 0.00162 if lognormal
    share = [(t < 0.05).float().mean().item() for t in (uniform, lognormal, fat)]
    assert abs(share[0] - 0.05) < 0.003
    assert abs(share[1] - 0.00162) < 0.001
    assert abs(share[2] - (0.9 * 0.00162 + 0.1 * 0.05)) < 0.001


def test_t_is_reproducible_and_shaped():
    one, two = (sample_t((3, 5), generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert one.shape == (3, 5)
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match="t_distribution: expected one of fat_lognormal, lognormal, uniform"):
        sample_t((1,), "normal")
