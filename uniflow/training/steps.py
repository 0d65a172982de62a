"""A step that has been made: what it was made of, and what it measured, on its way to the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uniflow.data import Batch
from uniflow.training.logs import is_finite

_NAMED = 8  # samples in an error message


@dataclass
class MadeStep:
    """A step that has been made but not looked at yet: what it was made of, and its numbers on their way."""

    number: int
    stage: int
    spent: float
    seconds: float  # of the stage
    factor: float  # of the learning rates
    batches: list[Batch]
    seeds: list[int]
    numbers: Arriving

    @property
    def names(self) -> list[str]:
        """Of the samples."""
        return [name for batch in self.batches for name in batch.names]

    def what_is_wrong(self) -> str:
        """Which number of a failed step is not finite, and the samples it comes from."""
        own, norm, loss, *_ = self.numbers.values()
        if is_finite(own) and not is_finite(loss):
            return f"the loss of another process is {loss} at step {self.number}"
        what = f"the gradient's norm is {norm}" if is_finite(own) else f"the loss is {own}"
        more = f" and {len(self.names) - _NAMED} more" if len(self.names) > _NAMED else ""
        return f"{what} at step {self.number}, of the samples {', '.join(self.names[:_NAMED])}{more}"


def plain(inputs: Any) -> Any:
    """Named tuples as dictionaries, which can be read again without executing anything."""
    if hasattr(inputs, "_asdict"):
        inputs = inputs._asdict()
    if isinstance(inputs, dict):
        return {name: plain(value) for name, value in inputs.items()}
    return [plain(value) for value in inputs] if isinstance(inputs, (tuple, list)) else inputs


class Arriving:
    """Numbers that are copied to the host without waiting for them."""

    def __init__(self, numbers: Tensor) -> None:
        self._event = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def here(self) -> bool:
        """Whether they have arrived."""
        return self._event is None or self._event.query()

    def values(self) -> list[float]:
        """The numbers, waited for if need be."""
        if self._event is not None:
            self._event.synchronize()
        return self._numbers.tolist()
