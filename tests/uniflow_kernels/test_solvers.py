"""Schedules, solvers and guidance against closed forms, and the solvers' orders as measured."""

import math
from itertools import pairwise

import pytest
import torch

from uniflow_kernels.solvers import SOLVERS, Plan, guide, guides_at, integrate, last_update, schedule_steps

SCHEDULES = ["linear", "pow_0.25", "pow_1", "pow_3", "shifted_0.5", "shifted_3"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_schedules_go_from_noise_to_image(schedule, steps):
    times, sizes = zip(*schedule_steps(steps, schedule), strict=True)
    assert times[0] == 0
    assert all(size > 0 for size in sizes)
    assert math.isclose(times[-1] + sizes[-1], 1, abs_tol=1e-12)
    for i in range(steps - 1):
        assert math.isclose(times[i] + sizes[i], times[i + 1], abs_tol=1e-12)


def test_linear_steps_are_equal():
    assert schedule_steps(4) == ((0.0, 0.25), (0.25, 0.25), (0.5, 0.25), (0.75, 0.25))
    for same in ("pow_1", "shifted_1"):
        assert torch.allclose(torch.tensor(schedule_steps(7, same)), torch.tensor(schedule_steps(7)))


def test_pow_follows_its_formula():
    for i, (t, dt) in enumerate(schedule_steps(5, "pow_0.5")):
        level, following = ((5 - i) / 5) ** 2, ((5 - i - 1) / 5) ** 2
        assert math.isclose(t, 1 - level, rel_tol=1e-12)
        assert math.isclose(dt, level - following, rel_tol=1e-12)


def test_shifted_follows_its_formula():
    """At a noise level r of the linear schedule, signal over noise is a times less."""
    for i, (t, _) in enumerate(schedule_steps(5, "shifted_3")):
        r = (5 - i) / 5
        assert math.isclose(t * 3 * r, (1 - t) * (1 - r), abs_tol=1e-12)
    sizes = [dt for _, dt in schedule_steps(5, "shifted_3")]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    "schedule",
    ["cosine", "pow", "pow_", "pow_0", "pow_-1", "pow_inf", "pow_nan", "pow_1_2_", "shifted", "shifted_0", "shift_3"],
)
def test_unknown_schedules_are_refused(schedule):
    with pytest.raises(ValueError, match="schedule: expected 'linear', or 'pow_' or 'shifted_'"):
        schedule_steps(4, schedule)


def test_bad_plans_name_the_field():
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        schedule_steps(0)
    with pytest.raises(ValueError, match="solver: expected one of euler, heun, midpoint, got 'rk4'"):
        integrate(lambda x, t: x, torch.ones(()), 2, solver="rk4")
    with pytest.raises(ValueError, match="cfg_interval"):
        Plan(1, cfg_interval=(2.0, 1.0)).check()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_linear_field_is_multiplied_by_a_known_factor(solver, schedule):
    """Of dx/dt = L x: 1 + L dt a step by Euler, and the next term of the exponential series by the other two."""
    rates = torch.tensor([-3.0, 0.5, 2.0], dtype=torch.float64)
    start = torch.tensor([1.0, -2.0, 0.3], dtype=torch.float64)
    kept = start.clone()
    expected = start.clone()
    for _, dt in schedule_steps(5, schedule):
        z = rates * dt
        expected *= 1 + z + (0 if solver == "euler" else z**2 / 2)
    out = integrate(lambda x, t: rates * x, start, 5, schedule, solver)
    assert torch.allclose(out, expected, rtol=1e-12)
    assert torch.equal(start, kept)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
@pytest.mark.parametrize("schedule", ["linear", "pow_0.5", "shifted_3"])
def test_order_of_convergence(solver, order, schedule):
    """Of a rotation, and of dx/dt = (1 + t) x, whose solution grows by exp(t + t^2/2)."""

    def rotation(x, t):
        return 2 * torch.stack([-x[1], x[0]])

    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    exact = torch.tensor([math.cos(2), math.sin(2)], dtype=torch.float64)
    errors = [(integrate(rotation, start, n, schedule, solver) - exact).norm().item() for n in (64, 128, 256)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)

    def growth(x, t):
        return (1 + t) * x

    start, exact = torch.ones((), dtype=torch.float64), math.exp(1.5)
    errors = [abs(integrate(growth, start, n, schedule, solver).item() - exact) for n in (64, 128, 256)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_straight_paths_are_followed_exactly(solver):
    noise, image = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    for steps in (1, 3):
        out = integrate(lambda x, t: image - noise, noise, steps, "shifted_2", solver)
        assert torch.allclose(out, image, atol=1e-6)


def test_midpoint_and_heun_are_exact_where_the_velocity_is_linear_in_time():
    start = torch.zeros((), dtype=torch.float64)
    for solver, expected in {"heun": 1.0, "midpoint": 1.0, "euler": 0.75}.items():
        assert integrate(lambda x, t: torch.full_like(x, 2 * t), start, 4, solver=solver).item() == pytest.approx(
            expected
        )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("schedule", ["linear", "shifted_3"])
def test_a_plan_knows_the_times_of_its_evaluations(solver, schedule):
    seen = []
    integrate(lambda x, t: seen.append(t) or x, torch.ones(()), 4, schedule, solver)
    plan = Plan(4, schedule, solver)
    assert plan.times() == list(dict.fromkeys(seen))
    assert len(seen) == 4 * len(SOLVERS[solver].nodes)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_last_update_is_left_to_the_caller(solver):
    start = torch.randn(7)
    update = last_update(lambda x, t: x * t, start, 3, "linear", solver)
    assert update.dt == pytest.approx(1 / 3)
    assert torch.equal(update.taken(), integrate(lambda x, t: x * t, start, 3, "linear", solver))


def test_the_state_keeps_its_dtype():
    start = torch.randn(7)
    for solver in SOLVERS:
        assert integrate(lambda x, t: x.bfloat16(), start, 3, solver=solver).dtype == torch.float32


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
    assert not Plan(1).guides_at(0.0)
    assert Plan(1, cfg=2.0).guides_at(0.0)
    assert not Plan(1, cfg=2.0, cfg_interval=(1.0, 3.0)).guides_at(0.2)
    for interval in ((2.0, 1.0), (-0.5, 1.0)):
        with pytest.raises(ValueError, match="cfg_interval"):
            guides_at(0.5, interval)
