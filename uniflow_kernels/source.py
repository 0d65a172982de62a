"""What flow matching makes its patches and its noise of: one value for everything behind the ops' signatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Source(NamedTuple):
    """The patches x1 and the noise x0 of `interpolate` and `velocity_loss`, whose names the fields have.

    Without noise the seed counts: `number`, or what `held` holds on the device of the images.
    """

    images: Tensor
    noise: Tensor | None
    held: Tensor | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    number: int
    offset: int
    first_row: int
    patch_size: int
    repeats: int = 1

    @property
    def seed(self) -> int | Tensor:
        """The number, or the tensor that holds it."""
        return self.number if self.held is None else self.held

    @property
    def grid(self) -> tuple[int, int]:
        """Lines of patches, and patches a line."""
        return self.images.shape[2] // self.patch_size, self.images.shape[3] // self.patch_size

    @property
    def length(self) -> int:
        """C*P*P, of a row."""
        return self.images.shape[1] * self.patch_size * self.patch_size

    @property
    def rows(self) -> tuple[int, int, int]:
        """The shape that x1 and x0 have, [k*B, N, C*P*P]."""
        lines, across = self.grid
        return self.repeats * self.images.shape[0], lines * across, self.length

    def part(self, images: slice, lines: slice) -> Source:
        """Some images, or some lines of patches of one, without repeats: either way the rows follow each other."""
        down, across = self.grid
        tokens = slice(lines.start * across, lines.stop * across)
        return self._replace(
            images=self.images[images, :, lines.start * self.patch_size : lines.stop * self.patch_size],
            noise=None if self.noise is None else self.noise[images, tokens],
            first_row=self.first_row + images.start * down * across + tokens.start,
        )

    def without_tensors(self) -> Source:
        """What may be kept for a backward pass, which is given the tensors that it needs again."""
        return self._replace(images=None, noise=None, held=None)  # type: ignore[arg-type]
