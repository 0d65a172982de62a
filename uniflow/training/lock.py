"""One run at a time in a folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = ".running"


class FolderInUseError(OSError):
    """Another process holds the folder."""


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a folder for this process; it is made if need be, and taken away again if nothing was written to it.

    The lock is the process's own (fcntl.lockf): it is gone when the process is, however it ended, and workers that were
    forked neither have it nor keep it. Gives whether there is one: some network file systems have none.

    Raises:
        FolderInUseError: naming the host and the process that hold it.
        OSError: if the folder cannot be written to.
    """
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    path = folder / LOCK
    descriptor, locked = _open_locked(path)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield locked
    finally:
        path.unlink(missing_ok=True)  # while nobody else can have locked it
        os.close(descriptor)
        with suppress(OSError):  # something was written
            for part in missing:
                part.rmdir()


def _open_locked(path: Path) -> tuple[int, bool]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # another run has just taken its folder away
            continue
        try:
            locked = _lock(descriptor, path.parent)
            if _is_at(descriptor, path):  # and not of a run that has just ended
                return descriptor, locked
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return False
        holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
        raise FolderInUseError(f"{folder} is in use by {holder}; wait for it, or choose another folder") from None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
