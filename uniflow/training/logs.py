"""What a run reports: a line of JSON a report, TensorBoard, Weights & Biases, and how much of the GPU is used."""

from __future__ import annotations

import json
import math
import resource
import secrets
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import flop_registry

from uniflow.atomic import replacing
from uniflow.pictures import save_picture
from uniflow_kernels.torch_private import TorchDispatchMode, overloads_of, tree_map_only

# dense bfloat16 products a second, from the makers' data sheets; the first name that is part of the device's counts
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


@dataclass(frozen=True)
class Report:
    """A step as it is logged; losses are means over all processes and micro-batches.

    `loss` is the total, `measured` what else the objective measures, by name. `spent` is the share of the stage's
    budget, `seconds_left` what remains of it at this pace; `mfu` the share of the GPU's peak that the model's products
    make up, None where the peak is not known; `memory` the highest so far, in bytes, of the GPU or else of the process;
    `skipped` the damaged pictures so far, in this process.
    """

    step: int
    stage: int
    spent: float
    seconds_left: float
    loss: float
    measured: dict[str, float | list[float]]
    gradient_norm: float
    learning_rate: float
    encoder_learning_rate: float | None
    images_per_second: float
    mfu: float | None
    memory: int
    skipped: int

    def values(self) -> dict[str, Any]:
        """All of it by name, what is measured beside the loss."""
        values: dict[str, Any] = {}
        for name, value in asdict(self).items():
            values |= value if name == "measured" else {name: value}
        return values


@dataclass(frozen=True)
class Validation:
    """Scores by name, None for one that does not apply; `samples` is a picture to look at, uint8 [3, H, W]."""

    step: int
    scores: dict[str, float | None]
    samples: Tensor | None = None


class Log:
    """Whatever wants to know how a run goes. All but `skipped` is told to the first process only."""

    def report(self, report: Report) -> None:
        """A step."""

    def validation(self, validation: Validation) -> None:
        """A validation."""

    def skipped(self, step: int, names: list[str]) -> None:
        """Pictures that this process could not read."""

    def close(self) -> None:
        """The run is over."""


class JsonLines(Log):
    """One JSON object a line; lines of steps after `start`, which will come again, are taken out."""

    def __init__(self, path: Path, start: int) -> None:
        if path.exists():
            with replacing(path) as kept:
                kept.write_text("".join(line + "\n" for line in _lines_until(path, start)), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def report(self, report: Report) -> None:
        """Every field."""
        self._write(report.values())

    def validation(self, validation: Validation) -> None:
        """The scores."""
        self._write({"step": validation.step, **validation.scores})

    def skipped(self, step: int, names: list[str]) -> None:
        """The names."""
        self._write({"step": step, "skipped_pictures": names})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, values: dict[str, object]) -> None:
        # a line at a time, so that a run that is killed leaves what it has seen
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()


def _lines_until(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # the last line of a run that was killed
            continue
    return kept


def _curves(report: Report) -> dict[str, float]:
    """The numbers of a step as curves are named: train/loss, and alpha/1 for the first of a list."""
    curves: dict[str, float] = {}
    for name, value in report.values().items():
        if isinstance(value, list):
            curves |= {f"{name}/{place}": number for place, number in enumerate(value, start=1)}
        elif value is not None and name != "step":
            curves[f"train/{name}"] = value
    return curves


class TensorBoard(Log):
    """Scalars and sample pictures for TensorBoard; steps after `start` are taken out."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1)

    def report(self, report: Report) -> None:
        """One curve a number; those of a list (alpha and weights of the layers) count from 1."""
        for name, value in _curves(report).items():
            self._writer.add_scalar(name, value, report.step)

    def validation(self, validation: Validation) -> None:
        """Scores and pictures."""
        for name, score in validation.scores.items():
            if score is not None:
                self._writer.add_scalar(f"validation/{name}", score, validation.step)
        if validation.samples is not None:
            self._writer.add_image("validation/samples", validation.samples, validation.step)

    def skipped(self, step: int, names: list[str]) -> None:
        """The names, as text."""
        # a name need not be UTF-8, but what is written must be
        text = ", ".join(names).encode("utf-8", "backslashreplace").decode("utf-8")
        self._writer.add_text("skipped", text, step)

    def close(self) -> None:
        """Write what is waiting."""
        self._writer.close()


class WeightsAndBiases(Log):
    """Scalars and sample pictures for a project of Weights & Biases, with the names that TensorBoard's have.

    The folder keeps which run it is: a run that goes on is the same one there, in which steps that come again stand
    twice. Where it is sent, and whether (WANDB_MODE=offline), is for that package to know.

    Args:
        folder: for its files, beside a folder `wandb` that it makes.
        project: its name.
        settings: what the run is made with.

    Raises:
        ValueError: if the package cannot begin, as without an account.
    """

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        import wandb

        known = folder / "wandb" / "run-id"
        known.parent.mkdir(parents=True, exist_ok=True)
        own = known.read_text(encoding="utf-8") if known.exists() else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=project,
                name=folder.resolve().name,
                dir=folder,
                id=own,
                resume="allow",
                config=dict(settings),
                settings=wandb.Settings(console="off"),  # what the command prints is for whoever reads it
            )
        except wandb.Error as error:
            raise ValueError(f"wandb: {error}") from None
        with replacing(known) as temporary:
            temporary.write_text(own, encoding="utf-8")
        # by its own count a step that is reported after a later validation would be dropped
        self._run.define_metric("*", step_metric="step")
        self._image = wandb.Image

    def report(self, report: Report) -> None:
        """One curve a number; those of a list count from 1."""
        self._run.log({"step": report.step, **_curves(report)})

    def validation(self, validation: Validation) -> None:
        """Scores and pictures."""
        found = {f"validation/{name}": score for name, score in validation.scores.items() if score is not None}
        values: dict[str, Any] = {"step": validation.step, **found}
        if validation.samples is not None:
            values["validation/samples"] = self._image(validation.samples.permute(1, 2, 0).numpy())
        self._run.log(values)

    def close(self) -> None:
        """Send what is waiting."""
        self._run.finish()


class SamplePictures(Log):
    """A PNG for every validation that has samples."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def validation(self, validation: Validation) -> None:
        """Write it."""
        if validation.samples is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        save_picture(validation.samples, self.folder / f"step-{validation.step:08}.png")


def peak_flops(device: torch.device) -> float | None:
    """Peak of bfloat16 products in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def count_flops(objective: nn.Module, inputs: tuple[Any, ...]) -> float | None:
    """FLOPs of the products in a forward and backward pass for a batch.

    Counted on the meta device, where nothing is computed and fused operations take their plain forms; None for an
    objective that does not run there.
    """
    tensors = chain(objective.named_parameters(), objective.named_buffers())
    meta = {name: torch.empty_like(t, device="meta").requires_grad_(t.requires_grad) for name, t in tensors}
    batch = tree_map_only(Tensor, lambda tensor: torch.empty_like(tensor, device="meta"), tuple(inputs))
    try:
        with _FlopCounter() as counter:
            functional_call(objective, meta, batch).total.backward()
    except (NotImplementedError, RuntimeError):
        return None
    return counter.total


class _FlopCounter(TorchDispatchMode):
    """The sum of torch's FlopCounterMode, whose hooks on modules bear no gradient that is taken in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(overloads_of(func))
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def peak_memory(device: torch.device) -> int:
    """The highest use so far in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def is_finite(*values: float) -> bool:
    """Whether all values are."""
    return all(map(math.isfinite, values))
