"""The files that a command reads and writes, looked at before the work: pictures, and where its results go."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from uniflow.cli.bars import picture_bar
from uniflow.cli.inputs import InputError
from uniflow.cli.printing import explain_os_error, notice
from uniflow.cli.workers import Workers
from uniflow.pictures import FORMATS, PictureError, TooLargeError, open_picture

T = TypeVar("T")

_LONGEST_NAME = 255  # bytes


# --- pictures ---


@dataclass(frozen=True)
class Given:
    """Files and folders that the user names; whether a bad file of a folder ends it all; how many pixels may be."""

    paths: Sequence[Path]
    strict: bool
    max_pixels: int


@dataclass(frozen=True)
class Source:
    """A picture to read.

    Attributes:
        path: of the file.
        name: relative to the output folder, to write its reconstruction to.
        by_hand: whether the user named it, and not a folder that it is in.
        place: its place among all that were given.
    """

    path: Path
    name: str
    by_hand: bool
    place: int


class Pictures:
    """The pictures in what was given, at any depth, and reading them.

    One in a folder that cannot be read is skipped, named and counted, unless the user is strict.

    Raises:
        InputError: for a path that is not there, a folder without pictures, names that cannot be written.
    """

    def __init__(self, given: Given) -> None:
        found: list[tuple[Path, Path, bool]] = []
        for path in given.paths:
            if path.is_dir():
                found += [(file, file.relative_to(path), False) for file in picture_files(path, given.strict)]
            elif path.exists():
                found.append((path, Path(path.name), True))
            else:
                raise InputError(f"no such file or folder: {path}")
        names = _free_names([relative for _, relative, _ in found])
        self.given = given
        self.sources = [
            Source(file, name, by_hand, place)
            for place, ((file, _, by_hand), name) in enumerate(zip(found, names, strict=True))
        ]
        self.skipped = 0
        self._all = len(self.sources)  # a share has fewer

    def share(self, block: int, rank: int, world: int) -> Pictures:
        """Those of every block of so many neighbours that falls to process `rank` of `world`."""
        return self._some(lambda place: place // block % world == rank)

    def within(self, places: range) -> Pictures:
        """Those at some places among all that were given."""
        return self._some(lambda place: place in places)

    def _some(self, chosen: Callable[[int], bool]) -> Pictures:
        some = copy(self)
        some.sources = [source for source in self.sources if chosen(source.place)]
        return some

    def read(self, fit: Callable[[Image.Image], T], files: Workers) -> Iterator[tuple[Source, tuple[int, int], T]]:
        """Each with its own width and height and what `fit` makes of it.

        Raises:
            InputError: if one that must be read cannot, or none can.
        """

        def read(source: Source) -> tuple[Source, tuple[int, int], T] | InputError:
            try:
                picture = read_picture(source.path, self.given.max_pixels)
            except InputError as error:
                if self._must_be_read(source):
                    raise
                return error
            return source, picture.size, fit(picture)

        for result in files.read(read, self.sources):
            if isinstance(result, InputError):
                self.skipped += 1
                notice(f"skipped: {result}")
                if self.skipped == self._all:
                    raise InputError(f"none of {self.skipped} pictures can be read")
            else:
                yield result

    def check(self, files: Workers) -> None:
        """Read those once that must be read: what is wrong is found now, not after hours and half of the output."""
        needed = [source for source in self.sources if self._must_be_read(source)]
        if not needed:
            return
        with picture_bar("checking", transient=True) as bar:
            for _ in bar.track(files.read(self._check, needed), total=len(needed)):
                pass

    @property
    def total(self) -> int:
        """How many there are, as far as is known."""
        return len(self.sources) - self.skipped

    def say_skipped(self) -> None:
        """How many, if any."""
        if self.skipped:
            notice(f"{self.skipped} of {len(self.sources)} pictures cannot be read: skipped")

    def _must_be_read(self, source: Source) -> bool:
        return self.given.strict or source.by_hand

    def _check(self, source: Source) -> None:
        read_picture(source.path, self.given.max_pixels)


@contextmanager
def find_pictures(given: Given, files: Workers) -> Iterator[Pictures]:
    """The pictures in what was given, those that must be readable read once.

    Inside the block Pillow has no limit of its own for a picture's pixels, only the user's holds.

    Raises:
        InputError: as `Pictures`; for a picture that must be read and cannot.
    """
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        pictures = Pictures(given)
        pictures.check(files)
        yield pictures
    finally:
        Image.MAX_IMAGE_PIXELS = before


def read_picture(path: Path, max_pixels: int | None = None) -> Image.Image:
    """`open_picture`, with the line that the user sees for what cannot be read."""
    try:
        return open_picture(path, largest=max_pixels)
    except TooLargeError as error:
        raise InputError(f"{error}" + ("" if max_pixels is None else "; --max-pixels may allow more")) from None
    except PictureError as error:
        raise InputError(str(error)) from None
    except OSError as error:
        raise InputError(explain_os_error(error)) from None


def check_pictures_folder(path: Path) -> None:
    """Refuse what is no folder."""
    if not path.is_dir():
        found = f"{path} is a file, expected a folder of pictures"
        raise InputError(found if path.exists() else f"no such folder: {path}")


def picture_files(folder: Path, strict: bool = False) -> list[Path]:
    """All files below `folder` whose suffix is one of a picture, sorted; hidden ones are left out.

    A folder below it that cannot be read is named; if it is the folder itself or the user is strict, it is an error.

    Raises:
        InputError: for such a folder, or if there are no pictures.
    """

    def unreadable(error: OSError) -> None:
        message = f"cannot read the folder {error.filename}: {error.strerror}"
        if strict or Path(error.filename) == folder:
            raise InputError(message)
        notice(f"skipped: {message}")

    suffixes = picture_suffixes()
    files = [
        Path(above, name)
        for above, _, names in os.walk(folder, onerror=unreadable)
        for name in names
        if name.lower().endswith(suffixes) and not name.startswith(".")
    ]
    if not files:
        raise InputError(f"no pictures in {folder}")
    return sorted(files)


def labels_of_folders(names: Sequence[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """The uppermost folder of each name, int64 [N] into what these are called, if all are in one."""
    folders = [name.partition("/")[0] if "/" in name else "" for name in names]
    if "" in folders:
        return None, None
    classes = sorted(set(folders))
    places = {name: place for place, name in enumerate(classes)}
    return np.array([places[folder] for folder in folders], np.int64), classes


def picture_suffixes() -> tuple[str, ...]:
    """Suffixes (".jpg", ...) of the kinds that are read."""
    return tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)


def _free_names(files: Sequence[Path]) -> list[str]:
    """What to write for each file, all different: pictures of different folders or formats may share a name.

    a.jpg, a.png -> a.png, a-2.png. No file is called as a folder of another.
    """
    folders = {str(folder) for file in files for folder in file.parents}
    taken: dict[str, None] = {}
    for file in files:
        stem, count = file.with_suffix(""), 1
        name = f"{stem}.png"
        while name in taken or name in folders:
            count += 1
            name = f"{stem}-{count}.png"
        if len(os.fsencode(Path(name).name)) > _LONGEST_NAME:
            raise InputError(f"{file}: its reconstruction would have too long a name, {Path(name).name}")
        taken[name] = None
    return list(taken)


# --- where results go ---


def check_outputs(paths: Sequence[Path], force: bool) -> None:
    """Refuse to overwrite what is there, unless told to, and folders that cannot be written to."""
    for folder in dict.fromkeys(path.parent for path in paths):
        check_folder(folder)
    for path in paths:
        if path.is_dir():
            raise InputError(f"{path} is a folder, expected a file to write")
        if path.exists() and not force:
            raise InputError(f"{path} exists; --force overwrites it")


def check_not_read(paths: Sequence[Path], sources: Sequence[Source]) -> None:
    """Refuse to write over what is read, also if told to overwrite."""
    read = {source.path.resolve() for source in sources}
    for path in paths:
        if path.resolve() in read:
            raise InputError(f"{path} is one of the pictures to read; take another folder to write to")


def check_folder(path: Path) -> None:
    """Refuse an output folder whose name is taken by a file, or that cannot be written to."""
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise InputError(f"{part} is a file, expected a folder to write to")
        if part.is_symlink() and not part.exists():
            raise InputError(f"{part} is a link to nothing, expected a folder to write to")
    there = next(part for part in (path, *path.parents) if part.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()  # whatever it is that forbids it, this meets it
    except OSError as error:
        raise InputError(f"{there} cannot be written to: {error.strerror}") from None
