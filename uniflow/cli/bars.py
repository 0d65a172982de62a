"""The progress bar over pictures, on stderr so that stdout holds results alone."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress(*columns: ProgressColumn, transient: bool = False) -> Progress:
    """A bar on stderr. What is printed meanwhile stands above it, unless it does not go to the terminal at all."""
    shared = sys.stdout is not None and sys.stdout.isatty()
    return Progress(*columns, console=Console(stderr=True, soft_wrap=True), transient=transient, redirect_stdout=shared)


def picture_bar(description: str, transient: bool = False) -> Progress:
    """A bar that counts pictures; for `with` and `track`."""
    return progress(
        TextColumn(description),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        transient=transient,
    )
