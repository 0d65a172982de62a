"""Members of tar files, read where they stand: Python's tarfile finds them once, after that each is one read.

USTAR, GNU and PAX headers alike, with names of any length and script. Members are read at their place whatever the
file's position is, so processes may fork; a file that was written again is noticed.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from uniflow.pictures import PictureError, TooLargeError
from uniflow.reading import check_file, shown

_OPEN = 64  # files in a process: two streams, each between two groups of 16 shards
_LARGEST_HEADERS = 1 << 20  # bytes of what stands before one member
_LARGEST_MEMBER = 1 << 30  # bytes
_LARGEST_REST = 1 << 22  # bytes of zeros behind the end
_MOST_GLOBAL = 100  # records of PAX that hold for all members; each member is compared with all of them
_NUMBER = re.compile(
    rb"[0-9]{256}"
)  # longer than a file's name may be; tarfile of Python 3.11.7 takes its square in time
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class State(NamedTuple):
    """What is another one where a file was written again."""

    size: int
    changed: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> State:
        """That of an open file, or of a path."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


class Members(NamedTuple):
    """The files in a tar file, in its order: their names, where they stand (int64 [N, 2], first byte and size)."""

    names: list[str]
    places: np.ndarray
    state: State


def find_members(path: Path) -> Members:
    """Look for all files in a tar file, which takes some 25 us for each.

    Raises:
        FileNotFoundError: if there is no such file.
        PictureError: if it is no tar file, compressed, damaged or cut short, goes on behind its end, two members have
            one name, or one is neither file nor folder.
    """
    try:
        check_file(path)
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise PictureError(str(error)) from None
    with path.open("rb", buffering=0) as raw:
        state = State.of(os.fstat(raw.fileno()))
        try:
            found = _headers(_Headers(raw))
        except _CompressedError as error:
            raise PictureError(
                f"{path} is compressed ({error}), so its members cannot be read one by one: unpack it"
            ) from None
        except Exception as error:  # tarfile may end in any on a damaged file
            raise PictureError(f"{path} is no tar file or is damaged: {str(error) or type(error).__name__}") from None
    names = [name for name, *_ in found]
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise PictureError(f"{path}: two members are called {shown(name)}")
        seen.add(name)
    return Members(names, np.array([place for _, *place in found], dtype=np.int64).reshape(-1, 2), state)


def read_member(path: Path, state: State, place: np.ndarray, most: int | None = None) -> bytes:
    """What stands at a place of `Members`, or the first `most` bytes of it.

    Raises:
        FileNotFoundError: if the file is gone.
        TooLargeError: if it has more than 1 GiB.
        PictureError: if the file is another one by now.
    """
    if State.of(path.stat()) != state:
        raise _changed(path)
    start, size = place.tolist()
    size = size if most is None else min(size, most)
    if size > _LARGEST_MEMBER:
        raise TooLargeError(f"{path}: a member of {size} bytes is too large, at most {_LARGEST_MEMBER} are read")
    file, parts = _opened(path, state), []
    while size > 0 and (part := os.pread(file.fileno(), size, start)):
        parts.append(part)
        start, size = start + len(part), size - len(part)
    if size > 0:
        raise _changed(path)
    return b"".join(parts)


@lru_cache(_OPEN)
def _opened(path: Path, state: State) -> BinaryIO:
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)  # a pipe would be waited for
    if State.of(os.fstat(file.fileno())) != state:
        raise _changed(path)
    return file


def _changed(path: Path) -> PictureError:
    return PictureError(f"{path} has changed since its members were looked for")


class _CompressedError(Exception):
    """Names how."""


class _Headers(io.BufferedReader):
    """A file of which only headers are read, no more at a time than one member may have.

    A header may say that it is as long as the machine's memory, or stand in a chain of such.
    """

    left = tarfile.BLOCKSIZE  # bytes that may be read

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= self.left:
            raise tarfile.ReadError(f"a member has headers of more than {_LARGEST_HEADERS} bytes")
        self.left -= size
        data = super().read(size)
        if _NUMBER.search(data):
            raise tarfile.ReadError("a header holds a number of more than 256 digits")
        return data


def _headers(file: _Headers) -> list[tuple[str, int, int]]:
    """Name, first byte and size of all regular files in a tar file."""
    start = file.read(8)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise _CompressedError(name)
    file.seek(0)
    found: list[tuple[str, int, int]] = []
    file.left, before = _LARGEST_HEADERS, -1
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        while (member := tar.next()) is not None:
            if member.size < 0 or tar.offset <= before:
                raise tarfile.ReadError(f"{shown(member.name)} has a size of {member.size} bytes")
            if len(tar.pax_headers) > _MOST_GLOBAL:
                raise tarfile.ReadError(f"it has more than {_MOST_GLOBAL} global PAX records")
            if member.issparse() or not (member.isreg() or member.isdir()):
                raise tarfile.ReadError(f"{shown(member.name)} is a link or device, or sparse; expected plain files")
            if member.isreg():
                found.append((member.name, member.offset_data, member.size))
            tar.members.clear()  # type: ignore[attr-defined] # it would keep them all
            file.left, before = _LARGEST_HEADERS, tar.offset
        _check_end(file, tar.offset)
    return found


def _check_end(file: _Headers, offset: int) -> None:
    """A tar file ends with zeros; tarfile takes a lone block of them, and all else that is no header, for its end."""
    file.left = _LARGEST_REST + 1
    file.seek(offset)
    rest = file.read(file.left)
    if rest[: tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it is cut short, or no header stands at byte {offset}")
    if rest.strip(b"\0") or len(rest) > _LARGEST_REST:
        raise tarfile.ReadError(f"it goes on behind its end at byte {offset}, as two tar files in one would")
