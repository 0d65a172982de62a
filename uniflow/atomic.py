"""Files that are either whole or not there: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; it becomes `path` if the block ends well, and is deleted if not.

    The temporary name keeps the suffix, so that writers which look at it (Pillow, matplotlib) choose the same format.
    The file's mode is the umask's, whatever the writer made of it (safetensors: readable by its owner alone).
    """
    path = Path(path)
    # a name may have 255 bytes
    temporary = path.with_name(f".{path.stem[:40]}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        with temporary.open("xb") as file:  # the system applies the umask, which only the whole process could ask for
            mode = os.fstat(file.fileno()).st_mode & 0o777
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
