"""What a run needs to go on, as files of a checkpoint.

- config.json, model.safetensors: the model as its `save_pretrained` writes it; ema/: its moving average, likewise
- optimizer.pt: the optimizer's state by parameter name
- shards/: in place of these, the shards of a run with parallel: fsdp (torch.distributed.checkpoint)
- progress.json: step, stage, position in samples; run.json: recipe and whatever else the run is made with
- random-RANK.pt: states of each process's random generators
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from uniflow.checkpoint import CheckpointError, check_keys, read_state, warn_of_not_finite
from uniflow.reading import shown
from uniflow.training.checkpoints import (
    check,
    random_states,
    read_json,
    read_tensors,
    set_random_states,
    write_json,
    write_tensors,
)
from uniflow.training.interfaces import Student
from uniflow.training.optimization import MovingAverage
from uniflow.training.processes import Processes
from uniflow.training.shards import METADATA, ShardPlanner, ShardReader, sharded_tensors

M = TypeVar("M", bound=nn.Module)

_AVERAGE = "ema"
_OPTIMIZER = "optimizer.pt"
_SHARDS = "shards"
_PROGRESS = "progress.json"
_SETTINGS = "run.json"
_MOST = 2**62  # of whatever is counted


@dataclass
class Progress:
    """How far a run is: steps and samples of all stages and processes, and within the stage under way."""

    step: int = 0
    samples: int = 0
    stage: int = 0
    stage_step: int = 0
    stage_seconds: float = 0.0
    skipped: int = 0  # pictures that could not be read


def write_training(folder: Path, progress: Progress, settings: Mapping[str, Any], processes: Processes) -> None:
    """Progress, settings and random states, from all processes to one folder."""
    write_tensors(folder / f"random-{processes.rank}.pt", random_states())
    if processes.first:
        write_json(folder / _PROGRESS, asdict(progress))
        write_json(folder / _SETTINGS, settings)


def read_progress(folder: Path) -> Progress:
    """How far the run of a checkpoint was.

    Raises:
        CheckpointError: if it is the checkpoint of no run, naming the key that is not as it was written.
    """
    path = folder / _PROGRESS
    values = read_json(path)
    for field in fields(Progress):
        value: Any = values.get(field.name)
        kinds = (int, float) if field.name == "stage_seconds" else (int,)
        if type(value) not in kinds or not 0 <= value < _MOST:
            raise CheckpointError(f"{path}: {field.name}: expected a number from 0, got {shown(value)}")
    return Progress(**{field.name: values[field.name] for field in fields(Progress)})


def read_settings(folder: Path, progress: Progress) -> dict[str, Any]:
    """What the run of a checkpoint was made with.

    Raises:
        CheckpointError: if its stages are not those of a run that is that far.
    """
    path = folder / _SETTINGS
    settings = read_json(path)
    recipe = settings.get("recipe")
    stages = recipe.get("stages") if isinstance(recipe, dict) else None
    if not isinstance(stages, list) or len(stages) < max(progress.stage, 1):
        raise CheckpointError(f"{path}: recipe.stages: expected at least {max(progress.stage, 1)}, got {shown(stages)}")
    return settings


def encoder_source(folder: Path) -> str | None:
    """Which encoder a checkpoint, or its averages, of `uniflow train` learnt from: its teacher, or what it began with.

    Returns:
        A folder as the run's file says it, relative to where it was trained, or a name on the Hub; None if the folder
        is the checkpoint of no such run.

    Raises:
        CheckpointError: if what it was made with cannot be read.
    """
    path = (folder.parent if folder.name == _AVERAGE else folder) / _SETTINGS
    if not path.is_file():
        return None
    settings = read_json(path)
    for part, name in (("objective", "teacher"), ("model", "encoder"), ("model", "checkpoint")):
        values = settings.get(part)
        if isinstance(values, dict) and isinstance(found := values.get(name), str):
            return found
    return None


def read_random_states(folder: Path, processes: Processes) -> None:
    """Go on where `write_training` took them; a process that was not there then keeps its own.

    Raises:
        CheckpointError: if the file does not hold what was written.
    """
    path = folder / f"random-{processes.rank}.pt"
    if path.exists():
        states = read_tensors(path)
        try:
            set_random_states(states)
        except Exception as error:  # whatever Python, NumPy and torch say to what is none of theirs
            raise CheckpointError(f"{path} holds no states of random generators: {shown(error)}") from None


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


def read_image_size(folder: Path) -> int:
    """The size that the model of a checkpoint is trained at, of a run whose objective is `Resizable`.

    Raises:
        CheckpointError: if its config.json does not say one.
    """
    size = read_json(folder / "config.json").get("image_size")
    if not isinstance(size, int):
        raise CheckpointError(f"{folder / 'config.json'}: image_size: expected a number of pixels, got {shown(size)}")
    return size


def read_weights(folder: Path, student: Student, average: MovingAverage | None, processes: Processes) -> None:
    """Model and averages that `write_weights` wrote, whatever the number of processes was.

    Raises:
        CheckpointError: if the folder holds another model, or shards where whole tensors are wanted, or the reverse.
    """
    _check_config(folder, student)
    sharded = (folder / _SHARDS).exists()
    if sharded != is_sharded(student):
        wrote, reads = ("fsdp", "ddp") if sharded else ("ddp", "fsdp")
        raise CheckpointError(f"{folder} was written with parallel: {wrote}; it cannot go on with parallel: {reads}")
    if sharded:
        _load_shards(folder, _shards(student, average, None), processes)
    else:
        _load(student, folder)
        if average is not None:
            _load_average(average, folder / _AVERAGE)


def read_optimizer(folder: Path, student: Student, optimizer: torch.optim.Optimizer, processes: Processes) -> None:
    """The optimizer that `write_weights` wrote; the learning rates stay this one's own.

    Raises:
        CheckpointError: if it is of other parameters.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    if is_sharded(student):
        state = {"optimizer": get_optimizer_state_dict(_module(student), optimizer)}
        _load_shards(folder, state, processes)
        found = state["optimizer"]
    else:
        found = _read_optimizer(folder / _OPTIMIZER, student, optimizer)
    set_optimizer_state_dict(_module(student), optimizer, found)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _load_shards(folder: Path, state: dict[str, Any], processes: Processes) -> None:
    try:
        dcp.load(
            state,
            storage_reader=ShardReader(folder / _SHARDS),
            planner=ShardPlanner(),
            process_group=processes.control,
        )
    except CheckpointException as error:
        raise CheckpointError(f"{folder} does not hold this model: {_first_cause(error)}") from None


