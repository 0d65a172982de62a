"""What the commands are given, checked before anything is written: checkpoints, devices, pictures, outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from uniflow.model import UniFlow
from uniflow.pictures import FORMATS, PictureError, open_picture

M = TypeVar("M")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LONGEST_MESSAGE = 600


class InputError(Exception):
    """Bad input; the message is the one line that the user sees."""


@contextmanager
def explained() -> Iterator[None]:
    """Turn the errors that a library raises for bad values into the line that the user sees."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        path = getattr(error, "filename", None)
        message = f"no such file: {path}" if path else str(error)
        if len(message) > _LONGEST_MESSAGE:  # a checkpoint of another model may name hundreds of keys
            message = message[:_LONGEST_MESSAGE] + " ..."
        raise InputError(message) from None


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device: {name} is not available here; torch sees no GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device: {name} is not available here; there are {torch.cuda.device_count()} GPUs")
    return device


def _choose_dtype(name: str) -> torch.dtype | None:
    """The dtype called `name`; None for "auto", that of the file."""
    if name != "auto" and name not in DTYPES:
        raise InputError(f"--dtype: expected auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES.get(name)


def load_model(checkpoint: Path, device: str, dtype: str) -> UniFlow:
    """Read a UniFlow; the dtype "auto" is that of the file."""
    return load_checkpoint(UniFlow.from_pretrained, checkpoint, device, dtype)


def load_checkpoint(
    read: Callable[[Path, torch.device, torch.dtype | None], M], checkpoint: Path, device: str, dtype: str
) -> M:
    """Read a model of any kind by its `from_pretrained`; the dtype "auto" is that of the file."""
    own = _choose_dtype(dtype)
    chosen = choose_device(device)
    if not checkpoint.is_dir():
        raise InputError(f"no such checkpoint folder: {checkpoint}")
    with explained():
        return read(checkpoint, chosen, own)


def parse_memory(text: str | None) -> int | None:
    """Bytes of "2GB", "500 MB" or "1.5e9"; None for None."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    try:
        number = float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ") if found else 0.0
    except ValueError:
        number = 0.0
    if number < 1:
        raise InputError(f"--max-memory: expected a number of bytes as in 2GB or 500MB, got {text!r}")
    return int(number)


@dataclass(frozen=True)
class Source:
    """A picture to read and the name, relative to the output folder, to write its reconstruction to."""

    path: Path
    name: str


def find_pictures(paths: Sequence[Path]) -> list[Source]:
    """The picture files given, and those in the folders given, at any depth, sorted; all of them are read once.

    Raises:
        InputError: for a path that is not there, a folder without pictures, a damaged picture.
    """
    sources: list[Source] = []
    taken: set[str] = set()
    for path in paths:
        if path.is_dir():
            found = [(file, file.relative_to(path)) for file in picture_files(path)]
        elif path.is_file():
            found = [(path, Path(path.name))]
        else:
            raise InputError(f"no such file or folder: {path}")
        for file, relative in found:
            sources.append(Source(file, _free_name(relative, taken)))
    # a damaged picture among many is found now, not after hours and half of the output
    for source in sources:
        read_picture(source.path)
    return sources


def picture_files(folder: Path) -> list[Path]:
    """All files below `folder` whose suffix is one of a picture, sorted; hidden ones are left out.

    Raises:
        InputError: if there are none.
    """
    suffixes = picture_suffixes()
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in suffixes and file.is_file() and not file.name.startswith(".")
    ]
    if not files:
        raise InputError(f"no pictures in {folder}")
    return files


def picture_suffixes() -> tuple[str, ...]:
    """Suffixes (".jpg", ...) of the kinds that are read."""
    return tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)


def read_picture(path: Path) -> Image.Image:
    """`open_picture`, with the line that the user sees for what is no picture."""
    try:
        return open_picture(path)
    except PictureError as error:
        raise InputError(str(error)) from None


def check_outputs(paths: Sequence[Path], force: bool) -> None:
    """Refuse to overwrite what is there, unless told to."""
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path} is a folder, expected a file to write")
        if path.exists() and not force:
            raise InputError(f"{path} exists; --force overwrites it")


def check_folder(path: Path) -> None:
    """Refuse an output folder whose name is taken by a file."""
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise InputError(f"{part} is a file, expected a folder to write to")


def _free_name(relative: Path, taken: set[str]) -> str:
    # pictures of different folders or formats may share a name: a.jpg, a.png -> a.png, a-2.png
    stem, count = relative.with_suffix(""), 1
    name = f"{stem}.png"
    while name in taken:
        count += 1
        name = f"{stem}-{count}.png"
    taken.add(name)
    return name
