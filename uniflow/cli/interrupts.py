"""Ctrl-C answered soon: Python hears it only between calls, and a call of torch may take minutes."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from uniflow.atomic import discard_unfinished

INTERRUPTED = 130  # exit status
_PATIENCE = 1.5  # seconds that the command has to end by itself
_OVER = b"\0"


@contextmanager
def answered() -> Iterator[None]:
    """End the process if it has not ended by itself soon after an interrupt; for the main thread.

    What is being written then is deleted, and what is written stays.
    """
    signals, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(signals,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writer, _OVER)
        os.close(writer)


def _watch(signals: int) -> None:
    deadline: float | None = None
    while deadline is None or deadline > time.monotonic():
        left = None if deadline is None else deadline - time.monotonic()
        heard = os.read(signals, 64) if select.select([signals], [], [], left)[0] else b""
        if _OVER in heard:
            os.close(signals)
            return
        if signal.SIGINT in heard and deadline is None:  # the main thread hears it too, unless it is inside a call
            deadline = time.monotonic() + _PATIENCE
    discard_unfinished()
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # a progress bar hides the cursor
    os._exit(INTERRUPTED)
