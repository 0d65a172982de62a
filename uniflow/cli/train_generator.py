"""`uniflow train` of a generator: what a folder of latents and a file say of it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from uniflow.cli.inputs import InputError, Named, explained, load_checkpoint, load_model
from uniflow.cli.runs import Trained, train_as_written
from uniflow.generation.config import FlowTransformerConfig, shift_of
from uniflow.generation.model import FlowTransformer
from uniflow.generation.objective import FlowTransformerObjective
from uniflow.generation.recipe import GeneratorRun, ModelChoice
from uniflow.generation.samples import LatentSamples
from uniflow.generation.validation import GeneratorValidator
from uniflow.latent_set import LatentSet
from uniflow.training.processes import Processes


def train(config: Path, out: Path | None, resume: str | None, device: str, force: bool) -> None:
    """Train a generator as the file says."""
    train_as_written(config, GeneratorRun, _build, out, resume, device, force)


def _build(run: GeneratorRun, device: torch.device, processes: Processes) -> Trained:
    recipe, data = run.recipe, run.data
    latents = _latents(run.latents)
    labelled = latents.labels is not None if data.labels is None else data.labels
    flip = latents.manifest.flips if data.flip is None else data.flip
    samples = LatentSamples(latents, recipe.seed, flip, labelled)
    torch.manual_seed(recipe.seed)
    student = _student(run.model, latents, labelled).to(device)
    objective = FlowTransformerObjective(student, **asdict(run.objective))
    scored = None
    if data.validation is not None:
        others = _latents(data.validation)
        _check_alike(others, latents)
        scored = LatentSamples(others, recipe.seed, flip=False, labels=labelled)
    tokenizer = None
    if run.samples.tokenizer is not None:
        tokenizer = load_model(Named(run.samples.tokenizer), str(device), "auto")
        student.check_tokenizer(tokenizer)
    if scored is None and tokenizer is None:
        return Trained(objective, samples, None)
    _, size = recipe.micro_batches(processes.world)
    shown = run.samples
    validator = GeneratorValidator(
        objective, scored, tokenizer, size, shown.classes, shown.columns, shown.steps, shown.cfg
    )
    return Trained(objective, samples, validator)


def _latents(folder: Path) -> LatentSet:
    if not folder.is_dir():
        raise InputError(f"no such folder of latents: {folder}")
    return LatentSet(folder)


def _student(model: ModelChoice, latents: LatentSet, labelled: bool) -> FlowTransformer:
    manifest = latents.manifest
    classes = _classes(latents) if labelled else None
    if model.checkpoint is not None:
        student = load_checkpoint(FlowTransformer.from_pretrained, Named(model.checkpoint), "cpu", "float32")
        _check_fits(student.config, str(model.checkpoint), latents, classes)
        return student.train()
    tokens, channels = manifest.latent_shape()
    patch = manifest.tokenizer["patch_size"]
    changes = {"classes": classes, **model.config}
    with explained():
        try:
            config = FlowTransformerConfig.preset(
                str(model.preset), channels, (manifest.size[0] // patch, manifest.size[1] // patch), **changes
            )
        except TypeError as error:  # a field that is none
            raise ValueError(f"model.config: {error}") from None
        names = manifest.classes if labelled and manifest.classes and len(manifest.classes) == config.classes else None
        shift = shift_of(tokens, channels) if model.noise_shift == "channels" else model.noise_shift
        config = replace(
            config, noise_shift=shift, names=names, tokenizer=manifest.tokenizer, fingerprint=manifest.fingerprint
        )
        _check_fits(config, "the generator", latents, classes)
        student = FlowTransformer(config)
        student.set_statistics(latents.statistics)
    return student


def _classes(latents: LatentSet) -> int:
    """How many: as many as have names, or one more than the largest label."""
    assert latents.labels is not None
    return len(latents.manifest.classes or ()) or int(latents.labels.max()) + 1


def _check_fits(config: FlowTransformerConfig, source: str, latents: LatentSet, classes: int | None) -> None:
    """Refuse a generator that is none of these latents and labels."""
    manifest = latents.manifest
    tokens, channels = manifest.latent_shape()
    if (config.tokens, config.latent_channels) != (tokens, channels):
        raise InputError(
            f"{source} draws {config.tokens} tokens of {config.latent_channels} channels, the latents in "
            f"{latents.folder} are {tokens} of {channels}"
        )
    if config.fingerprint not in (None, manifest.fingerprint):
        raise InputError(f"{source} is of the latents of another tokenizer than those in {latents.folder}")
    if (config.classes or 0) < (classes or 0) or (config.classes is None) != (classes is None):
        raise InputError(f"{source} has {config.classes or 'no'} classes, {latents.folder} {classes or 'none'}")


def _check_alike(others: LatentSet, latents: LatentSet) -> None:
    ours, theirs = latents.manifest, others.manifest
    if ours.fingerprint != theirs.fingerprint or ours.latent_shape() != theirs.latent_shape():
        raise InputError(f"data.validation: {others.folder} holds latents of another kind than {latents.folder}")
