"""Training as a YAML file describes it: its folder, resuming, logs, signals; what is trained is the caller's."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from uniflow.cli.files import check_folder
from uniflow.cli.inputs import InputError, choose_device, explained
from uniflow.cli.printing import notice, say
from uniflow.cli.training_bar import SkippedPictures, TrainingBar
from uniflow.data import Samples
from uniflow.training import Trainer
from uniflow.training.changes import check_alike, settings_of
from uniflow.training.checkpoints import check, newest_first, newest_whole, rests, step_of
from uniflow.training.lock import held
from uniflow.training.logs import JsonLines, Log, SamplePictures, TensorBoard, WeightsAndBiases
from uniflow.training.processes import Processes, joined
from uniflow.training.recipe import AnyRun, Recipe, read_run
from uniflow.training.state import read_progress, read_settings
from uniflow.training.validation import Validator

R = TypeVar("R", bound=AnyRun)

_MOST_SHARDS = 1_000_000

# what a run leaves in its folder, which may hold other things too
_OF_A_RUN = (
    "checkpoints/step-*",
    "samples/step-*.png",
    "tensorboard/events.out.tfevents.*",
    "wandb/run-*",
    "wandb/offline-run-*",
    "log.jsonl",
    "log-*.jsonl",
    "failure-*",
)


# keys of a run that change nothing about what is trained
_NOT_OF_THE_TRAINING = ("out", "tensorboard", "wandb")


@dataclass(frozen=True)
class Trained:
    """What a run trains, on what, and how it is scored."""

    objective: nn.Module
    samples: Samples
    validator: Validator | None


def train_as_written(
    config: Path,
    kind: type[R],
    build: Callable[[R, torch.device, Processes], Trained],
    out: Path | None,
    resume: str | None,
    device: str,
    force: bool,
) -> None:
    """Train as a file says that describes a `kind` of run; checkpoints, logs and samples go to `out`."""
    check_installed("yaml", "pydantic")
    with explained():
        run = read_run(config, kind)
    out = out or run.out
    if out is None:
        raise InputError(f"{config}: out: expected a folder here or as --out")
    check_folder(out)
    is_utf8 = os.fsencode(out) == str(out).encode(errors="replace")
    if run.tensorboard:
        check_installed("tensorboard")
        if not is_utf8:
            raise InputError(f"{out}: TensorBoard writes to folders whose names are UTF-8; or say tensorboard: false")
    if run.wandb is not None:
        check_installed("wandb", extra="wandb")
        if not is_utf8:
            raise InputError(f"{out}: Weights & Biases takes folders whose names are UTF-8; or leave out wandb")
    chosen = choose_device(device)
    settings = {key: value for key, value in asdict(run).items() if key not in ("recipe", *_NOT_OF_THE_TRAINING)}
    with joined(chosen) as (processes, own_device):
        with explained():
            check_alike(settings_of(run.recipe, {**settings, "out": out}), processes)
        with _alone(out, processes):
            start = processes.from_first(lambda: _start(out, resume, force))
            with explained():
                recipe = run.recipe.on(own_device.type, None if start is None else _recipe_of(start))
                if own_device.type == "cuda" and processes.first and (costs := costs_of(recipe)):
                    notice(f"a GPU would be faster with {costs}")
                trained = build(run, own_device, processes)
                trained.samples[0]  # nothing can be trained on if no picture can be read
                trainer = Trainer(
                    trained.objective,
                    trained.samples,
                    recipe,
                    out,
                    validator=trained.validator,
                    processes=processes,
                    settings=settings,
                )
                if start is not None:
                    _resume(trainer, start)
            _train(run, out, start, trainer)


def costs_of(recipe: Recipe) -> str:
    """What else a recipe may say to train faster on a GPU; empty if there is nothing."""
    faster = {
        "precision: bfloat16 (float32 products run without TF32)": recipe.precision == "float32",
        "compile: true (what lies between products is not fused)": not recipe.compile,
        "workers: 4 or more (pictures are read between the steps)": recipe.workers == 0,
    }
    return ", ".join(key for key, applies in faster.items() if applies)


def _recipe_of(start: Path) -> dict[str, Any]:
    """What a run had that is gone on with, so that it stays so where the file leaves it open."""
    return read_settings(start, read_progress(start))["recipe"]


def _resume(trainer: Trainer, start: Path) -> None:
    changed = trainer.resume(start)
    if changed and trainer.processes.first:
        notice(f"goes on from {start} with another {changed}")


def _train(run: AnyRun, out: Path, start: Path | None, trainer: Trainer) -> None:
    processes = trainer.processes
    if processes.first:
        # what came after the start will come again
        _delete([*(_newer(out, start) if start and _is_of(out, start) else _of_a_run(out)), *rests(out)])
    processes.wait()
    with ExitStack() as stack:
        for log in _logs(run, out, trainer, stack):
            stack.callback(log.close)
            trainer.logs.append(log)
        stack.enter_context(_at_sigterm(trainer.stop))
        losses = trainer.run()
    if processes.first:
        done = "trained" if losses else "nothing was left to train"
        state = done if trainer.finished else "stopped"
        last = f", last loss {losses[-1]:z.4f}" if losses else ""
        skipped = f", {trainer.progress.skipped} unreadable pictures skipped" if trainer.progress.skipped else ""
        say(f"{state} at step {trainer.progress.step}{last}{skipped}; checkpoint in {trainer.latest}")


@contextmanager
def _alone(out: Path, processes: Processes) -> Iterator[None]:
    """Hold the folder; the first process does it for all."""
    if not processes.first:
        yield
        return
    with held(out) as locked:
        if not locked:
            notice(f"{out} cannot be locked; see to it that no other run goes there")
        yield


def _start(out: Path, resume: str | None, force: bool) -> Path | None:
    """The checkpoint to go on from, if any; refuses to mix a new run with what is there."""
    there = _of_a_run(out)
    if resume is None:
        if there and not force:
            raise InputError(f"{there[0]} exists; --resume auto goes on from there, --force starts anew")
        return None
    if resume != "auto":
        start = Path(resume)
        with explained():
            check(start)
        if there and not force and not _is_of(out, start):
            raise InputError(f"{there[0]} is of another run than {start}; --force deletes it, or take another --out")
        newer = _newer(out, start)
        if newer and not force:
            raise InputError(f"{newer[0]} is newer than {start}; --force deletes it, or take another --out")
        return start
    whole, wrong = newest_whole(out / "checkpoints")
    if wrong and whole is None:
        raise InputError(f"no checkpoint in {out} is whole: {wrong[0]}")
    for message in wrong:
        notice(f"{message}; going on from {whole}")
    return whole


def _is_of(out: Path, checkpoint: Path) -> bool:
    return checkpoint.resolve().parent == (out / "checkpoints").resolve()


def _newer(out: Path, start: Path) -> list[Path]:
    with explained():
        step = read_progress(start).step
    return [path for path in newest_first(out / "checkpoints") if (step_of(path) or 0) > step]


def _of_a_run(out: Path) -> list[Path]:
    return [path for pattern in _OF_A_RUN for path in sorted(out.glob(pattern))]


def _delete(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _logs(run: AnyRun, out: Path, trainer: Trainer, stack: ExitStack) -> list[Log]:
    processes, step = trainer.processes, trainer.progress.step
    if not processes.first:  # the others have nothing to say but which pictures they skipped
        return [SkippedPictures(), JsonLines(out / f"log-{processes.rank}.jsonl", step)]
    logs: list[Log] = [SkippedPictures(), JsonLines(out / "log.jsonl", step), SamplePictures(out / "samples")]
    if run.tensorboard:
        logs.append(TensorBoard(out / "tensorboard", step))
    if run.wandb is not None:
        with explained():
            logs.append(WeightsAndBiases(out, run.wandb, trainer.settings))
    return [*logs, stack.enter_context(TrainingBar())]


@contextmanager
def _at_sigterm(act: Callable[[], None]) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_installed(*modules: str, extra: str = "train") -> None:
    """Refuse to train without optional packages, naming the extra."""
    for module in modules:
        if find_spec(module) is None:
            raise InputError(f"training needs {module}: pip install 'uniflow-kernels[{extra}]'")


def find_shards(pattern: str) -> list[Path]:
    """The tar files that a pattern with braces and asterisks stands for.

    Raises:
        InputError: for a file that is not there, or a range of more than a million.
        ValueError: if braces are not closed.
    """
    parts: Iterable[str] = [pattern]
    if "{" in pattern:
        check_installed("braceexpand")
        from braceexpand import braceexpand

        for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern):
            if abs(float(last) - float(first)) >= _MOST_SHARDS:  # braceexpand makes a list of them first
                raise InputError(f"shards: {{{first}..{last}}} stands for more than {_MOST_SHARDS} files")
        parts = braceexpand(pattern)
    shards: list[Path] = []
    for part in parts:
        for shard in map(Path, sorted(glob(part)) or [part]):
            if not shard.is_file():
                raise InputError(f"no such file: {shard}")
            shards.append(shard)
    return shards
