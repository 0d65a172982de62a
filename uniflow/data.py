"""What is trained on: which sample comes when is a function of a position in an endless stream.

A position is a number of samples. Whoever continues at a position gets the same batches, with any number of workers
and of processes.
"""

from __future__ import annotations

import io
import itertools
import signal
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from uniflow.pictures import Box, PictureError, cut, open_part, open_picture, picture_size, to_tensor
from uniflow.shards import Members, State, find_members, read_member

T = TypeVar("T")

_HEADER = 1 << 16  # bytes of a picture that nearly always say its size
MIXED_SHARDS = 16  # shards whose samples are shuffled together


class Shuffled(Protocol):
    """A number of things, and in which order an epoch takes them."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """The numbers of all of them, shuffled, for one epoch."""
        ...


class Pictures(Shuffled, Protocol):
    """Where pictures come from."""

    def name(self, number: int) -> str:
        """What to call a picture in a message."""
        ...

    def open(self, number: int) -> Image.Image:
        """Read a picture as RGB; raises PictureError or OSError if it cannot be read."""
        ...

    def open_part(self, number: int, part: Callable[[int, int], Box], size: int) -> Image.Image:
        """Read a part of a picture as a square, see `uniflow.pictures.open_part`; raises what `open` raises."""
        ...


class PictureList:
    """Picture files, or RGB pictures in memory, by name; `largest` is how many pixels a file's may have."""

    def __init__(self, pictures: Mapping[str, Path | Image.Image], largest: int | None = None) -> None:
        self.names, self.pictures = list(pictures), list(pictures.values())
        self.largest = largest

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
        return open_picture(picture, largest=self.largest) if isinstance(picture, Path) else picture

    def size(self, number: int) -> tuple[int, int]:
        """(height, width), of a file by its header."""
        picture = self.pictures[number]
        return picture_size(picture, largest=self.largest) if isinstance(picture, Path) else picture.size[::-1]

    def open_part(self, number: int, part: Callable[[int, int], Box], size: int) -> Image.Image:
        """A part of the file, or of the picture."""
        picture = self.pictures[number]
        if isinstance(picture, Path):
            return open_part(picture, part, size, largest=self.largest)
        return cut(picture, part(*picture.size), size)


