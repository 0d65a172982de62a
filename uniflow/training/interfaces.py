"""What the Trainer asks of what it trains: a module with a student, whose call gives losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Losses(Protocol):
    """What one call of an objective gives; with `parallel: fsdp` a dataclass, whose tensors FSDP finds."""

    @property
    def total(self) -> Tensor:
        """A scalar, which carries the gradient."""
        ...

    def measured(self) -> dict[str, Tensor]:
        """What else is logged, without a gradient: scalars or vectors, of the same names and lengths in every step."""
        ...


@runtime_checkable
class Student(Protocol):
    """The model that is trained: an `nn.Module` with what a checkpoint and more than one process need."""

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        ...

    @property
    def pretrained_parts(self) -> tuple[str, ...]:
        """How the names of parameters begin that a stage may freeze or give a learning rate of their own."""
        ...

    @property
    def untrained_parts(self) -> tuple[str, ...]:
        """How the names of parameters begin that no stage trains, as the data have no use for them."""
        ...

    def layers(self) -> list[nn.Module]:
        """What FSDP gathers one by one; the rest is gathered once a step."""
        ...

    def save_config(self, folder: Path) -> None:
        """Write what it is built from, `folder`/config.json and whatever else that takes."""
        ...

    def save_pretrained(self, folder: Path) -> None:
        """Write that and `folder`/model.safetensors, whose keys are those of `state_dict`."""
        ...

    # as every nn.Module has them

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...  # noqa: D102

    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...  # noqa: D102

    def train(self, mode: bool = True) -> Any: ...  # noqa: D102

    def eval(self) -> Any: ...  # noqa: D102


@runtime_checkable
class Seeing(Protocol):
    """A student that may have a vision encoder, which stages train that say a `vision_learning_rate`."""

    @property
    def vision_parts(self) -> tuple[str, ...]:
        """How the names of its parameters begin; none without one."""
        ...


def vision_parts(student: Student) -> tuple[str, ...]:
    """How the names of a student's parameters begin that are of its vision encoder."""
    return student.vision_parts if isinstance(student, Seeing) else ()


@runtime_checkable
class Resizable(Protocol):
    """An objective whose student can be trained at several sizes; `image_size` in its config.json says which it has."""

    @property
    def image_size(self) -> int:
        """Side of the images that the student is trained at, in pixels."""
        ...

    def check_image_size(self, image_size: int) -> None:
        """Raise a ValueError unless `resize` can serve."""
        ...

    def resize(self, image_size: int, averages: dict[str, Tensor] | None = None) -> None:
        """Bring the student, and what is frozen beside it, to another size.

        Args:
            image_size: side of the images, in pixels.
            averages: of the student's parameters, by name, to be brought there too.
        """
        ...


def student_of(objective: nn.Module) -> Student:
    """An objective's student.

    Raises:
        TypeError: if it has none, or one that lacks something, naming what.
    """
    student = getattr(objective, "student", None)
    if isinstance(student, nn.Module) and isinstance(student, Student):
        return student
    expected = [name for name in dir(Student) if not name.startswith("_")]
    missing = ", ".join(name for name in expected if not hasattr(student, name))
    raise TypeError(
        f"objective: expected a module whose `student` is a module with {', '.join(expected)}; "
        f"the student is a {type(student).__name__} without {missing or 'parameters'}"
    )
