"""Features of a list of pictures, made once: parts in a folder that is called after all that they depend on.

    KEY/features-00000.safetensors    for each layer its features [n, D] in float32, and the pictures' numbers [n]

A part is whole or not there, so whoever was interrupted goes on with those that are missing, and processes share them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from uniflow.atomic import replacing
from uniflow.evaluation.probing import PooledLayers
from uniflow.reading import shown
from uniflow_kernels import __version__

PER_PART = 1024  # pictures
_FORMAT = "uniflow-features-1"
_NUMBERS = "pictures"
_KEY_LENGTH = 32  # characters of a SHA-256, 128 bits


def feature_key(
    encoder: PooledLayers, config: Mapping[str, Any], size: int, files: Iterable[tuple[str, Path]], **more: object
) -> str:
    """A hash of all that features depend on, but for what rounds: batch, device and threads.

    Args:
        encoder: its weights and buffers count with all their bits, in the dtype in which they are; layers and pooling.
        config: what else makes it what it is.
        size: side of the pictures as the encoder is given them, in pixels.
        files: the pictures, by name. What stands for them is their size in bytes and when they were written.
        more: whatever else they depend on.
    """
    said = {"format": _FORMAT, "version": __version__, "per_part": PER_PART, "config": config, "size": size}
    said |= {"layers": encoder.layers, "pooling": encoder.pooling, **more}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode())
    for name, path in files:
        found = path.stat()
        digest.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\0".encode(errors="surrogateescape"))
    for name, tensor in _tensors(encoder):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_KEY_LENGTH]


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


@dataclass(frozen=True)
class FeatureSet:
    """The features of pictures in a folder.

    Attributes:
        folder: of them alone; see `feature_key`.
        layers: whose.
        pictures: how many pictures there are, some of which it may not have been possible to read.
    """

    folder: Path
    layers: Sequence[int]
    pictures: int

    def missing(self) -> list[int]:
        """The parts that are not there."""
        return [part for part in self._parts() if not self._path(part).exists()]

    def places(self, part: int) -> range:
        """The numbers of the pictures of a part."""
        return range(part * PER_PART, min((part + 1) * PER_PART, self.pictures))

    def write(self, part: int, numbers: Sequence[int], features: Tensor) -> None:
        """Write a part, whole or not at all.

        Args:
            part: which.
            numbers: of the pictures, [n], within those of the part.
            features: [layers, n, D].

        Raises:
            ValueError: if they are not finite.
            OSError: if they cannot be written.
        """
        if not features.isfinite().all():
            raise ValueError("the features are not finite: the weights are not, or too large for the dtype")
        tensors = {_name(layer): each.contiguous() for layer, each in zip(self.layers, features.cpu(), strict=True)}
        tensors[_NUMBERS] = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        path = self._path(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            try:
                save_file(tensors, temporary)
            except SafetensorError as error:  # how the writer reports a full disk
                raise OSError(f"cannot write {path}: {error}") from None

    def numbers(self) -> np.ndarray:
        """Of the pictures that there are features of, int64 [n], in order; errors as of `features`."""
        return np.concatenate([self._read(part, _NUMBERS) for part in self._parts()])

    def features(self, layer: int) -> np.ndarray:
        """Of a layer, float32 [n, D].

        Raises:
            ValueError: if a part is missing, or damaged.
        """
        return np.concatenate([self._read(part, _name(layer)) for part in self._parts()])

    def _parts(self) -> range:
        return range(-(-self.pictures // PER_PART))

    def _path(self, part: int) -> Path:
        return self.folder / f"features-{part:05}.safetensors"

    def _read(self, part: int, name: str) -> np.ndarray:
        path = self._path(part)
        if not path.exists():
            raise ValueError(f"{self.folder} is not finished: {path.name} is missing")
        try:
            with safe_open(path, framework="np") as file:
                numbers = file.get_tensor(_NUMBERS)
                found = numbers if name == _NUMBERS else file.get_tensor(name)
        except Exception as error:  # the reader raises whatever a forged header makes it meet
            raise ValueError(f"{path} is damaged: delete it, and it is made again ({shown(error)})") from None
        places = self.places(part)
        ends = [places.start - 1, *numbers.ravel(), places.stop]
        fits = found is numbers if name == _NUMBERS else (found.ndim, found.dtype) == (2, np.float32)
        if numbers.dtype != np.int64 or not (np.diff(ends) > 0).all() or len(found) != len(ends) - 2 or not fits:
            raise ValueError(f"{path} is damaged: delete it, and it is made again (its numbers do not fit together)")
        return found


def _name(layer: int) -> str:
    return f"layer.{layer}"
