"""Flow matching in the release's direction of time: t = 0 is noise, t = 1 the image, v = image - noise.

Schedules, the Euler sampler, classifier-free guidance, and how t is drawn in training.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Interval = tuple[float, float]


def schedule_steps(steps: int, schedule: str = "linear") -> tuple[tuple[float, float], ...]:
    """The times and step sizes (t_i, dt_i) of a sampler.

    "linear" has equal steps. "pow_p" has noise levels s_i = ((N-i)/N)^(1/p), i = 0..N, with t_i = 1 - s_i and
    dt_i = s_i - s_{i+1}: below p = 1 the first steps are the longest.

    Args:
        steps: N, at least 1.
        schedule: "linear" or "pow_" followed by a positive number.

    Raises:
        ValueError: for anything else.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    power = 1.0 if schedule == "linear" else _power(schedule)
    levels = [((steps - i) / steps) ** (1 / power) for i in range(steps + 1)]
    return tuple((1 - level, level - following) for level, following in pairwise(levels))


def _power(schedule: str) -> float:
    try:
        prefix, number = schedule.split("_")
        power = float(number)
    except ValueError:
        prefix, power = "", 0.0
    if prefix != "pow" or not 0 < power < float("inf"):
        raise ValueError(
            f"schedule: expected 'linear' or 'pow_' and a positive number (as in 'pow_0.25'), got {schedule!r}"
        )
    return power


def euler(velocity: Callable[[Tensor, float], Tensor], x: Tensor, steps: int, schedule: str = "linear") -> Tensor:
    """Follow the velocity from t = 0 to t = 1 with Euler steps x += dt * velocity(x, t).

    Args:
        velocity: called with x and t; returns a tensor like x.
        x: the noise to start from; not changed.
        steps: number of steps, at least 1.
        schedule: see `schedule_steps`.

    Returns:
        x at t = 1.
    """
    for t, dt in schedule_steps(steps, schedule):
        x = x + dt * velocity(x, t)
    return x


def guide(velocity: Tensor, null_velocity: Tensor, cfg: float) -> Tensor:
    """Classifier-free guidance: null + cfg * (velocity - null) (Ho & Salimans 2022)."""
    return null_velocity + cfg * (velocity - null_velocity)


def guides_at(t: float, cfg_interval: Interval | None) -> bool:
    """Whether guidance applies at time t.

    Args:
        t: in [0, 1].
        cfg_interval: (lowest, highest) sigma at which to guide, both included, in the convention of EDM and FlowMo;
            the noise level 1 - t is sigma / (1 + sigma). None guides everywhere.

    Raises:
        ValueError: if it is not 0 <= lowest <= highest.
    """
    if cfg_interval is None:
        return True
    low, high = cfg_interval
    if not 0 <= low <= high:
        raise ValueError(
            f"cfg_interval: expected (lowest, highest) sigma with 0 <= lowest <= highest, got {cfg_interval}"
        )
    highest_level = high / (1 + high) if high != float("inf") else 1.0  # an infinite sigma is pure noise
    return low / (1 + low) <= 1 - t <= highest_level


def _lognormal(shape: tuple[int, ...], device: torch.device | None, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, device=device, generator=generator).sigmoid_()


def _uniform(shape: tuple[int, ...], device: torch.device | None, generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, device=device, generator=generator)


def _fat_lognormal(shape: tuple[int, ...], device: torch.device | None, generator: torch.Generator | None) -> Tensor:
    from_tails = _uniform(shape, device, generator) >= 0.9
    return torch.where(from_tails, _uniform(shape, device, generator), _lognormal(shape, device, generator))


T_DISTRIBUTIONS = {"fat_lognormal": _fat_lognormal, "lognormal": _lognormal, "uniform": _uniform}


def sample_t(
    shape: tuple[int, ...],
    distribution: str = "fat_lognormal",
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Times to train at, in [0, 1], float32.

    Args:
        shape: of the result.
        distribution: "uniform"; "lognormal", sigmoid(N(0, 1)); or "fat_lognormal", lognormal with probability 0.9 and
            uniform else (the release's `train_schedule`, from FlowMo).
        device: where the times are wanted.
        generator: of that device.

    Raises:
        ValueError: for an unknown distribution, naming those there are.
    """
    if distribution not in T_DISTRIBUTIONS:
        raise ValueError(f"t_distribution: expected one of {', '.join(T_DISTRIBUTIONS)}, got {distribution!r}")
    return T_DISTRIBUTIONS[distribution](shape, device, generator)
