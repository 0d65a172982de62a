"""Samplers of flow matching: schedules of times, Runge-Kutta solvers, guidance. t = 0 is noise, t = 1 the data.

Nothing here knows a network: a solver calls the velocity that it is given. `FlowHead.sample` and `uniflow` share it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Interval = tuple[float, float]
Steps = tuple[tuple[float, float], ...]

Velocity = Callable[[Tensor, float], Tensor]


def _euler(velocity: Velocity, x: Tensor, t: float, dt: float) -> Tensor:
    return velocity(x, t)


def _heun(velocity: Velocity, x: Tensor, t: float, dt: float) -> Tensor:
    first = velocity(x, t)
    return torch.lerp(first, velocity(torch.add(x, first, alpha=dt), t + dt), 0.5)


def _midpoint(velocity: Velocity, x: Tensor, t: float, dt: float) -> Tensor:
    return velocity(torch.add(x, velocity(x, t), alpha=0.5 * dt), t + 0.5 * dt)


class Solver(NamedTuple):
    """A way to make one step: its slope, x moves by dt * slope; the velocity is evaluated at each t + node * dt."""

    nodes: tuple[float, ...]
    slope: Callable[[Velocity, Tensor, float, float], Tensor]


SOLVERS = {
    "euler": Solver((0.0,), _euler),
    "heun": Solver((0.0, 1.0), _heun),
    "midpoint": Solver((0.0, 0.5), _midpoint),
}


class Plan(NamedTuple):
    """What a sampler does.

    Args:
        steps: number of steps; Heun and midpoint evaluate the velocity twice in each.
        schedule: of the times, see `schedule_steps`.
        solver: "euler" (order 1), "heun" or "midpoint" (order 2).
        cfg: guidance scale, see `guide`; 1 is none.
        cfg_interval: the sigmas at which to guide, see `guides_at`.
    """

    steps: int
    schedule: str = "linear"
    solver: str = "euler"
    cfg: float = 1.0
    cfg_interval: Interval | None = None

    def check(self, times: int = 1) -> None:
        """Raise a ValueError that names the field for a value that cannot be, of a head of so many `times`."""
        schedule_steps(self.steps, self.schedule)
        guides_at(0.0, self.cfg_interval)
        if not abs(self.cfg) < float("inf"):  # math.isfinite is not traced by torch.compile
            raise ValueError(f"cfg: expected a finite number, got {self.cfg}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {self.solver!r}")
        if times == 2 and self.solver != "euler":
            raise ValueError(f"solver: expected euler, since the head knows where a step ends, got {self.solver}")

    def times(self) -> list[float]:
        """The times at which the velocity is evaluated, each once, in the order in which they are needed."""
        steps = schedule_steps(self.steps, self.schedule)
        return list(dict.fromkeys(t + node * dt for t, dt in steps for node in SOLVERS[self.solver].nodes))

    def guides_at(self, t: float) -> bool:
        """Whether guidance applies at time t."""
        return self.cfg != 1.0 and guides_at(t, self.cfg_interval)


def schedule_steps(steps: int, schedule: str = "linear") -> Steps:
    """The times and step sizes (t_i, dt_i) of a sampler.

    A schedule gives the noise levels s_i, i = 0..N, from 1 to 0; then t_i = 1 - s_i and dt_i = s_i - s_{i+1}. With
    r = (N-i)/N, "linear" is s_i = r, equal steps; "pow_p" is s_i = r^(1/p), below p = 1 with the longest steps first;
    "shifted_a" is s_i = a*r / (1 + (a-1)*r), above a = 1 with the shortest steps first (Esser et al. 2024, eq. 23).

    Args:
        steps: N, at least 1.
        schedule: "linear", or "pow_" or "shifted_" followed by a positive number.

    Raises:
        ValueError: for anything else.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    kind, number = _kind_and_number(schedule)
    remaining = [(steps - i) / steps for i in range(steps + 1)]
    if kind == "shifted":
        levels = [number * r / (1 + (number - 1) * r) for r in remaining]
    else:
        levels = [r ** (1 / number) for r in remaining]
    return tuple((1 - level, level - following) for level, following in pairwise(levels))


def _kind_and_number(schedule: str) -> tuple[str, float]:
    if schedule == "linear":
        return "pow", 1.0
    kind, _, text = schedule.partition("_")
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if kind not in ("pow", "shifted") or not 0 < number < float("inf"):
        raise ValueError(
            "schedule: expected 'linear', or 'pow_' or 'shifted_' and a positive number (as in 'pow_0.25'), "
            f"got {schedule!r}"
        )
    return kind, number


class Update(NamedTuple):
    """A step that is not taken yet: it leads to x + dt * slope."""

    x: Tensor
    slope: Tensor
    dt: float

    def taken(self) -> Tensor:
        """X + dt * slope, in the dtype of x."""
        return torch.add(self.x, self.slope, alpha=self.dt)


def last_update(
    velocity: Velocity,
    x: Tensor,
    steps: int,
    schedule: str = "linear",
    solver: str = "euler",
) -> Update:
    """`integrate` but for the last addition, which whoever takes it can join with what comes next."""
    update = Update(x, x, 0.0)
    for i, (t, dt) in enumerate(schedule_steps(steps, schedule)):
        x = update.taken() if i else x
        update = Update(x, SOLVERS[solver].slope(velocity, x, t, dt), dt)
    return update


def integrate(
    velocity: Velocity,
    x: Tensor,
    steps: int,
    schedule: str = "linear",
    solver: str = "euler",
) -> Tensor:
    """Follow the velocity from t = 0 to t = 1.

    Args:
        velocity: called with x and t; returns a tensor like x.
        x: the noise to start from; not changed.
        steps: number of steps, at least 1.
        schedule: see `schedule_steps`.
        solver: one of `SOLVERS`: "euler", "heun" (the explicit trapezoid) or "midpoint".

    Returns:
        x at t = 1.

    Raises:
        ValueError: for an unknown schedule or solver, or no steps.
    """
    Plan(steps, schedule, solver).check()
    return last_update(velocity, x, steps, schedule, solver).taken()


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
