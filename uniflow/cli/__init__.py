"""The command `uniflow`: errors are one line on stderr and exit status 2, an interrupt is 130."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with `arguments` (those of the process if not given) and exit."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return 130


def _run(arguments: Sequence[str]) -> int:
    try:
        from uniflow.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "PIL", "torchmetrics"):
            raise
        return _fail(f"the command needs {error.name}: pip install 'uniflow-kernels[cli]'")
    from uniflow.checkpoint import NotFiniteWarning
    from uniflow.cli.inputs import InputError
    from uniflow.pictures import PictureError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", NotFiniteWarning)  # nothing can be made of such weights
            # without standalone mode errors come as exceptions, and an exit status as the result
            return app(args=list(arguments), prog_name="uniflow", standalone_mode=False) or 0
    except (InputError, PictureError, FloatingPointError, NotFiniteWarning) as error:
        return _fail(str(error))
    except BrokenPipeError:  # whoever read the output has seen enough
        return 1
    except OSError as error:
        return _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error))
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
    if type(error).__name__ in ("ProcessLostError", "CaptionError"):  # whose modules take long to import
        return str(error)
    if isinstance(error, ImportError) and "pip install" in str(error):  # names the extra that is missing
        return str(error)
    return None


def _fail(message: str) -> int:
    print(f"uniflow: {' '.join(message.split())}", file=sys.stderr)
    return 2
