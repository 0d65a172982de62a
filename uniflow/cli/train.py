"""`uniflow train`: a simple training run on a folder of pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import DataLoader

from uniflow.cli.bars import TrainingBar
from uniflow.cli.inputs import (
    InputError,
    check_outputs,
    choose_device,
    explained,
    load_model,
    picture_files,
    read_picture,
)
from uniflow.config import UniFlowConfig
from uniflow.data import RandomCrops
from uniflow.model import UniFlow
from uniflow.objective import UniFlowObjective
from uniflow.training import Recipe
from uniflow.training import train as run


def train(
    folder: Path,
    out: Path,
    preset: str,
    checkpoint: Path | None,
    steps: int,
    batch_size: int,
    learning_rate: float,
    distill_weight: float | None,
    workers: int,
    seed: int,
    device: str,
    force: bool,
) -> None:
    """Train and write the checkpoint folder `out` at the end."""
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    files = picture_files(folder)
    for file in files:
        read_picture(file)
    check_checkpoint_output(out, force)
    chosen = choose_device(device)
    torch.manual_seed(seed)
    if checkpoint is None:
        with explained():
            model = UniFlow(UniFlowConfig.preset(preset)).to(chosen)
    else:
        model = load_model(checkpoint, device, "float32")
    if distill_weight is None:
        # a copy of an encoder that knows nothing yet has nothing to teach
        distill_weight = 1.0 if checkpoint is not None else 0.0
    objective = UniFlowObjective(model, distill_weight=distill_weight)
    crops = RandomCrops(files, model.config.image_size, seed)
    with TrainingBar() as bar:
        losses = run(
            objective,
            DataLoader(crops, batch_size=batch_size, num_workers=workers, pin_memory=chosen.type == "cuda"),
            Recipe(steps=steps, learning_rate=learning_rate),
            bar.report,
        )
    model.save_pretrained(out)
    print(f"trained for {len(losses)} steps, last loss {losses[-1]:.4f}; checkpoint in {out}")


def check_checkpoint_output(folder: Path, force: bool) -> None:
    """Refuse to overwrite a checkpoint, unless told to, and a file where the folder should be."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file, expected a folder to write to")
    check_outputs([folder / "config.json", folder / "model.safetensors"], force)