class PictureShards:
    """The pictures in WebDataset tar files, read where they stand.

    An epoch goes through the shards in random order, 16 at a time, whose samples are mixed: a disk then reads few files
    at once.

    Args:
        shards: local tar files, not compressed.
        suffixes: of the members that are pictures (".jpg", ...).
        texts: suffixes of the members that `beside` finds.
        largest: how many pixels a picture may have.

    Raises:
        PictureError: if a shard is no tar file, is compressed or cut short, or has two members of one name.
    """

    def __init__(
        self, shards: Sequence[Path], suffixes: Sequence[str], texts: Sequence[str] = (), largest: int | None = None
    ) -> None:
        self.shards = shards
        self.largest = largest
        self.suffixes = tuple(suffixes)
        self.text_suffixes = tuple(texts)
        self._states: list[State] = []
        names: list[bytes] = []
        lengths = [np.empty(0, np.int64)]
        places = [np.empty((0, 1 + len(texts), 2), np.int64)]
        for shard in shards:
            members = find_members(shard)
            self.check_members(shard, members.names)
            self._states.append(members.state)
            found = [name.encode(errors="surrogateescape") for name in filter(self.is_picture, members.names)]
            names.append(b"".join(found))
            lengths.append(np.array([len(name) for name in found], np.int64))
            places.append(self._found(members))
        # names as one text, since a text for each of millions would be several times as large, and slow to pickle
        self._names, self._name_ends = b"".join(names), np.cumsum(np.concatenate(lengths))
        self._places, self._ends = np.concatenate(places), np.cumsum([len(part) for part in places[1:]])

    def __len__(self) -> int:
        return len(self._places)

    def is_picture(self, member: str) -> bool:
        """Whether a member is a picture, by its name."""
        return member.lower().endswith(self.suffixes)

    def check_members(self, shard: Path, members: Sequence[str]) -> None:
        """Refuse a shard for what its members are called; any will do."""

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """Shards in random order, the samples of `MIXED_SHARDS` of them in one shuffle."""
        shards = rng.permutation(len(self.shards))
        groups = (shards[first : first + MIXED_SHARDS] for first in range(0, len(shards), MIXED_SHARDS))
        return np.concatenate([rng.permutation(np.concatenate([self._numbers(s) for s in group])) for group in groups])

    def name(self, number: int) -> str:
        """shard.tar:member."""
        return f"{self.shards[self._shard(number)]}:{self._member(number)}"

    def open(self, number: int) -> Image.Image:
        """Read a member."""
        return open_picture(io.BytesIO(self._read(number, 0)), self.name(number), self.largest)

    def size(self, number: int) -> tuple[int, int]:
        """(height, width), by a member's header; all of it is read only where that stands further behind."""
        try:
            return picture_size(io.BytesIO(self._read(number, 0, _HEADER)), self.name(number), self.largest)
        except PictureError:
            return picture_size(io.BytesIO(self._read(number, 0)), self.name(number), self.largest)

    def open_part(self, number: int, part: Callable[[int, int], Box], size: int) -> Image.Image:
        """Read a part of a member."""
        return open_part(io.BytesIO(self._read(number, 0)), part, size, self.name(number), self.largest)

    def beside(self, number: int, suffix: str, most: int) -> tuple[str, bytes] | None:
        """The member of a picture's key and one of the `texts`: shard.tar:member, and its first bytes; None without."""
        kind = 1 + self.text_suffixes.index(suffix)
        if self._places[number, kind, 1] < 0:
            return None
        name = f"{self.shards[self._shard(number)]}:{sample_key(self._member(number))}{suffix}"
        return name, self._read(number, kind, most)

    def _shard(self, number: int) -> int:
        return int(np.searchsorted(self._ends, number, side="right"))

    def _member(self, number: int) -> str:
        start = self._name_ends[number - 1] if number else 0
        return self._names[start : self._name_ends[number]].decode(errors="surrogateescape")

    def _read(self, number: int, kind: int, most: int | None = None) -> bytes:
        shard = self._shard(number)
        return read_member(self.shards[shard], self._states[shard], self._places[number, kind], most)

    def _numbers(self, shard: int) -> np.ndarray:
        return np.arange(self._ends[shard - 1] if shard else 0, self._ends[shard])

    def _found(self, members: Members) -> np.ndarray:
        """Where pictures stand, and the texts beside each: int64 [N, 1 + texts, 2]; -1 where there is none."""
        numbers = {name: number for number, name in enumerate(members.names)} if self.text_suffixes else {}
        rows = [
            [number, *(numbers.get(sample_key(name) + suffix, -1) for suffix in self.text_suffixes)]
            for number, name in enumerate(members.names)
            if self.is_picture(name)
        ]
        columns = np.array(rows, dtype=np.int64).reshape(-1, 1 + len(self.text_suffixes))
        return np.concatenate([members.places, [[-1, -1]]])[columns]


def sample_key(member: str) -> str:
    """What the members of a sample share: a name up to the first dot behind its folders, as in WebDataset."""
    folders, slash, name = member.rpartition("/")
    return folders + slash + name.split(".")[0]


class Order:
    """Things without end: all of them in every epoch, each time in another order.

    Args:
        things: to number.
        seed: the same seed gives the same orders.
        stream: the orders of other streams of the same seed are others; from 1.
        chosen: bool, one a thing: whether it takes part. All do if not given.

    Raises:
        ValueError: if there is none.
    """

    def __init__(self, things: Shuffled, seed: int, stream: int = 1, chosen: np.ndarray | None = None) -> None:
        self.things = things
        self.seed = seed
        self.stream = stream
        self.chosen = chosen
        self.length = len(things) if chosen is None else int(chosen.sum())
        if not self.length:
            raise ValueError("pictures: expected at least one")
        self._epoch, self._order = -1, np.empty(0, int)

    def number(self, position: int) -> int:
        """Which of them comes at a position."""
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            # not a stream of (seed, position), which samples have
            order = self.things.order(np.random.default_rng((self.seed, epoch, self.stream)))
            self._epoch, self._order = epoch, order if self.chosen is None else order[self.chosen[order]]
        return int(self._order[place])


