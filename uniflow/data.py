"""What is trained on: which sample comes when is a function of a position in an endless stream.

A position is a number of samples. Whoever continues at a position gets the same batches, with any number of workers
and of processes.
"""

from __future__ import annotations

import io
import itertools
import signal
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from uniflow.pictures import PictureError, open_picture, to_tensor

MIXED_SHARDS = 16  # shards whose samples are shuffled together
_OPEN_SHARDS = 2 * MIXED_SHARDS  # in every worker


class Pictures(Protocol):
    """Where pictures come from."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """The numbers of all pictures, shuffled, for one epoch."""
        ...

    def name(self, number: int) -> str:
        """What to call a picture in a message."""
        ...

    def open(self, number: int) -> Image.Image:
        """Read a picture as RGB; raises PictureError or OSError if it cannot be read."""
        ...


class PictureList:
    """Picture files, or RGB pictures in memory, by name."""

    def __init__(self, pictures: Mapping[str, Path | Image.Image]) -> None:
        self.names, self.pictures = list(pictures), list(pictures.values())

    def __len__(self) -> int:
        return len(self.pictures)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """All of them in one shuffle."""
        return rng.permutation(len(self.pictures))

    def name(self, number: int) -> str:
        """The name."""
        return self.names[number]

    def open(self, number: int) -> Image.Image:
        """Read the file, or take the picture as it is."""
        picture = self.pictures[number]
        return open_picture(picture) if isinstance(picture, Path) else picture


class PictureShards:
    """The pictures in WebDataset tar files, read where they stand (needs wids, of the extra `train`).

    An epoch goes through the shards in random order, 16 at a time, whose samples are mixed: a disk then reads few files
    at once.

    Args:
        shards: local tar files.
        suffixes: of the members that are pictures (".jpg", ...).

    Raises:
        ModuleNotFoundError: if wids is not installed.
        PictureError: if a shard is no tar file.
    """

    def __init__(self, shards: Sequence[Path], suffixes: Sequence[str]) -> None:
        self.shards = shards
        self._offsets = [_picture_offsets(shard, tuple(suffixes)) for shard in shards]
        self._ends = np.cumsum([len(offsets) for offsets in self._offsets])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """Shards in random order, the samples of `MIXED_SHARDS` of them in one shuffle."""
        shards = rng.permutation(len(self.shards))
        groups = (shards[first : first + MIXED_SHARDS] for first in range(0, len(shards), MIXED_SHARDS))
        return np.concatenate([rng.permutation(np.concatenate([self._numbers(s) for s in group])) for group in groups])

    def name(self, number: int) -> str:
        """shard.tar:member, or its number where the shard cannot be read any more."""
        shard, offset = self._place(number)
        try:
            return f"{self.shards[shard]}:{_open_shard(self.shards[shard]).get_at_offset(offset)[0]}"
        except (OSError, ValueError, struct.error):
            return f"{self.shards[shard]}:{offset}"

    def open(self, number: int) -> Image.Image:
        """Read a member."""
        shard, offset = self._place(number)
        try:
            name, data = _open_shard(self.shards[shard]).get_at_offset(offset)
        except (ValueError, struct.error) as error:
            raise PictureError(f"{self.shards[shard]} is damaged: {error}") from None
        return open_picture(io.BytesIO(data), f"{self.shards[shard]}:{name}")

    def _place(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, int(self._offsets[shard][number - self._ends[shard]])

    def _numbers(self, shard: int) -> np.ndarray:
        return np.arange(self._ends[shard] - len(self._offsets[shard]), self._ends[shard])


@lru_cache(_OPEN_SHARDS)
def _open_shard(path: Path) -> Any:
    from wids.wids_mmtar import MMIndexedTar

    return MMIndexedTar(str(path))


def _picture_offsets(shard: Path, suffixes: tuple[str, ...]) -> np.ndarray:
    try:
        members = _open_shard(shard).by_index
    except (ValueError, struct.error) as error:
        raise PictureError(f"{shard} is no tar file or is damaged: {error}") from None
    return np.array([offset for name, offset, _ in members if name.lower().endswith(suffixes)], dtype=np.int64)


class Sample(NamedTuple):
    """A sample as its `Samples` collates it; its name; the names of pictures that were to come here but are damaged."""

    value: Any
    name: str
    skipped: list[str]


class Batch(NamedTuple):
    """What the objective is called with, the names of the samples in it, and of the pictures skipped."""

    inputs: tuple[Any, ...]
    names: list[str]
    skipped: list[str]


class Samples(Dataset[Sample], ABC):
    """An endless stream of samples, as the Trainer reads it."""

    @abstractmethod
    def __getitem__(self, position: int) -> Sample:
        """The sample at a position from 0; it depends on nothing else."""

    @abstractmethod
    def collate(self, values: list[Any]) -> tuple[Any, ...]:
        """Values of samples to the objective's positional arguments: tensors, in tuples or dictionaries too."""


