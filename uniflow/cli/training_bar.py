"""The progress bar of training, apart from the others since it imports what training needs."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from uniflow.training.logs import Log, Report


class TrainingBar(Log):
    """A bar with the share of the stage's budget spent, loss, images/s and time left; a context manager."""

    def __init__(self) -> None:
        columns = (
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[state]}"),
        )
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("training", total=1.0, state="")

    def __enter__(self) -> TrainingBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def report(self, report: Report) -> None:
        """Show where the run is."""
        minutes, seconds = divmod(round(report.seconds_left), 60)
        state = (
            f"step {report.step}  loss {report.loss:.3f}  {report.images_per_second:.0f} images/s  "
            f"{minutes}:{seconds:02} left"
        )
        self._progress.update(self._task, completed=report.spent, state=state)
