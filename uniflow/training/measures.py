"""What an objective measures beside its loss: a row of numbers on the device, by name again on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import islice

import torch
from torch import Tensor

from uniflow.training.interfaces import Losses
from uniflow.training.logs import Report


class Measures:
    """The names and lengths of what the first losses measured, which all others must have too."""

    def __init__(self) -> None:
        self._shapes: dict[str, torch.Size] | None = None

    def row(self, losses: Losses) -> Tensor:
        """The total, then what was measured, in float32 [1 + numbers].

        Raises:
            ValueError: if something else is measured than before, or what cannot be logged.
        """
        measured = losses.measured()
        shapes = {name: value.shape for name, value in measured.items()}
        if self._shapes is None:
            _check(shapes)
            self._shapes = shapes
        if shapes != self._shapes:
            raise ValueError(f"objective: expected to measure {_listed(self._shapes)} as before, got {_listed(shapes)}")
        values = [losses.total.detach(), *(measured[name] for name in self._shapes)]
        return torch.cat([value.reshape(-1) for value in values]).float()

    def by_name(self, numbers: Sequence[float]) -> dict[str, float | list[float]]:
        """What follows the total in a row: a number for a scalar, a list for a vector."""
        rest = iter(numbers)
        shapes = (self._shapes or {}).items()
        return {name: list(islice(rest, shape[0])) if shape else next(rest) for name, shape in shapes}


def _check(shapes: dict[str, torch.Size]) -> None:
    if any(len(shape) > 1 for shape in shapes.values()):
        raise ValueError(f"objective: expected to measure scalars and vectors, got {_listed(shapes)}")
    taken = shapes.keys() & {field.name for field in fields(Report)}
    if taken:
        raise ValueError(f"objective: measures {', '.join(sorted(taken))}, which the log has a meaning of its own for")


def _listed(shapes: dict[str, torch.Size]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "nothing"
