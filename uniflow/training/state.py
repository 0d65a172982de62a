"""What a run needs to go on, as files of a checkpoint.

- config.json, model.safetensors: the model as its `save_pretrained` writes it; ema/: its moving average, likewise
- optimizer.pt: the optimizer's state by parameter name
- shards/: in place of these, the shards of a run with parallel: fsdp (torch.distributed.checkpoint)
- progress.json: step, stage, position in samples
- random-RANK.pt: states of each process's random generators
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from uniflow.checkpoint import CheckpointError, read_state
from uniflow.training.checkpoints import (
    check,
    random_states,
    read_tensors,
    set_random_states,
    write_json,
    write_tensors,
)
from uniflow.training.interfaces import Student
from uniflow.training.optimization import MovingAverage
from uniflow.training.processes import Processes

M = TypeVar("M", bound=nn.Module)

_AVERAGE = "ema"
_OPTIMIZER = "optimizer.pt"
_SHARDS = "shards"
_PROGRESS = "progress.json"


@dataclass
class Progress:
    """How far a run is: steps and samples of all stages and processes, and within the stage under way."""

    step: int = 0
    samples: int = 0
    stage: int = 0
    stage_step: int = 0
    stage_seconds: float = 0.0
    skipped: int = 0  # pictures that could not be read


def write_training(folder: Path, progress: Progress, processes: Processes) -> None:
    """Progress and random states, from all processes to one folder."""
    write_tensors(folder / f"random-{processes.rank}.pt", random_states())
    if processes.first:
        write_json(folder / _PROGRESS, asdict(progress))


def read_training(folder: Path, processes: Processes) -> Progress:
    """What `write_training` wrote; a process that was not there then keeps its random states."""
    try:
        progress = Progress(**json.loads((folder / _PROGRESS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder} is no checkpoint of a training run: {error}") from None
    states = folder / f"random-{processes.rank}.pt"
    if states.exists():
        set_random_states(read_tensors(states))
    return progress


def write_weights(
    folder: Path,
    student: Student,
    average: MovingAverage | None,
    optimizer: torch.optim.Optimizer,
    processes: Processes,
) -> None:
    """Model, averages and optimizer: whole by the first process, or each process its shards."""
    if is_sharded(student):
        state = _shards(student, average, optimizer)
        try:
            dcp.save(state, checkpoint_id=folder / _SHARDS, process_group=processes.control)
        except CheckpointException as error:  # no Exception: it would end the process past every handler
            raise OSError(f"cannot write {folder / _SHARDS}: {_first_cause(error)}") from None
        if processes.first:
            student.save_config(folder)
    elif processes.first:
        student.save_pretrained(folder)
        if average is not None:
            with average.in_model():
                student.save_pretrained(folder / _AVERAGE)
        write_tensors(folder / _OPTIMIZER, get_optimizer_state_dict(_module(student), optimizer))


def read_weights(
    folder: Path,
    student: Student,
    average: MovingAverage | None,
    optimizer: torch.optim.Optimizer,
    processes: Processes,
) -> None:
    """What `write_weights` wrote, whatever the number of processes was. The learning rates stay the optimizer's own.

    Raises:
        CheckpointError: if the folder holds another model, or shards where whole tensors are wanted, or the reverse.
    """
    _check_config(folder, student)
    sharded = (folder / _SHARDS).exists()
    if sharded != is_sharded(student):
        wrote, reads = ("fsdp", "ddp") if sharded else ("ddp", "fsdp")
        raise CheckpointError(f"{folder} was written with parallel: {wrote}; it cannot go on with parallel: {reads}")
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    if sharded:
        state = _shards(student, average, optimizer)
        try:
            dcp.load(state, checkpoint_id=folder / _SHARDS, process_group=processes.control)
        except CheckpointException as error:
            raise CheckpointError(f"{folder} does not hold this model: {_first_cause(error)}") from None
        set_optimizer_state_dict(_module(student), optimizer, state["optimizer"])
    else:
        _load(student, folder)
        if average is not None:
            averages = read_state(folder / _AVERAGE)
            for name, value in average.values.items():
                value.copy_(averages[name])
        set_optimizer_state_dict(_module(student), optimizer, read_tensors(folder / _OPTIMIZER))
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def gather(folder: Path, average: bool, build: Callable[[Path], M]) -> M:
    """The model of a sharded checkpoint, or its averages, whole and on the CPU.

    Args:
        folder: the checkpoint.
        average: whether the averages are wanted.
        build: gives a model of the folder's config.json, whatever its parameters are.

    Raises:
        CheckpointError: if the folder is damaged or holds no shards, or no averages.
    """
    check(folder)
    if not (folder / _SHARDS / ".metadata").exists():
        raise CheckpointError(f"{folder} is no sharded checkpoint: no {_SHARDS}/.metadata in it")
    model = build(folder)
    part = _AVERAGE if average else "model"
    state: dict[str, dict[str, Tensor]] = {}
    buffers = dict(model.named_buffers())  # have no averages
    for name, tensor in model.state_dict().items():
        state.setdefault("model" if name in buffers else part, {})[name] = tensor
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is the point
            dcp.load(state, checkpoint_id=folder / _SHARDS, no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(f"{folder} does not hold {part}: {_first_cause(error)}") from None
    return model


def is_sharded(student: Student) -> bool:
    """Whether its parameters are spread over processes."""
    return any(isinstance(parameter, DTensor) for _, parameter in student.named_parameters())


def _module(student: Student) -> nn.Module:
    assert isinstance(student, nn.Module)  # a Protocol cannot say so
    return student


def _shards(student: Student, average: MovingAverage | None, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = {"model": student.state_dict(), "optimizer": get_optimizer_state_dict(_module(student), optimizer)}
    return state if average is None else {**state, _AVERAGE: average.values}


def _check_config(folder: Path, student: Student) -> None:
    """What the shapes of the weights do not show: another order, rotary base, tokenizer."""
    with TemporaryDirectory() as own:
        student.save_config(Path(own))
        there, here = (json.loads((Path(place) / "config.json").read_text("utf-8")) for place in (folder, own))
    differing = [name for name in there if name in here and there[name] != here[name]]
    if differing:
        raise CheckpointError(f"{folder} does not hold this model: its config.json has another {', '.join(differing)}")


def _load(student: Student, folder: Path) -> None:
    try:
        student.load_state_dict(read_state(folder))
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not hold this model: {error}") from None


def _first_cause(error: CheckpointException) -> str:
    return str(next(iter(error.failures.values()))[0])
