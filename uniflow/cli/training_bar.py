"""What training shows: a bar, apart from the others since it imports what training needs, and what it skips."""

from __future__ import annotations

from rich.progress import BarColumn, TextColumn

from uniflow.cli.bars import progress
from uniflow.cli.printing import notice
from uniflow.training.logs import Log, Report

_NAMED = 20  # pictures


class TrainingBar(Log):
    """A bar with the share of the stage's budget spent, loss, images/s and time left; a context manager."""

    def __init__(self) -> None:
        self._progress = progress(
            TextColumn("training"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[state]}", markup=False),
        )
        self._task = self._progress.add_task("training", total=1.0, state="")

    def __enter__(self) -> TrainingBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._progress.tasks[0].fields["state"]:  # nothing was left to train
            self._progress.live.transient = True
        self._progress.stop()

    def report(self, report: Report) -> None:
        """Show where the run is."""
        minutes, seconds = divmod(round(report.seconds_left), 60)
        state = (
            f"step {report.step}  loss {report.loss:z.3f}  {report.images_per_second:.0f} images/s  "
            f"{minutes}:{seconds:02} left"
        )
        if report.skipped:
            state += f"  {report.skipped} skipped"
        self._progress.update(self._task, completed=report.spent, state=state)


class SkippedPictures(Log):
    """Names on stderr the pictures that this process could not read, each once and no more than a few."""

    def __init__(self) -> None:
        self._named: set[str] = set()

    def skipped(self, step: int, names: list[str]) -> None:
        """Say which are new."""
        for name in names:
            if name in self._named or len(self._named) > _NAMED:
                continue
            self._named.add(name)
            more = len(self._named) > _NAMED
            what = "more pictures; the log names them" if more else name
            notice(f"skips {what} (step {step}), which cannot be read")
