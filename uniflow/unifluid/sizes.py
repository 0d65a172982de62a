"""Pictures to draw of several sizes: which one a picture is brought to, and which one comes when."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

_PERIOD = 1 << 10  # runs after which the sizes come in the same order again


class DrawingSize(NamedTuple):
    """A size of pictures to draw.

    size: (H, W) in pixels.
    tokens: N, image tokens that this makes.
    source: the slots of a source of this size, see `uniflow.unifluid.slots.source_slots`.
    """

    size: tuple[int, int]
    tokens: int = 0
    source: tuple[int, ...] = ()


def nearest_size(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> int:
    """Which of the sizes has the aspect ratio that is nearest to that of a picture; of those, the nearest area.

    Args:
        size: (height, width) of the picture.
        sizes: to choose from. Ratios and areas are nearest by their logarithms.
    """

    def away(number: int) -> tuple[float, float]:
        height, width = (math.log(own / other) for own, other in zip(size, sizes[number], strict=True))
        return round(abs(height - width), 6), abs(height + width)

    return min(range(len(sizes)), key=away)


class Turns:
    """Which size each run of neighbours has, so that every size has the share that its pictures have.

    The runs of a size are spread evenly; a size that has any pictures has at least one run of `_PERIOD`.

    Args:
        counts: pictures of each size, some of which may have none.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        total = sum(counts)
        runs = [max(1, round(_PERIOD * count / total)) if count else 0 for count in counts]
        when = [(Fraction(2 * turn + 1, 2 * each), number) for number, each in enumerate(runs) for turn in range(each)]
        self._order = np.array([number for _, number in sorted(when)])
        self._runs = runs
        self._earlier = np.zeros(len(self._order), np.int64)
        for number in range(len(counts)):
            own = self._order == number
            self._earlier[own] = np.arange(own.sum())

    def of(self, run: int) -> tuple[int, int]:
        """The number of a run's size, and how many runs had it before."""
        period, turn = divmod(run, len(self._order))
        number = int(self._order[turn])
        return number, period * self._runs[number] + int(self._earlier[turn])
