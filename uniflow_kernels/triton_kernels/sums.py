"""What programs sum over their rows, added up: for several launches at once, since each addition is a launch too."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_HELD = 1 << 24  # bytes of sums of programs


class ProgramSums:
    """The sums over programs of several launches of one kernel, which are all of the same size.

    They are there after `add_up`, or before, when another launch asks for more memory than may be held.

    Args:
        launches: how many will come.
    """

    def __init__(self, launches: int) -> None:
        self.launches, self.made, self.added = launches, 0, 0
        self.whole = self.totals = torch.empty(0)
        self.held: tuple[Tensor, ...] = ()  # of `whole`, which every so many launches take again
        self.each: tuple[Tensor, ...] = ()  # of `totals`

    def of_launch(self, programs: int, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """Where the next launch's programs write, [programs, *shape] in float32, and where their sum will be."""
        if not self.each:
            of_one = 4 * programs * torch.Size(shape).numel()
            # a kept launch wants memory that begins at a multiple of 16 bytes
            at_once = 1 if of_one % 16 else max(1, min(self.launches, _MOST_HELD // max(1, of_one)))
            self.whole = torch.empty(at_once, programs, *shape, dtype=torch.float32, device=device)
            self.totals = torch.empty(self.launches, *shape, dtype=torch.float32, device=device)
            self.held, self.each = self.whole.unbind(), self.totals.unbind()
        elif self.made - self.added == len(self.held):
            self.add_up()
        place = self.held[self.made - self.added], self.each[self.made]
        self.made += 1
        return place

    def add_up(self) -> None:
        """Add up what was launched since the last time."""
        if self.made > self.added:
            torch.sum(self.whole[: self.made - self.added], 1, out=self.totals[self.added : self.made])
            self.added = self.made


def of_launch(
    sums: ProgramSums | None, programs: int, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """As the method of that name; without others to add up with, memory alone."""
    if sums is None:
        return torch.empty(programs, *shape, dtype=torch.float32, device=device), None
    return sums.of_launch(programs, shape, device)
