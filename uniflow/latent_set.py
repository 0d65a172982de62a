"""Latents of a data set in a folder: shards of equal latents, which are read where they lie, and what they are of.

    manifest.json                which tokenizer, pictures of what size, how many shards of how many pictures
    latents-00000.safetensors    latents [n, N, C], `flipped` alike, labels [n]; the names of the pictures
    statistics.json              written last: mean and standard deviation of every channel, latents in every shard

safetensors, not tar files: a latent is then a slice of a file that is mapped into memory, in any order, without a copy
of the rest and without an index beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from uniflow.atomic import replacing, write_json
from uniflow.latents import LatentsError, check_tokenizer, fingerprint, hash_weights, meaning
from uniflow.model import UniFlow
from uniflow.reading import check_folder, parse_json, read_json, shown

MANIFEST, STATISTICS = "manifest.json", "statistics.json"
_FORMAT = "uniflow-latent-set-1"
_SAID = "uniflow"  # what a shard's metadata is called
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Maker(NamedTuple):
    """What makes the latents of a set.

    tokenizer: the config of the model, as far as it says what a latent means; with latent_ch and patch_size.
    fingerprint: of the weights around the latent, see `uniflow.latents.fingerprint`.
    encoder: a hash of all weights that encode.
    """

    tokenizer: dict[str, Any]
    fingerprint: str
    encoder: str

    @classmethod
    def of(cls, model: UniFlow) -> Maker:
        """That a UniFlow is."""
        return cls(
            meaning(model),
            fingerprint(model),
            hash_weights(model.embeddings, model.encoder, model.chal_proj),
        )


@dataclass(frozen=True)
class Manifest:
    """What a set of latents is: the same for all its shards, and whoever goes on with it must want the same.

    Attributes:
        tokenizer, fingerprint, encoder: of what makes the latents, see `Maker`.
        size: (H, W) of the pictures in pixels.
        dtype: of the latents.
        flips: whether there is a latent of each picture's mirror image too.
        per_shard: pictures in a shard; the last may have fewer, and those with pictures that could not be read.
        pictures: how many there were to read.
        listing: a hash of their names and labels, in order.
        classes: what the labels are called; None without labels, empty if they are numbers from elsewhere.
    """

    tokenizer: dict[str, Any]
    fingerprint: str
    encoder: str
    size: tuple[int, int]
    dtype: str
    flips: bool
    per_shard: int
    pictures: int
    listing: str
    classes: list[str] | None

    @classmethod
    def of(
        cls,
        model: UniFlow | Maker,
        size: tuple[int, int],
        dtype: torch.dtype,
        flips: bool,
        per_shard: int,
        names: Iterable[str],
        labels: np.ndarray | None,
        classes: list[str] | None,
    ) -> Manifest:
        """What pictures become by a model, as they are called and labelled."""
        digest, count = hashlib.sha256(), 0
        for name in names:
            digest.update(name.encode(errors="surrogateescape") + b"\0")
            count += 1
        if labels is not None:
            digest.update(labels.astype("<i8").tobytes())
        return cls(
            *(model if isinstance(model, Maker) else Maker.of(model)),
            size,
            str(dtype).removeprefix("torch."),
            flips,
            per_shard,
            count,
            digest.hexdigest(),
            classes,
        )

    @property
    def shards(self) -> int:
        """How many."""
        return -(-self.pictures // self.per_shard)

    def numbers(self, shard: int) -> range:
        """The pictures of a shard."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.pictures))

    def path(self, folder: Path, shard: int) -> Path:
        """Where a shard lies."""
        return folder / f"latents-{shard:05}.safetensors"

    def latent_shape(self) -> tuple[int, int]:
        """(N, C)."""
        patch = self.tokenizer["patch_size"]
        return (self.size[0] // patch) * (self.size[1] // patch), self.tokenizer["latent_ch"]

    def write(self, folder: Path) -> None:
        """To its place in the folder, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MANIFEST, {"format": _FORMAT, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """From a folder.

        Raises:
            FileNotFoundError: if there is none.
            LatentsError: if it is none of a set of latents.
        """
        values = read_json(check_folder(folder) / MANIFEST)
        if values.pop("format", None) != _FORMAT:
            raise LatentsError(f"{folder / MANIFEST} is of no set of latents (format {_FORMAT})")
        try:
            manifest = cls(**{**values, "size": tuple(values["size"])})
            tokens, channels = manifest.latent_shape()
            numbers = (*manifest.size, manifest.per_shard, manifest.pictures, tokens, channels)
            fits = all(type(number) is int and 0 < number < 1 << 48 for number in numbers)
        except Exception as error:  # whatever a forged file makes it meet
            raise LatentsError(f"{folder / MANIFEST} is damaged: {shown(error)}") from None
        if not fits or manifest.dtype not in _DTYPES or len(manifest.size) != 2:
            raise LatentsError(f"{folder / MANIFEST} is damaged: its numbers do not fit together")
        return manifest

    def differences(self, other: Manifest) -> list[str]:
        """What another one says otherwise, by name."""
        ours, theirs = asdict(self), asdict(other)
        ours, theirs = ({**values.pop("tokenizer"), **values} for values in (ours, theirs))
        return [name for name in ours if ours[name] != theirs.get(name)]


@dataclass(frozen=True)
class Moments:
    """Count, mean and summed squared distance from it of each channel, float64, so that shards add up."""

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, latents: Tensor) -> Moments:
        """Of latents [..., C]."""
        rows = latents.float().numpy().astype(np.float64).reshape(-1, latents.shape[-1])
        if not len(rows):
            return cls(0, np.zeros(rows.shape[1]), np.zeros(rows.shape[1]))
        mean = rows.mean(0)
        return cls(len(rows), mean, np.square(rows - mean).sum(0))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        if not count:
            return self
        away = other.mean - self.mean
        mean = self.mean + away * (other.count / count)
        return Moments(count, mean, self.squares + other.squares + away**2 * (self.count * other.count / count))


def write_shard(
    folder: Path,
    manifest: Manifest,
    shard: int,
    latents: Tensor,
    flipped: Tensor | None,
    labels: Tensor | None,
    names: Sequence[str],
    skipped: Sequence[str],
) -> None:
    """Write a shard, whole or not at all.

    Args:
        latents, flipped: [n, N, C] on the CPU, of the manifest's dtype.
        labels: int64 [n].
        names: of the n pictures.
        skipped: names of those that could not be read.

    Raises:
        ValueError: if the latents are not finite.
        OSError: if they cannot be written.
    """
    tensors = {"latents": latents, "flipped": flipped, "labels": labels}
    given = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    both = [each for each in (latents, flipped) if each is not None]
    if not all(each.isfinite().all() for each in both):
        raise ValueError(
            "the latents are not finite: the weights are not, or their numbers are too large for the dtype"
        )
    moments = sum(map(Moments.of, both[1:]), Moments.of(latents))
    said = {
        "listing": manifest.listing,
        "names": list(names),
        "skipped": list(skipped),
        "moments": [moments.count, moments.mean.tolist(), moments.squares.tolist()],
    }
    path = manifest.path(folder, shard)
    with replacing(path) as temporary:
        try:
            save_file(given, temporary, metadata={_SAID: json.dumps(said)})  # several would come in any order
        except SafetensorError as error:  # how the writer reports a full disk
            raise OSError(f"cannot write {path}: {error}") from None


def finish(folder: Path, manifest: Manifest) -> tuple[int, list[str]]:
    """Write the statistics of a folder that has all its shards; gives the number of latents, and who was skipped.

    Raises:
        LatentsError: if a shard is missing, damaged, or of other pictures.
    """
    total, rows, skipped = Moments.of(torch.zeros(0, manifest.latent_shape()[1])), [], []
    for shard in range(manifest.shards):
        said, count = _read_header(folder, manifest, shard)
        part = said["moments"]
        total += Moments(part[0], *(np.array(values) for values in part[1:]))
        rows.append(count)
        skipped += said["skipped"]
    deviation = np.sqrt(total.squares / max(total.count, 1))
    values = {"mean": total.mean.tolist(), "std": deviation.tolist(), "rows": rows, "skipped": len(skipped)}
    write_json(folder / STATISTICS, values)
    return sum(rows), skipped


def _read_header(folder: Path, manifest: Manifest, shard: int) -> tuple[dict[str, Any], int]:
    """What a shard says of itself, and how many pictures it holds."""
    path = manifest.path(folder, shard)
    if not path.is_file():
        raise LatentsError(f"{folder} is not finished: {path.name} is missing; the command that began it goes on")
    try:
        with safe_open(path, framework="pt") as file:
            said, found = parse_json((file.metadata() or {}).get(_SAID, "{}"), _SAID), file.get_slice("latents")
            shape, dtype = found.get_shape(), found.get_dtype()
    except Exception as error:  # the reader raises whatever a forged header makes it meet
        raise LatentsError(f"{path} is damaged: {error}") from None
    if said.get("listing") != manifest.listing:
        raise LatentsError(f"{path} is of other pictures than {MANIFEST}")
    short = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    if tuple(shape[1:]) != manifest.latent_shape() or short.get(dtype) != manifest.dtype:
        raise LatentsError(
            f"{path}: expected latents {manifest.latent_shape()} of {manifest.dtype}, got {shape}, {dtype}"
        )
    return said, shape[0]


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of every channel over a set of latents, float32 [C], by which generators see them."""

    mean: Tensor
    std: Tensor

    @classmethod
    def read(cls, folder: str | Path, model: UniFlow | None = None) -> ChannelStatistics:
        """Those of a finished set; of its files manifest.json and statistics.json are enough.

        Args:
            folder: that `uniflow encode` wrote, or with copies of the two files.
            model: the tokenizer that is to decode latents, to make sure that the set's are its own.

        Raises:
            FileNotFoundError: if there is no manifest.
            LatentsError: if the set is not finished, its statistics are damaged, or it is of another model.
        """
        manifest = Manifest.read(Path(folder))
        if model is not None:
            check_tokenizer(Path(folder), manifest.tokenizer, manifest.fingerprint, model)
        return cls._of(Path(folder), manifest, _read_statistics(Path(folder)))

    @classmethod
    def _of(cls, folder: Path, manifest: Manifest, values: dict[str, Any]) -> ChannelStatistics:
        try:
            mean, std = (torch.tensor(values[name], dtype=torch.float32) for name in ("mean", "std"))
        except (KeyError, TypeError, ValueError) as error:
            raise LatentsError(f"{folder / STATISTICS} is damaged: {shown(error)}") from None
        if not mean.shape == std.shape == manifest.latent_shape()[1:]:
            raise LatentsError(f"{folder / STATISTICS} does not fit {MANIFEST}")
        return cls(mean, std)

    def standardised(self, latents: Tensor) -> Tensor:
        """Latents [..., C] less the mean, over the deviation; float32."""
        return (latents.float() - self.mean.to(latents.device)) / self._scale(latents)

    def restored(self, latents: Tensor) -> Tensor:
        """Back from `standardised`."""
        return latents.float() * self._scale(latents) + self.mean.to(latents.device)

    def _scale(self, latents: Tensor) -> Tensor:
        return self.std.to(latents.device).clamp_min(1e-6)  # a channel may be constant


def _read_statistics(folder: Path) -> dict[str, Any]:
    if not (folder / STATISTICS).exists():
        raise LatentsError(f"{folder} is not finished: there is no {STATISTICS}; the command that began it goes on")
    return read_json(folder / STATISTICS)


class LatentSet:
    """The latents of a folder, in order, read from files that are mapped into memory.

    Safe to pickle, for workers of a DataLoader, and to fork; each process maps the files for itself.

    Args:
        folder: that `uniflow encode` wrote, finished.
        model: the tokenizer that is to decode them, to make sure that they are its own; not looked at if not given.

    Raises:
        FileNotFoundError: if there is no manifest.
        LatentsError: if the set is not finished or damaged, or of another model.

    Attributes:
        manifest: see `Manifest`.
        statistics: over all latents, those of mirror images too; `mean` and `std` are its own, float32 [C].
        labels: int64 [len], or None.
    """

    def __init__(self, folder: str | Path, model: UniFlow | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        if model is not None:
            check_tokenizer(self.folder, self.manifest.tokenizer, self.manifest.fingerprint, model)
        statistics = _read_statistics(self.folder)
        self.statistics = ChannelStatistics._of(self.folder, self.manifest, statistics)
        self.mean, self.std = self.statistics.mean, self.statistics.std
        try:
            rows = [int(count) for count in statistics["rows"]]
        except (KeyError, TypeError, ValueError) as error:
            raise LatentsError(f"{self.folder / STATISTICS} is damaged: {shown(error)}") from None
        if len(rows) != self.manifest.shards:
            raise LatentsError(f"{self.folder / STATISTICS} does not fit {MANIFEST}")
        for shard, count in enumerate(rows):
            if _read_header(self.folder, self.manifest, shard)[1] != count:
                raise LatentsError(f"{self.manifest.path(self.folder, shard)} does not fit {STATISTICS}")
        self._ends = np.cumsum(rows)
        self._files: dict[int, Any] = {}
        self.labels = self._all_labels()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """The numbers of all latents, shuffled, for one epoch."""
        return rng.permutation(len(self))

    def latent(self, number: int, flipped: bool = False) -> Tensor:
        """[N, C], as it was written; of the mirror image if `flipped`.

        Raises:
            IndexError: for a number out of range.
            ValueError: if mirror images were not encoded.
        """
        if flipped and not self.manifest.flips:
            raise ValueError(f"flipped: {self.folder} has no latents of mirror images; encode with --flip")
        shard, row = self._place(number)
        return self._open(shard).get_slice("flipped" if flipped else "latents")[row]

    def name(self, number: int) -> str:
        """What the picture was called."""
        shard, row = self._place(number)
        return parse_json(self._open(shard).metadata()[_SAID], _SAID)["names"][row]

    def names(self) -> tuple[list[str], list[str]]:
        """What the pictures of all latents were called, in order; and those that could not be read.

        Raises:
            LatentsError: if the shards do not say so of each latent.
        """
        said = [_read_header(self.folder, self.manifest, shard)[0] for shard in range(self.manifest.shards)]
        try:
            encoded, skipped = ([name for part in said for name in part[kind]] for kind in ("names", "skipped"))
        except (KeyError, TypeError):
            encoded, skipped = [], []
        if len(encoded) != len(self) or not all(isinstance(name, str) for name in (*encoded, *skipped)):
            raise LatentsError(f"{self.folder} is damaged: expected the names of {len(self)} pictures")
        return encoded, skipped

    def standardised(self, latents: Tensor) -> Tensor:
        """Latents [..., C] less the mean, over the deviation; float32."""
        return self.statistics.standardised(latents)

    def restored(self, latents: Tensor) -> Tensor:
        """Back from `standardised`."""
        return self.statistics.restored(latents)

    def _place(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"expected a number from 0 to {len(self) - 1}, got {number}")
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard - 1] if shard else 0)

    def _open(self, shard: int) -> Any:
        if shard not in self._files:
            self._files[shard] = safe_open(self.manifest.path(self.folder, shard), framework="pt")
        return self._files[shard]

    def _all_labels(self) -> Tensor | None:
        if self.manifest.classes is None:
            return None
        labels = torch.cat([self._open(shard).get_tensor("labels") for shard in range(self.manifest.shards)])
        if labels.shape != (len(self),):
            raise LatentsError(f"{self.folder}: expected a label for each of {len(self)} latents, got {len(labels)}")
        return labels
