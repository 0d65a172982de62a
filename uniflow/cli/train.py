"""`uniflow train`, a run as a YAML file describes it, and `uniflow gather`, the model of its sharded checkpoints."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import torch

from uniflow.cli.inputs import (
    InputError,
    check_folder,
    check_outputs,
    choose_device,
    explained,
    load_model,
    picture_files,
    picture_suffixes,
    read_picture,
)
from uniflow.cli.training_bar import TrainingBar
from uniflow.config import UniFlowConfig
from uniflow.data import PictureList, Pictures, PictureShards, RandomCrops
from uniflow.model import UniFlow
from uniflow.objective import UniFlowObjective
from uniflow.teachers import EncoderTeacher
from uniflow.training import Trainer
from uniflow.training.checkpoints import check, newest_first, newest_whole
from uniflow.training.logs import JsonLines, Log, SamplePictures, TensorBoard
from uniflow.training.processes import Processes, joined
from uniflow.training.recipe import DataChoice, ModelChoice, Run, read_run
from uniflow.training.state import gather as gather_shards
from uniflow.training.validation import Validator

# what a run leaves in its folder
_OF_A_RUN = ("checkpoints", "samples", "tensorboard", "log*.jsonl", "failure-*")


def train(config: Path, out: Path | None, resume: str | None, device: str, force: bool) -> None:
    """Train as the file says; checkpoints, logs and samples go to `out`."""
    _check_installed("yaml", "pydantic")
    with explained():
        run = read_run(config)
    out = out or run.out
    if out is None:
        raise InputError(f"{config}: out: expected a folder here or as --out")
    check_folder(out)
    if run.tensorboard:
        _check_installed("tensorboard")
    chosen = choose_device(device)
    with joined(chosen) as (processes, own_device):
        _train(run, out, resume, force, own_device, processes)


def gather(checkpoint: Path, out: Path, average: bool, force: bool) -> None:
    """Write the model of a sharded checkpoint in the official format."""
    check_folder(out)
    check_outputs([out / "config.json", out / "model.safetensors"], force)
    with explained():
        model = gather_shards(checkpoint, average)
    model.save_pretrained(out)
    print(f"written to {out}: config.json, model.safetensors")


def _train(run: Run, out: Path, resume: str | None, force: bool, device: torch.device, processes: Processes) -> None:
    start = processes.from_first(lambda: _start(out, resume, force))
    with explained():
        objective = _objective(run, device)
        size = objective.student.config.image_size
        crops = RandomCrops(_pictures(run.data), size, run.recipe.seed, run.data.smallest_crop, run.data.flip)
        crops[0]  # nothing can be trained on if no picture can be read
        validator = _validator(run, processes)
        trainer = Trainer(objective, crops, run.recipe, out, validator=validator, processes=processes)
        if start is not None:
            trainer.resume(start)
    if processes.first:
        # what came after the start will come again
        _delete(_of_a_run(out) if start is None else _newer(out, start))
        out.mkdir(parents=True, exist_ok=True)
    processes.wait()
    with ExitStack() as stack:
        for log in _logs(run, out, trainer.progress.step, processes, stack):
            stack.callback(log.close)
            trainer.logs.append(log)
        stack.enter_context(_at_sigterm(trainer.stop))
        losses = trainer.run()
    if processes.first:
        state = "trained" if trainer.finished else "stopped"
        last = f", last loss {losses[-1]:.4f}" if losses else ""
        print(f"{state} at step {trainer.progress.step}{last}; checkpoint in {trainer.latest}")


def _start(out: Path, resume: str | None, force: bool) -> Path | None:
    """The checkpoint to go on from, if any; refuses to mix a new run with what is there."""
    if resume is None:
        there = _of_a_run(out)
        if there and not force:
            raise InputError(f"{there[0]} exists; --resume auto goes on from there, --force starts anew")
        return None
    if resume != "auto":
        with explained():
            check(Path(resume))
        newer = _newer(out, Path(resume))
        if newer and not force:
            raise InputError(f"{newer[0]} is newer than {resume}; --force deletes it, or take another --out")
        return Path(resume)
    whole, wrong = newest_whole(out / "checkpoints")
    if wrong and whole is None:
        raise InputError(f"no checkpoint in {out} is whole: {wrong[0]}")
    for message in wrong:
        print(f"uniflow: {message}; going on from {whole}", file=sys.stderr)
    return whole


def _newer(out: Path, start: Path) -> list[Path]:
    return [path for path in newest_first(out / "checkpoints") if path.name > start.resolve().name]


def _of_a_run(out: Path) -> list[Path]:
    return [path for pattern in _OF_A_RUN for path in sorted(out.glob(pattern))]


def _delete(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _objective(run: Run, device: torch.device) -> UniFlowObjective:
    model, objective = run.model, run.objective
    torch.manual_seed(run.recipe.seed)
    student = _student(model, device)
    teacher = None
    if objective.teacher is not None:
        with explained():
            teacher = EncoderTeacher.from_pretrained(objective.teacher).to(device)
    options = asdict(objective) | {"teacher": teacher}
    if objective.distill_weight is None:
        options["distill_weight"] = 0.0 if model.preset is not None and teacher is None else 1.0
    return UniFlowObjective(student, **options)


def _student(model: ModelChoice, device: torch.device) -> UniFlow:
    if model.checkpoint is not None:
        return load_model(model.checkpoint, str(device), "float32")
    with explained():
        if model.encoder is None:
            return UniFlow(UniFlowConfig.preset(str(model.preset), **model.config)).to(device)
        return UniFlow.from_encoder(model.encoder, **model.config).float().to(device)


def _pictures(data: DataChoice) -> Pictures:
    if data.folder is not None:
        return PictureList({str(file): file for file in _files(data.folder)})
    _check_installed("wids", "braceexpand")
    from braceexpand import braceexpand

    shards = [Path(path) for pattern in braceexpand(str(data.shards)) for path in sorted(glob(pattern)) or [pattern]]
    for shard in shards:
        if not shard.is_file():
            raise InputError(f"no such file: {shard}")
    return PictureShards(shards, picture_suffixes())


def _validator(run: Run, processes: Processes) -> Validator | None:
    if run.data.validation is None:
        return None
    files = _files(run.data.validation)
    for file in files:  # a damaged picture is found now, not after hours
        read_picture(file)
    _, size = run.recipe.micro_batches(processes.world)
    return Validator(files, size)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    return picture_files(folder)


def _logs(run: Run, out: Path, step: int, processes: Processes, stack: ExitStack) -> list[Log]:
    if not processes.first:  # the others have nothing to say but which pictures they skipped
        return [JsonLines(out / f"log-{processes.rank}.jsonl", step)]
    logs: list[Log] = [JsonLines(out / "log.jsonl", step), SamplePictures(out / "samples")]
    if run.tensorboard:
        logs.append(TensorBoard(out / "tensorboard", step))
    return [*logs, stack.enter_context(TrainingBar())]


@contextmanager
def _at_sigterm(act: Callable[[], None]) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_installed(*modules: str) -> None:
    for module in modules:
        if find_spec(module) is None:
            raise InputError(f"training needs {module}: pip install 'uniflow-kernels[train]'")