def gather(folder: Path, average: bool, build: Callable[[Path], M]) -> M:
    """The model of a sharded checkpoint, or its averages, whole and on the CPU.

    Args:
        folder: the checkpoint.
        average: whether the averages are wanted.
        build: gives a model of the folder's config.json, whatever its parameters are; they may be on the meta device.

    Raises:
        CheckpointError: if the folder is damaged or holds no shards, or no averages.
    """
    check(folder)
    held = gathered_tensors(folder, average)
    model = build(folder)
    own = model.state_dict()
    check_keys(own, held, str(folder))
    fresh = {name: torch.empty_like(tensor, device="cpu") for name, tensor in own.items() if tensor.is_meta}
    if fresh:
        model.load_state_dict({**own, **fresh}, assign=True)
    part = _AVERAGE if average else "model"
    state: dict[str, dict[str, Tensor]] = {}
    buffers = dict(model.named_buffers())  # have no averages
    for name, tensor in model.state_dict().items():
        state.setdefault("model" if name in buffers else part, {})[name] = tensor
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is the point
            dcp.load(state, storage_reader=ShardReader(folder / _SHARDS), planner=ShardPlanner(), no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(f"{folder} does not hold {part}: {_first_cause(error)}") from None
    warn_of_not_finite(model.state_dict(), folder)
    return model


def gathered_tensors(folder: Path, average: bool) -> dict[str, Tensor]:
    """The tensors of a sharded checkpoint's model, or with its averages, on the meta device.

    Raises:
        CheckpointError: if the folder holds no shards, or no averages.
    """
    if not (folder / _SHARDS / METADATA).exists():
        raise CheckpointError(f"{folder} is no sharded checkpoint: no {_SHARDS}/{METADATA} in it")
    tensors = sharded_tensors(folder / _SHARDS)
    found: dict[str, dict[str, Tensor]] = {"model": {}, _AVERAGE: {}}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        if part in found:
            found[part][key] = tensor
    if average and not found[_AVERAGE]:
        raise CheckpointError(f"{folder} does not hold {_AVERAGE}")
    return found["model"] | found[_AVERAGE] if average else found["model"]


def is_sharded(student: Student) -> bool:
    """Whether its parameters are spread over processes."""
    return any(isinstance(parameter, DTensor) for _, parameter in student.named_parameters())


def _module(student: Student) -> nn.Module:
    assert isinstance(student, nn.Module)  # a Protocol cannot say so
    return student


def _shards(student: Student, average: MovingAverage | None, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    state = {"model": student.state_dict()}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(_module(student), optimizer)
    return state if average is None else {**state, _AVERAGE: average.values}


def _check_config(folder: Path, student: Student) -> None:
    """What the shapes of the weights do not show: another order, rotary base, tokenizer."""
    with TemporaryDirectory() as own:
        student.save_config(Path(own))
        there, here = (read_json(Path(place) / "config.json") for place in (folder, own))
    differing = [name for name in there if name in here and there[name] != here[name]]
    if differing:
        raise CheckpointError(f"{folder} does not hold this model: its config.json has another {', '.join(differing)}")


def _load(student: Student, folder: Path) -> None:
    try:
        student.load_state_dict(read_state(folder))
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not hold this model: {error}") from None


def _load_average(average: MovingAverage, folder: Path) -> None:
    found = read_state(folder)
    for name, value in average.values.items():
        if name not in found or found[name].shape != value.shape:
            raise CheckpointError(f"{folder} does not hold the averages of this model: {name} {list(value.shape)}")
        value.copy_(found[name])


def _read_optimizer(path: Path, student: Student, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state in a file, which must be that of an optimizer like this one; its settings are this one's."""
    own = get_optimizer_state_dict(_module(student), optimizer)
    state = read_tensors(path).get("state")
    found = _tensors(state)
    for name, expected in _tensors(own["state"]).items():
        tensor = found.pop(name, None)
        if tensor is None or (tensor.shape, tensor.dtype, tensor.layout) != (
            expected.shape,
            expected.dtype,
            expected.layout,
        ):
            raise CheckpointError(f"{path} holds another optimizer's state: expected {name} {list(expected.shape)}")
    if found:
        raise CheckpointError(f"{path} holds another optimizer's state: expected no {next(iter(found))}")
    return {**own, "state": state}


def _tensors(state: Any) -> dict[str, Tensor]:
    """By parameter and moment."""
    parts = state if isinstance(state, dict) else {}
    return {
        f"{name}.{moment}": value
        for name, moments in parts.items()
        if isinstance(moments, dict)
        for moment, value in moments.items()
        if isinstance(value, Tensor)
    }


def _first_cause(error: CheckpointException) -> str:
    return str(next(iter(error.failures.values()))[0])
