"""`uniflow encode` of a data set: pictures of folders and shards into a folder of latents, by one process or many."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from uniflow.cli.bars import picture_bar
from uniflow.cli.batches import most_encoded
from uniflow.cli.files import check_folder, labels_of_folders, picture_files, picture_suffixes
from uniflow.cli.inputs import DTYPES, InputError, Named, choose_device, choose_dtype, explained, load_model
from uniflow.cli.printing import counted, notice, say
from uniflow.cli.runs import find_shards
from uniflow.cli.tokenize import LATENTS
from uniflow.cli.workers import Workers
from uniflow.data import PictureList, Pictures, PictureShards
from uniflow.latent_set import MANIFEST, STATISTICS, Maker, Manifest, finish, write_shard
from uniflow.normalization import normalize
from uniflow.pictures import PictureError, center_crop, to_tensor
from uniflow.training.checkpoints import rests
from uniflow.training.lock import held
from uniflow.training.processes import Processes, joined
from uniflow.unifluid.tokens import is_autoencoder, read_image_tokenizer

_CLASS = ".cls"  # WebDataset's member that holds a label
_LONGEST_LABEL = 32  # bytes


@dataclass(frozen=True)
class HowToEncode:
    """What the options of the command say of a set."""

    size: int | None
    flip: bool
    per_shard: int
    store: str
    batch_size: int
    max_memory: int | None
    workers: int
    strict: bool
    max_pixels: int

    def check_of_one_file(self) -> None:
        """Refuse what only a set has."""
        for option, given in (
            ("--size", self.size is not None),
            ("--flip", self.flip),
            ("--store", self.store != "auto"),
        ):
            if given:
                raise InputError(f"{option}: of a data set, whose --out is a folder; got a file called *{LATENTS}")


def encode_set(
    given: Sequence[Path],
    checkpoint: Named,
    out: Path,
    how: HowToEncode,
    keep_size: bool,
    dtype: str,
    precision: str | None,
    device: str,
    force: bool,
) -> None:
    """Write the latents of all pictures to a folder; goes on with what is there if it is of the same."""
    if out.suffix and not out.is_dir():
        raise InputError(f"--out: expected a file called *{LATENTS}, or a folder for a data set, got {out}")
    if keep_size:
        raise InputError(f"--keep-size: the latents of a set have one size; a file called *{LATENTS} takes any")
    if how.store not in ("auto", *DTYPES):
        raise InputError(f"--store: expected auto, {', '.join(DTYPES)}, got {how.store!r}")
    check_folder(out)
    with joined(choose_device(device), "the same command goes on from there") as (processes, own_device):
        if is_autoencoder(checkpoint.folder):
            tokenizer = _autoencoder(checkpoint, how, dtype, precision, own_device)
        else:
            tokenizer = _uniflow(checkpoint, how, dtype, precision, own_device)
        pictures, labels, classes = _find(given, how)
        stored = tokenizer.dtype if how.store == "auto" else getattr(torch, how.store)
        manifest = Manifest.of(
            tokenizer.maker,
            (tokenizer.side, tokenizer.side),
            stored,
            how.flip,
            how.per_shard,
            (pictures.name(number) for number in range(len(pictures))),
            labels,
            classes,
        )
        if len(set(processes.of_all(manifest.listing))) > 1:
            raise InputError("the processes do not find the same pictures; all must see the same files")
        with held(out) if processes.first else nullcontext():
            processes.from_first(lambda: _begin(out, manifest, force))
            with explained():
                _encode(pictures, labels, tokenizer, out, manifest, how, processes)
                processes.wait()
                if processes.first:
                    count, skipped = finish(out, manifest)
                    say(f"latents of {counted(count)} in {out}, {manifest.shards} shards")
                    if skipped:
                        notice(f"{len(skipped)} of {manifest.pictures} pictures cannot be read: skipped")


@dataclass(frozen=True)
class _Tokenizer:
    """What makes latents of a set's pictures.

    Attributes:
        maker: see `Maker`.
        side: of the pictures, in pixels.
        dtype, device: in which, and where.
        most: pictures at a time.
        prepared: given a number of pictures, what encodes so many or fewer, [n, 3, S, S] to [n, N, C].
    """

    maker: Maker
    side: int
    dtype: torch.dtype
    device: torch.device
    most: int
    prepared: Callable[[int], Callable[[Tensor], Tensor]]


def _uniflow(
    checkpoint: Named, how: HowToEncode, dtype: str, precision: str | None, device: torch.device
) -> _Tokenizer:
    model = load_model(checkpoint, str(device), dtype, precision)
    side = model.config.image_size if how.size is None else how.size
    if side % model.config.patch_size:
        raise InputError(f"--size: expected a multiple of the patch ({model.config.patch_size}), got {side}")
    most = most_encoded(model, (side, side), how.max_memory)

    def prepared(batch: int) -> Callable[[Tensor], Tensor]:
        return model.compile_encoder(batch, (side, side))

    return _Tokenizer(Maker.of(model), side, model.dtype, model.device, most, prepared)


def _autoencoder(
    checkpoint: Named, how: HowToEncode, dtype: str, precision: str | None, device: torch.device
) -> _Tokenizer:
    """One of diffusers, which is read in float32."""
    for option, given in (
        ("--weights", checkpoint.weights),
        ("--precision", precision),
        ("--max-memory", how.max_memory),
    ):
        if given is not None:
            raise InputError(f"{option}: of a UniFlow, {checkpoint.folder} holds an autoencoder of diffusers")
    chosen = choose_dtype(dtype) or torch.float32
    with explained():
        size = None if how.size is None else (how.size, how.size)
        tokenizer = read_image_tokenizer(checkpoint.folder, size)
    tokenizer.to(device, chosen)
    own = next(tokenizer.parameters())
    side = tokenizer.image_size[0]
    return _Tokenizer(tokenizer.maker(), side, own.dtype, own.device, sys.maxsize, lambda _: tokenizer.encode)


def _find(given: Sequence[Path], how: HowToEncode) -> tuple[Pictures, np.ndarray | None, list[str] | None]:
    """The pictures, their labels if they have any, and what these are called."""
    tars = [path for path in given if path.suffix == ".tar"]
    if tars and len(tars) != len(given):
        raise InputError("PICTURES: expected either tar files or folders and files of pictures, got both")
    if tars:
        with explained():
            shards = [shard for path in tars for shard in ([path] if path.is_file() else find_shards(str(path)))]
            pictures = PictureShards(shards, picture_suffixes(), (_CLASS,), largest=how.max_pixels)
        return pictures, *_labels_of_members(pictures)
    files: list[tuple[str, Path]] = []
    for path in given:
        if path.is_dir():
            files += [(file.relative_to(path).as_posix(), file) for file in picture_files(path, how.strict)]
        elif path.exists():
            files.append((path.name, path))
        else:
            raise InputError(f"no such file or folder: {path}")
    named = dict(files)
    if len(named) < len(files):
        raise InputError("PICTURES: two pictures of different folders have one name; give the folder above them")
    return PictureList(named, largest=how.max_pixels), *labels_of_folders(list(named))


def _labels_of_members(pictures: PictureShards) -> tuple[np.ndarray | None, list[str] | None]:
    """What the members beside the pictures say, if all have one; these classes have no names."""
    labels = np.empty(len(pictures), np.int64)
    for number in range(len(pictures)):
        found = pictures.beside(number, _CLASS, _LONGEST_LABEL)
        if found is None:
            if number:
                raise InputError(f"{pictures.name(number)} has no label ({_CLASS}), as others have")
            return None, None
        name, text = found
        if not text.strip().isdigit():
            raise InputError(f"{name}: expected a label, a number from 0, got {text[:20]!r}")
        labels[number] = int(text)
    return labels, []


def _begin(out: Path, manifest: Manifest, force: bool) -> None:
    """Make sure that what is there is of this set, and take away what a process that was killed has left."""
    for path in rests(out):
        path.unlink()
    if not (out / MANIFEST).exists():
        others = sorted(out.glob("latents-*.safetensors"))
        if others and not force:
            raise InputError(f"{others[0]} exists, but no {MANIFEST}; --force deletes it, or take another --out")
    else:
        with explained():
            differing = Manifest.read(out).differences(manifest)
        if not differing and not force:
            return
        if not force:
            raise InputError(
                f"{out} holds latents of another {', '.join(differing)}; --force deletes them, or take another --out"
            )
    for path in (out / STATISTICS, *out.glob("latents-*.safetensors")):
        path.unlink(missing_ok=True)
    manifest.write(out)


@torch.inference_mode()
def _encode(
    pictures: Pictures,
    labels: np.ndarray | None,
    tokenizer: _Tokenizer,
    out: Path,
    manifest: Manifest,
    how: HowToEncode,
    processes: Processes,
) -> None:
    """The shards of this process that are not there yet, one after the other."""
    mine = range(processes.rank, manifest.shards, processes.world)
    missing = [shard for shard in mine if not manifest.path(out, shard).exists()]
    dtype, device = getattr(torch, manifest.dtype), tokenizer.device
    batch_size = min(how.batch_size, tokenizer.most)
    encoder = tokenizer.prepared(batch_size)

    def read(place: tuple[int, int]) -> _Read:
        shard, number = place
        try:
            return _Read(shard, number, to_tensor(center_crop(pictures.open(number), manifest.size[0])))
        except (PictureError, OSError) as error:
            if how.strict:
                raise InputError(str(error)) from None
            notice(f"skipped: {error}")
            return _Read(shard, number, None)

    places = [(shard, number) for shard in missing for number in manifest.numbers(shard)]
    with picture_bar("encoding") as bar, Workers(how.workers) as files:
        task = bar.add_task("", total=len(places))
        for shard, found in groupby(files.read(read, places), key=attrgetter("shard")):
            kept: list[int] = []
            skipped: list[int] = []
            straight = [torch.empty(0, *manifest.latent_shape(), dtype=dtype, device=device)]
            flipped = list(straight)
            while batch := list(islice(found, batch_size)):
                skipped += [each.number for each in batch if each.crop is None]
                crops = {each.number: each.crop for each in batch if each.crop is not None}
                bar.advance(task, len(batch))
                if not crops:
                    continue
                kept += crops
                images = normalize(torch.stack(list(crops.values())).to(device, non_blocking=True))
                straight.append(encoder(images).to(dtype))
                if how.flip:
                    flipped.append(encoder(images.flip(-1)).to(dtype))
            write_shard(
                out,
                manifest,
                shard,
                torch.cat(straight).cpu(),
                torch.cat(flipped).cpu() if how.flip else None,
                None if labels is None else torch.from_numpy(labels[np.array(kept, np.int64)]),
                list(map(pictures.name, kept)),
                list(map(pictures.name, skipped)),
            )


class _Read(NamedTuple):
    """A picture of a shard by its number, as the model takes it, uint8 [3, H, W]; None if it cannot be read."""

    shard: int
    number: int
    crop: Tensor | None