class Epochs(Order):
    """Pictures in such an order, read; instead of one that cannot be read comes the next. Arguments as of `Order`."""

    def __init__(self, pictures: Pictures, seed: int, stream: int = 1, chosen: np.ndarray | None = None) -> None:
        super().__init__(pictures, seed, stream, chosen)
        self.pictures = pictures

    def read(self, position: int, opening: Callable[[int], T]) -> tuple[int, T, list[str]]:
        """What comes at a position: a picture's number, the picture, and the names of damaged ones it stands in for.

        Args:
            position: in the endless stream.
            opening: reads the picture of a number, as `Pictures.open` does.

        Raises:
            PictureError: if no picture can be read.
        """
        skipped: list[str] = []
        for following in range(position, position + self.length):
            number = self.number(following)
            try:
                return number, opening(number), skipped
            except (PictureError, OSError) as error:
                skipped.append(self.pictures.name(number))
                last = error
        raise PictureError(f"none of the {self.length} pictures can be read; the last: {last}")


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

    def at_size(self, image_size: int) -> Samples:
        """The same samples for images of another size, side in pixels.

        Raises:
            ValueError: if they have none to choose.
        """
        raise ValueError(f"image_size: {type(self).__name__} are of one size")


class RandomCrops(Samples):
    """An endless stream of random square crops, uint8 [3, S, S], flipped at random.

    Every epoch shows all pictures in another order. Instead of a picture that cannot be read comes the next one.
    Crops are cut where pictures are decoded (in the workers), so that only uint8 squares travel to the GPU. A JPEG is
    decoded no larger than its crop needs, see `uniflow.pictures.open_part`.

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
        self.epochs = Epochs(pictures, seed)
        self.pictures = pictures
        self.size = size
        self.seed = seed
        self.smallest = smallest
        self.flip = flip

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position.

        Raises:
            PictureError: if no picture can be read.
        """
        number, crop, skipped = self.epochs.read(position, lambda number: self._crop(number, position))
        return Sample(crop, self.pictures.name(number), skipped)

    def collate(self, values: list[Tensor]) -> tuple[Tensor]:
        """Crops to a batch, uint8 [B, 3, S, S]."""
        return (torch.stack(values),)

    def at_size(self, image_size: int) -> RandomCrops:
        """Crops of another size of the same pictures."""
        return RandomCrops(self.pictures, image_size, self.seed, self.smallest, self.flip)

    def _crop(self, number: int, position: int) -> Tensor:
        rng = np.random.default_rng((self.seed, position))

        def part(width: int, height: int) -> Box:
            shorter = min(width, height)
            side = rng.uniform(min(shorter, max(self.size, self.smallest * shorter)), shorter)
            left, top = (rng.uniform(0, extent - side) for extent in (width, height))
            return left, top, left + side, top + side

        pixels = to_tensor(self.pictures.open_part(number, part, self.size))
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


def load(samples: Samples, positions: Positions, workers: int, pin_memory: bool) -> Iterator[Batch | Exception]:
    """The batches at `positions`, read ahead by `workers` processes (0: read here, when asked for).

    In place of a batch comes the ValueError or OSError of a sample that cannot be read: raised where it is read, it
    would bring a traceback of that process in its message.
    """
    loader = DataLoader(
        _Tried(samples),
        batch_sampler=positions,
        num_workers=workers,
        collate_fn=partial(_batch, samples),
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # the loader's own, so that torch's is left alone
    )
    return iter(loader)


class _Tried(Dataset[Sample | Exception]):
    """Samples, or what was raised instead; a worker's traceback is a note on it."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, position: int) -> Sample | Exception:
        try:
            return self.samples[position]
        except (ValueError, OSError) as error:
            if get_worker_info() is not None:
                error.add_note(traceback.format_exc())
            return error


def _batch(samples: Samples, taken: list[Sample | Exception]) -> Batch | Exception:
    for sample in taken:
        if isinstance(sample, Exception):
            return sample
    read = [sample for sample in taken if not isinstance(sample, Exception)]
    try:
        inputs = samples.collate([sample.value for sample in read])
    except ValueError as error:
        return error
    return Batch(
        inputs,
        [sample.name for sample in read],
        [name for sample in read for name in sample.skipped],
    )


def _leave_signals_to_the_parent(_: int) -> None:
    # a signal to the whole job must not kill the workers of a process that is about to save
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
