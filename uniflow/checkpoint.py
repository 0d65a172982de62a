"""Checkpoint folders in the official format: safetensors, whole or in shards, or a pickle read without executing it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from uniflow.atomic import replacing

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"


class CheckpointError(ValueError):
    """A checkpoint that does not hold this model, or a damaged file."""


def read_state(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, on the CPU, in the dtype of the file.

    Raises:
        FileNotFoundError: if the folder holds no weights, or a shard that the index names is not there.
        CheckpointError: if a file is damaged, or a pickle holds anything but tensors.
    """
    folder = Path(folder)
    if (folder / WHOLE).exists():
        return _read_safetensors(folder / WHOLE)
    if (folder / INDEX).exists():
        return _read_shards(folder)
    if (folder / PICKLE).exists():
        return _read_pickle(folder / PICKLE)
    raise FileNotFoundError(f"no weights in {folder}: expected {WHOLE}, {INDEX} or {PICKLE}")


def write_state(model: nn.Module, folder: str | Path) -> None:
    """Write the model's tensors to `folder`/model.safetensors; the folder is made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder / WHOLE) as path:
        try:
            save_file(state, path, metadata={"format": "pt"})
        except SafetensorError as error:  # how the writer reports a full disk
            raise OSError(f"cannot write {folder / WHOLE}: {error}") from None


def assign_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Make the tensors of `state` the model's parameters, after checking all of them.

    Raises:
        CheckpointError: naming every missing, unexpected and misshapen key.
    """
    own = model.state_dict()
    wrong = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} ({list(state[name].shape)}, expected {list(tensor.shape)})"
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    found = [f"{kind} ({len(names)}): {', '.join(names)}" for kind, names in wrong.items() if names]
    if found:
        raise CheckpointError(f"{source} does not hold this model; keys {'; '.join(found)}")
    model.load_state_dict(state, assign=True)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _read_shards(folder: Path) -> dict[str, Tensor]:
    try:
        places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX} is no index of shards: {error!r}") from None
    state: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{folder / INDEX} names a file outside the folder: {shard}")
        if not (folder / shard).exists():
            raise FileNotFoundError(f"{folder / INDEX} names {shard}, which is not there")
        state.update(_read_safetensors(folder / shard))
    # a key that the index names but no shard holds is found as a missing key of the model
    return state


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler met
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path} is damaged or holds more than tensors: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a dictionary of tensors")
    return state
