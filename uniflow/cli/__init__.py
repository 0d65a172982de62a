"""The command `uniflow`: errors are one line on stderr and exit status 2, an interrupt is 130."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress

from uniflow.cli.interrupts import INTERRUPTED, answered
from uniflow.cli.printing import explain_os_error, notice, warnings_as_notices


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with `arguments` (those of the process if not given) and exit."""
    with answered():
        status = run(sys.argv[1:] if arguments is None else arguments)
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    if "" in arguments:  # a path would be that of the working folder
        return _fail("one of the arguments is empty, as of a variable that is not set")
    try:
        with warnings_as_notices():
            return _run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(arguments: Sequence[str]) -> int:
    try:
        from uniflow.checkpoint import NotFiniteWarning
        from uniflow.cli.app import app
        from uniflow.cli.inputs import InputError
        from uniflow.pictures import PictureError
    except ModuleNotFoundError as error:
        if (message := explain(error)) is None:
            raise
        return _fail(message)
    warnings.simplefilter("error", NotFiniteWarning)  # nothing can be made of such weights
    try:
        # without standalone mode errors come as exceptions, and an exit status as the result
        status = app(args=list(arguments), prog_name="uniflow", standalone_mode=False) or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # help, too, may go where there is no room
        return status
    except (InputError, PictureError, FloatingPointError, NotFiniteWarning) as error:
        return _fail(str(error))
    except (BrokenPipeError, SystemExit):  # whoever read the output has seen enough; Typer makes the latter of it
        _stop_output()
        return 1
    except OSError as error:
        if sys.stdout is not None:
            _stop_output()
        return _fail(explain_os_error(error))
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        return _fail(message)


def explain(error: Exception) -> str | None:
    """The line for an error that is no defect but says what the user can do; None for others."""
    if hasattr(error, "format_message"):  # Typer's usage errors; where their class lives depends on its version
        return error.format_message()
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU's memory does not hold this; use a smaller --batch-size, or micro_batch_size in training"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):  # the latter is how torch says it
        return "this machine's memory does not hold this; use smaller pictures, a smaller --batch-size or --max-memory"
    missing = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else None
    if missing in ("typer", "rich", "PIL", "torchmetrics"):
        return f"the command needs {missing}: pip install 'uniflow-kernels[cli]'"
    # the modules of these classes take long to import
    known = type(error).__name__ in ("ProcessLostError", "CaptionError")
    names_an_extra = isinstance(error, ImportError) and "pip install" in str(error)
    return str(error) if known or names_an_extra else None


def _fail(message: str) -> int:
    if message:  # Typer's error for no arguments at all has none, since the help was shown
        notice(message)
    return 2


def _stop_output() -> None:
    """Keep Python from trying again, when it ends, to write what could not be written."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # there is no room, or nobody who reads it
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
