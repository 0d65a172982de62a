"""Members of tar files, read where they stand: Python's tarfile finds them once, after that each is one read.

USTAR, GNU and PAX headers alike, with names of any length and script. Nothing stays open, so processes may fork, and a
file that was replaced is noticed.
"""

from __future__ import annotations

import io
import os
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from uniflow.pictures import PictureError
from uniflow.reading import check_file, shown

_KEPT = 64  # indexes in a process: two streams, each between two groups of 16 shards
_LARGEST_HEADER = 1 << 20  # bytes of a long name or a PAX header
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_CHANGED = "has changed since its members were looked for"


class State(NamedTuple):
    """What is another one where a file was written again."""

    size: int
    changed: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> State:
        """That of an open file, or of a path."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class Members:
    """The files in a tar file, in its order.

    Raises:
        FileNotFoundError: if there is no such file.
        PictureError: if it is no tar file, compressed, damaged or cut short, or two members have one name.
    """

    def __init__(self, path: Path, state: State) -> None:
        self.path, self.state = path, state
        found = _headers(path)
        self.names = [name for name, *_ in found]
        self._places = np.array([place for _, *place in found], dtype=np.int64).reshape(-1, 2)
        self._numbers = {name: number for number, name in enumerate(self.names)}
        if len(self._numbers) < len(self.names):
            twice = next(name for number, name in enumerate(self.names) if self._numbers[name] != number)
            raise PictureError(f"{path}: two members are called {shown(twice)}")

    def find(self, name: str) -> int | None:
        """The number of the member of this name; None if there is none."""
        return self._numbers.get(name)

    def read(self, number: int) -> bytes:
        """What a member holds.

        Raises:
            PictureError: if the tar file is another one by now.
        """
        start, size = self._places[number].tolist()
        with self.path.open("rb", buffering=0) as file:
            if State.of(os.fstat(file.fileno())) != self.state:
                raise PictureError(f"{self.path} {_CHANGED}")
            file.seek(start)
            data = file.read(size)
        if len(data) != size:
            raise PictureError(f"{self.path}:{self.names[number]}: {len(data)} of {size} bytes could be read")
        return data


def members_of(path: Path, state: State | None = None) -> Members:
    """The members of a tar file, looked for again if the file is another one than when they were.

    Raises:
        PictureError: as `Members`; or if the file is in another state than the one that is given.
    """
    try:
        check_file(path)
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise PictureError(str(error)) from None
    now = State.of(path.stat())
    if state not in (None, now):
        raise PictureError(f"{path} {_CHANGED}")
    return _members(path, now)


_members = lru_cache(_KEPT)(Members)


class _Headers(io.BufferedReader):
    """A file of which only headers are read: one that says it is longer than any is would take the machine's memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _headers(path: Path) -> list[tuple[str, int, int]]:
    """Name, first byte and size of all regular files in a tar file."""
    found: list[tuple[str, int, int]] = []
    with path.open("rb", buffering=0) as raw:
        file = _Headers(raw)
        start = file.read(8)
        for magic, name in _COMPRESSED.items():
            if start.startswith(magic):
                raise PictureError(
                    f"{path} is compressed ({name}), so its members cannot be read one by one: unpack it"
                )
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                before = -1
                while (member := tar.next()) is not None:
                    if member.size < 0 or tar.offset <= before:
                        raise tarfile.ReadError(f"{shown(member.name)} has a size of {member.size} bytes")
                    before = tar.offset
                    tar.members.clear()  # type: ignore[attr-defined] # it would keep them all
                    if member.issparse():
                        raise tarfile.ReadError(f"{shown(member.name)} is sparse")
                    if member.isreg():
                        found.append((member.name, member.offset_data, member.size))
                _check_end(file, tar.offset)
        except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise PictureError(f"{path} is no tar file or is damaged: {error}") from None
    return found


def _check_end(file: BinaryIO, offset: int) -> None:
    """A tar file ends with a block of zeros; tarfile takes anything else that is no header for its end, too."""
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it is cut short, or no header stands at byte {offset}")
