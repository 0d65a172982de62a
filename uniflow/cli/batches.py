"""Pictures in batches, as the tokenizer takes them: fitted, of one size, as many as memory allows."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from uniflow.cli.files import Pictures, Source
from uniflow.cli.inputs import InputError
from uniflow.cli.printing import notice
from uniflow.cli.workers import Workers
from uniflow.config import UniFlowConfig
from uniflow.encoder import encoding_bytes_per_token
from uniflow.model import UniFlow
from uniflow.pictures import center_crop, fit_to_patches, to_tensor

T = TypeVar("T")
Size = tuple[int, int]

# floating-point operations of a picture's attention from which on it takes many seconds
_SLOW = {"cpu": 1e12, "cuda": 1e15}


@dataclass(frozen=True)
class Item:
    """A picture: where it is from, its own width and height, and as the model takes it, uint8 [3, H, W]."""

    source: Source
    own: Size
    pixels: Tensor

    @property
    def size(self) -> Size:
        """(H, W) in pixels, as the model takes it."""
        return self.pixels.shape[1], self.pixels.shape[2]


def stacked(items: Sequence[Item]) -> Tensor:
    """Pictures of one size, uint8 [B, 3, H, W]."""
    return torch.stack([item.pixels for item in items])


def fitted(
    pictures: Pictures, config: UniFlowConfig, keep_size: bool, files: Workers, size: int | None = None
) -> Iterator[Item]:
    """The pictures, with the model's size, or another, or, if they keep theirs, with sides that the patch divides."""

    def fit(picture: Image.Image) -> Tensor:
        if keep_size:
            return to_tensor(fit_to_patches(picture, config.patch_size))
        return to_tensor(center_crop(picture, size or config.image_size))

    for source, own, pixels in pictures.read(fit, files):
        yield Item(source, own, pixels)


def batches(
    model: UniFlow,
    items: Iterable[Item],
    pictures: Pictures,
    batch_size: int,
    max_memory: int | None,
    bar: Progress,
) -> Iterator[list[Item]]:
    """Pictures to encode; those of one size that follow each other share a batch. The bar counts them.

    No batch goes over the end of a block of `batch_size` pictures as they were given: which are together depends on
    neither what cannot be read before them nor the processes that share the blocks.
    """
    task = None
    slow = Slow(model)

    def longest(item: Item) -> int:
        most = most_encoded(model, item.size, max_memory)
        return 1 if slow(item.size) else min(batch_size, most)

    for run in runs(items, longest, lambda item: (item.source.place // batch_size, item.size)):
        task = bar.add_task("") if task is None else task  # not before it is known that there is memory
        bar.update(task, total=pictures.total)
        slow.say(str(run[0].source.path), run[0].size)
        yield run
        bar.advance(task, len(run))


class Slow:
    """Which sizes of pictures take long, and why; called with a size it says whether it is one."""

    def __init__(self, model: UniFlow) -> None:
        self.model = model
        self._said: set[Size] = set()

    def __call__(self, size: Size) -> bool:
        """Whether a picture of (H, W) takes many seconds; such are not batched: each is there when it is done."""
        return self._operations(size) > _SLOW.get(self.model.device.type, math.inf)

    def say(self, name: str, size: Size) -> None:
        """Before the first picture of a slow size say so."""
        if self(size) and size not in self._said:
            self._said.add(size)
            notice(
                f"{name} takes long: {size[1]}x{size[0]} pixels are {self._tokens(size)} tokens, and in each layer "
                f"attention compares all with all, {self._operations(size) / 1e12:.0f}e12 operations for the picture"
            )

    def _tokens(self, size: Size) -> int:
        return math.prod(size) // self.model.config.patch_size**2

    def _operations(self, size: Size) -> int:
        config = self.model.config
        widths = config.num_hidden_layers * config.hidden_size + config.global_blocks_depth * config.vit_hidden_size
        return 4 * self._tokens(size) ** 2 * widths


def most_encoded(model: UniFlow, size: Size, max_memory: int | None) -> int:
    """How many pictures of a size can be encoded together."""
    if max_memory is None:
        return sys.maxsize
    tokens = 1 + math.prod(size) // model.config.patch_size**2
    needed = tokens * encoding_bytes_per_token(model.config, model.dtype, model.precision)
    if needed > max_memory:
        raise InputError(
            f"--max-memory: encoding a picture of {size[0]}x{size[1]} needs at least {needed / 1e6:.3f} MB, got "
            f"{max_memory / 1e6:.3f} MB"
        )
    return max_memory // needed


def runs(items: Iterable[T], longest: Callable[[T], int], key: Callable[[T], object]) -> Iterator[list[T]]:
    """Split into runs of neighbours with the same key, at most `longest(first)` long."""
    run: list[T] = []
    most = 0
    for item in items:
        if run and (len(run) == most or key(item) != key(run[0])):
            yield run
            run = []
        if not run:
            most = longest(item)
        run.append(item)
    if run:
        yield run


def seeds_of_blocks(seed: int, blocks: int) -> list[int]:
    """A seed for each block of what processes share: what is drawn for it is the same whoever has it."""
    return torch.randint(1 << 62, (blocks,), generator=torch.Generator().manual_seed(seed)).tolist()
