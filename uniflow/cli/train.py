"""`uniflow train`, a run as a YAML file describes it, and `uniflow gather`, the model of its sharded checkpoints."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from uniflow.cli.files import check_folder, check_outputs, picture_files, picture_suffixes, read_picture
from uniflow.cli.inputs import InputError, Named, explained, load_model
from uniflow.cli.printing import notice, say
from uniflow.cli.runs import Trained, check_installed, find_shards, train_as_written
from uniflow.cli.train_generator import train as train_generator
from uniflow.config import UniFlowConfig, read_config
from uniflow.data import PictureList, Pictures, PictureShards, RandomCrops
from uniflow.evaluation.networks import FeatureNetwork
from uniflow.evaluation.validation import ReconstructionValidator
from uniflow.generation.config import MODEL_TYPE as GENERATOR
from uniflow.generation.config import FlowTransformerConfig
from uniflow.generation.model import FlowTransformer
from uniflow.model import UniFlow
from uniflow.objective import UniFlowObjective
from uniflow.reading import read_yaml
from uniflow.teachers import EncoderTeacher
from uniflow.training.processes import Processes
from uniflow.training.recipe import DataChoice, ModelChoice, Recipe, Run
from uniflow.training.state import gather as gather_shards
from uniflow.training.state import gathered_tensors
from uniflow.training.validation import Validator
from uniflow.unifluid.config import MODEL_TYPE as UNIFLUID
from uniflow.unifluid.model import UniFluid


def train(config: Path, out: Path | None, resume: str | None, device: str, force: bool) -> None:
    """Train a UniFlow as the file says, or a generator if it has latents to train on."""
    check_installed("yaml", "pydantic")
    with explained():
        said = read_yaml(config)
    if isinstance(said, dict) and "latents" in said:
        train_generator(config, out, resume, device, force)
    else:
        train_as_written(config, Run, _build, out, resume, device, force)


def gather(checkpoint: Path, out: Path, average: bool, force: bool) -> None:
    """Write the model of a sharded checkpoint in the official format."""
    check_folder(out)
    check_outputs([out / "config.json", out / "model.safetensors"], force)
    with explained():
        model = gather_shards(checkpoint, average, partial(_untrained, average))
    model.save_pretrained(out)
    say(f"{type(model).__name__} written to {out}")


def _untrained(average: bool, folder: Path) -> UniFlow | UniFluid | FlowTransformer:
    """A model of the kind that the folder's config.json names, if its shards can fill it."""
    held = gathered_tensors(folder, average)
    kind = read_config(folder).get("model_type")
    if kind == UNIFLUID:
        return UniFluid.outlined(folder, held)
    if kind == GENERATOR:
        return FlowTransformer.outlined(FlowTransformerConfig.from_pretrained(folder), held, str(folder))
    return UniFlow.outlined(UniFlowConfig.from_pretrained(folder), held, str(folder))


def _build(run: Run, device: torch.device, processes: Processes) -> Trained:
    objective = _objective(run, device)
    size = objective.student.config.image_size
    if objective.student.activation_memory is not None:
        with explained():
            _check_memory(objective.student, run, run.recipe.on(device.type), processes)
    crops = RandomCrops(_pictures(run.data), size, run.recipe.seed, run.data.smallest_crop, run.data.flip)
    return Trained(objective, crops, _validator(run, device, processes))


def _objective(run: Run, device: torch.device) -> UniFlowObjective:
    model, objective = run.model, run.objective
    torch.manual_seed(run.recipe.seed)
    student = _student(model, device, few_steps=objective.flow_loss != "flow_matching")
    teacher = None
    if objective.teacher is not None:
        with explained():
            teacher = EncoderTeacher.from_pretrained(objective.teacher).to(device)
    weight = objective.distill_weight
    if weight is None:
        weight = 0.0 if model.preset is not None and teacher is None else 1.0
    with explained():
        if weight and teacher is None and model.encoder is not None:
            # not a copy of the student's, whose positions may have been resized: so they are resized once, not twice
            teacher = EncoderTeacher.from_pretrained(model.encoder, dtype="float32").to(device)
        made = UniFlowObjective(student, **(asdict(objective) | {"teacher": teacher, "distill_weight": weight}))
        made.resize(made.image_size if model.image_size is None else model.image_size)
        recomputed = model.checkpointing
        memory = None if recomputed in ("none", "encoder", "all") else recomputed
        student.gradient_checkpointing_enable(recomputed != "none", flow_head=recomputed == "all", memory=memory)
    return made


def _check_memory(student: UniFlow, run: Run, recipe: Recipe, processes: Processes) -> None:
    """Say what is recomputed at each size that the encoder learns at; an error now, not in a step, where it cannot."""
    kind, (_, batch), size = student.device.type, recipe.micro_batches(processes.world), student.config.image_size
    said: list[str] = []
    for stage in recipe.stages:
        size = size if stage.image_size is None else stage.image_size
        if stage.train == "all":
            with torch.autocast(kind, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                planned = student.recomputation((batch, student.config.num_channels, size, size))
            said.append(f"checkpointing: {run.model.checkpointing}, at {size} px: {planned}")
    for line in dict.fromkeys(said if processes.first else ()):
        notice(line)


def _student(model: ModelChoice, device: torch.device, few_steps: bool) -> UniFlow:
    with explained():
        if model.checkpoint is not None:
            student = load_model(Named(model.checkpoint), str(device), "float32")
            if model.drop_path_rate is not None:
                student.set_drop_path_rate(model.drop_path_rate)
            if model.latent_noise is not None:
                student.config = replace(student.config, latent_noise=model.latent_noise)
            return student.for_intervals() if few_steps else student
        names = ("image_size", "drop_path_rate", "latent_noise")
        changes = {name: getattr(model, name) for name in names if getattr(model, name) is not None}
        given = {"flow_times": 2 if few_steps else 1, **model.config, **changes}
        if model.encoder is None:
            return UniFlow(UniFlowConfig.preset(str(model.preset), **given)).to(device)
        return UniFlow.from_encoder(model.encoder, **given).float().to(device)


def _pictures(data: DataChoice) -> Pictures:
    if data.folder is not None:
        return PictureList({str(file): file for file in _files(data.folder)})
    return PictureShards(find_shards(str(data.shards)), picture_suffixes())


def _validator(run: Run, device: torch.device, processes: Processes) -> Validator | None:
    if run.data.validation is None:
        return None
    files = _files(run.data.validation)
    for file in files:  # a damaged picture is found now, not after hours
        read_picture(file)
    _, size = run.recipe.micro_batches(processes.world)
    features = run.data.validation_features
    return ReconstructionValidator(files, size, None if features is None else FeatureNetwork(features, device))


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    return picture_files(folder)
