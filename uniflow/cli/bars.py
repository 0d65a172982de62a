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


class _Bars(Progress):
    """Where there is no terminal, a line at the end for what was counted, without the empty ones that rich adds."""

    def stop(self) -> None:
        """End the display."""
        if self.console.is_interactive:
            super().stop()
            return
        self.live.transient = self.live.transient or not self.tasks
        self.live.stop()
        if not self.live.transient:
            self.console.print()  # ends the line


def progress(*columns: ProgressColumn, transient: bool = False, shown: bool = True) -> Progress:
    """A bar on stderr. What is printed meanwhile stands above it, unless it does not go to the terminal at all."""
    shared = sys.stdout is not None and sys.stdout.isatty()
    console = Console(stderr=True, soft_wrap=True, quiet=not shown)
    return _Bars(*columns, console=console, transient=transient, redirect_stdout=shared and shown)


def picture_bar(description: str, transient: bool = False, shown: bool = True) -> Progress:
    """A bar that counts pictures; for `with` and `track`. One process of several shows it."""
    return progress(
        TextColumn(description),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("gone,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        transient=transient,
        shown=shown,
    )
