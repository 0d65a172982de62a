"""Files that are either whole or not there: written beside or below their place, then renamed into it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_unfinished: set[Path] = set()
_lock = threading.Lock()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; it becomes `path` if the block ends well, and is deleted if not.

    The temporary name keeps the suffix, so that writers which look at it (Pillow, matplotlib) choose the same format.
    The file's mode is the umask's, whatever the writer made of it (safetensors: readable by its owner alone).
    """
    path = Path(path)
    # a name may have 255 bytes
    temporary = path.with_name(f".{path.stem[:40]}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")
    with _lock:
        _unfinished.add(temporary)
    try:
        mode = _made(temporary, path)
        try:
            yield temporary
            temporary.chmod(mode)
            os.replace(temporary, path)
        except OSError as error:
            if error.errno is not None and error.filename in (None, str(temporary)):
                raise OSError(error.errno, error.strerror, str(path)) from None  # which file it was about
            raise
        finally:
            temporary.unlink(missing_ok=True)
    finally:
        _unfinished.discard(temporary)


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write values to `path`, indented as people read it, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def replacing_files(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder inside `folder`, which is there; its files become that one's if the block ends well.

    For writers that take a folder and choose the names of their files. config.json comes last, by which readers know
    what the rest is. If the block does not end well all of it is deleted.
    """
    folder = Path(folder)
    temporary = folder / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    with _lock:
        _unfinished.add(temporary)
    try:
        temporary.mkdir()
        yield temporary
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
            with replacing(folder / path.name) as place:  # for the umask's mode
                os.replace(path, place)
    finally:
        _delete(temporary)
        _unfinished.discard(temporary)


def _delete(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)


def _made(temporary: Path, path: Path) -> int:
    """Make the empty file, and say which mode it has: only so the umask is learned without a change of it."""
    try:
        with temporary.open("xb") as file:
            return os.fstat(file.fileno()).st_mode & 0o777
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def discard_unfinished() -> None:
    """Delete what is being written, in any thread, and let nothing new be begun: the process is about to end."""
    _lock.acquire()
    for temporary in list(_unfinished):
        _delete(temporary)
