"""`uniflow train`, a run as a YAML file describes it, and `uniflow gather`, the model of its sharded checkpoints."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from uniflow.cli.files import check_folder, check_outputs, picture_files, picture_suffixes, read_picture
from uniflow.cli.inputs import InputError, Named, explained, load_model
from uniflow.cli.printing import say
from uniflow.cli.runs import Trained, find_shards, train_as_written
from uniflow.config import UniFlowConfig, read_config
from uniflow.data import PictureList, Pictures, PictureShards, RandomCrops
from uniflow.model import UniFlow
from uniflow.objective import UniFlowObjective
from uniflow.teachers import EncoderTeacher
from uniflow.training.processes import Processes
from uniflow.training.recipe import DataChoice, ModelChoice, Run
from uniflow.training.state import gather as gather_shards
from uniflow.training.state import gathered_tensors
from uniflow.training.validation import ReconstructionValidator, Validator
from uniflow.unifluid.config import MODEL_TYPE as UNIFLUID
from uniflow.unifluid.model import UniFluid


def train(config: Path, out: Path | None, resume: str | None, device: str, force: bool) -> None:
    """Train a UniFlow as the file says."""
    train_as_written(config, Run, _build, out, resume, device, force)


def gather(checkpoint: Path, out: Path, average: bool, force: bool) -> None:
    """Write the model of a sharded checkpoint in the official format."""
    check_folder(out)
    check_outputs([out / "config.json", out / "model.safetensors"], force)
    with explained():
        model = gather_shards(checkpoint, average, partial(_untrained, average))
    model.save_pretrained(out)
    say(f"{type(model).__name__} written to {out}")


def _untrained(average: bool, folder: Path) -> UniFlow | UniFluid:
    """A model of the kind that the folder's config.json names, if its shards can fill it."""
    held = gathered_tensors(folder, average)
    if read_config(folder).get("model_type") == UNIFLUID:
        return UniFluid.outlined(folder, held)
    return UniFlow.outlined(UniFlowConfig.from_pretrained(folder), held, str(folder))


def _build(run: Run, device: torch.device, processes: Processes) -> Trained:
    objective = _objective(run, device)
    size = objective.student.config.image_size
    crops = RandomCrops(_pictures(run.data), size, run.recipe.seed, run.data.smallest_crop, run.data.flip)
    return Trained(objective, crops, _validator(run, processes))


def _objective(run: Run, device: torch.device) -> UniFlowObjective:
    model, objective = run.model, run.objective
    torch.manual_seed(run.recipe.seed)
    student = _student(model, device, few_steps=objective.flow_loss != "flow_matching")
    teacher = None
    if objective.teacher is not None:
        with explained():
            teacher = EncoderTeacher.from_pretrained(objective.teacher).to(device)
    options = asdict(objective) | {"teacher": teacher}
    if objective.distill_weight is None:
        options["distill_weight"] = 0.0 if model.preset is not None and teacher is None else 1.0
    return UniFlowObjective(student, **options)


def _student(model: ModelChoice, device: torch.device, few_steps: bool) -> UniFlow:
    if model.checkpoint is not None:
        student = load_model(Named(model.checkpoint), str(device), "float32")
        return student.for_intervals() if few_steps else student
    config = {"flow_times": 2 if few_steps else 1, **model.config}
    with explained():
        if model.encoder is None:
            return UniFlow(UniFlowConfig.preset(str(model.preset), **config)).to(device)
        return UniFlow.from_encoder(model.encoder, **config).float().to(device)


def _pictures(data: DataChoice) -> Pictures:
    if data.folder is not None:
        return PictureList({str(file): file for file in _files(data.folder)})
    return PictureShards(find_shards(str(data.shards)), picture_suffixes())


def _validator(run: Run, processes: Processes) -> Validator | None:
    if run.data.validation is None:
        return None
    files = _files(run.data.validation)
    for file in files:  # a damaged picture is found now, not after hours
        read_picture(file)
    _, size = run.recipe.micro_batches(processes.world)
    return ReconstructionValidator(files, size)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    return picture_files(folder)