class RandomCrops(Samples):
    """An endless stream of random square crops, uint8 [3, S, S], flipped at random.

    Every epoch shows all pictures in another order. Instead of a picture that cannot be read comes the next one.
    Crops are cut where pictures are decoded (in the workers), so that only uint8 squares travel to the GPU.

    Args:
        pictures: to crop.
        size: side of a crop in pixels.
        seed: the same seed gives the same crops.
        smallest: the smallest side of a crop before it is resized to `size`, as a share of the picture's shorter side
            (but never below `size` pixels where the picture has them).
        flip: whether half of the crops are mirrored.

    Raises:
        ValueError: if there is no picture.
    """

    def __init__(self, pictures: Pictures, size: int, seed: int = 0, smallest: float = 0.25, flip: bool = True) -> None:
        if not len(pictures):
            raise ValueError("pictures: expected at least one")
        self.pictures = pictures
        self.size = size
        self.seed = seed
        self.smallest = smallest
        self.flip = flip
        self._epoch, self._order = -1, np.empty(0, int)

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position.

        Raises:
            PictureError: if no picture can be read.
        """
        rng = np.random.default_rng((self.seed, position))
        skipped: list[str] = []
        for following in range(position, position + len(self.pictures)):
            number = self._number(following)
            try:
                picture = self.pictures.open(number)
            except (PictureError, OSError) as error:
                skipped.append(self.pictures.name(number))
                last = error
            else:
                return Sample(self._crop(picture, rng), self.pictures.name(number), skipped)
        raise PictureError(f"none of the {len(self.pictures)} pictures can be read; the last: {last}")

    def collate(self, values: list[Tensor]) -> tuple[Tensor]:
        """Crops to a batch, uint8 [B, 3, S, S]."""
        return (torch.stack(values),)

    def _number(self, position: int) -> int:
        epoch, place = divmod(position, len(self.pictures))
        if epoch != self._epoch:
            # the epoch's order has a stream of its own: positions use (seed, position)
            self._epoch, self._order = epoch, self.pictures.order(np.random.default_rng((self.seed, epoch, 1)))
        return int(self._order[place])

    def _crop(self, picture: Image.Image, rng: np.random.Generator) -> Tensor:
        shorter = min(picture.size)
        side = rng.uniform(min(shorter, max(self.size, self.smallest * shorter)), shorter)
        left, top = (rng.uniform(0, extent - side) for extent in picture.size)
        box = (left, top, left + side, top + side)
        crop = picture.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
        pixels = to_tensor(crop)
        return pixels.flip(-1) if self.flip and rng.random() < 0.5 else pixels


class Positions(Sampler[list[int]]):
    """The positions of one process's micro-batches, step after step, without end.

    A step takes `batch_size` positions; each process has an equal run of neighbours among them, in equal micro-batches.
    """

    def __init__(self, start: int, batch_size: int, micro_batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.start = start
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world = world

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world
        for first in itertools.count(self.start + self.rank * share, self.batch_size):
            for position in range(first, first + share, self.micro_batch_size):
                yield list(range(position, position + self.micro_batch_size))


def load(samples: Samples, positions: Positions, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """The batches at `positions`, read ahead by `workers` processes (0: read here, when asked for)."""
    loader = DataLoader(
        samples,
        batch_sampler=positions,
        num_workers=workers,
        collate_fn=partial(_batch, samples),
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # the loader's own, so that torch's is left alone
    )
    return iter(loader)


def _batch(samples: Samples, taken: list[Sample]) -> Batch:
    return Batch(
        samples.collate([sample.value for sample in taken]),
        [sample.name for sample in taken],
        [name for sample in taken for name in sample.skipped],
    )


def _leave_signals_to_the_parent(_: int) -> None:
    # a signal to the whole job must not kill the workers of a process that is about to save
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
