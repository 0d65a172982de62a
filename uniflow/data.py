"""Training pictures: random crops and flips of files or pictures in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from uniflow.pictures import open_picture, to_tensor


class RandomCrops(IterableDataset[Tensor]):
    """An endless stream of square crops, flipped at random: uint8 [3, size, size].

    Args:
        pictures: files, or RGB pictures in memory.
        size: side of a crop in pixels.
        seed: the same seed gives the same crops; every worker of a DataLoader has its own stream.
        smallest: the smallest side of a crop before it is resized to `size`, as a share of the picture's shorter side
            (but never below `size` pixels where the picture has them).

    Raises:
        ValueError: if there is no picture.
    """

    def __init__(
        self, pictures: Sequence[Path | Image.Image], size: int, seed: int = 0, smallest: float = 0.25
    ) -> None:
        super().__init__()
        if not pictures:
            raise ValueError("pictures: expected at least one")
        self.pictures = pictures
        self.size = size
        self.seed = seed
        self.smallest = smallest

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        rng = np.random.default_rng((self.seed, worker.id if worker else 0))
        while True:
            picture = self.pictures[int(rng.integers(len(self.pictures)))]
            yield self._crop(open_picture(picture) if isinstance(picture, Path) else picture, rng)

    def _crop(self, picture: Image.Image, rng: np.random.Generator) -> Tensor:
        shorter = min(picture.size)
        side = rng.uniform(min(shorter, max(self.size, self.smallest * shorter)), shorter)
        left, top = (rng.uniform(0, extent - side) for extent in picture.size)
        box = (left, top, left + side, top + side)
        crop = picture.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
        pixels = to_tensor(crop)
        return pixels.flip(-1) if rng.random() < 0.5 else pixels
