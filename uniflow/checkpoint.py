"""Checkpoint folders: safetensors, whole or in shards, or a pickle read without executing it; the models in them."""

from __future__ import annotations

import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from uniflow.atomic import replacing
from uniflow.reading import check_file, check_folder, printable, read_json, shown

M = TypeVar("M", bound=nn.Module)

WHOLE = "model.safetensors"

# what torch.compile, FSDP and checkpoint_wrapper put into the keys of a module
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NAMED = 4  # keys of each kind in an error, which is one line
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPES = (*_FLOATS, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool)
# what a model may have beyond the tensors of its file: masks, tables of positions, what is tied
_PARTS_A_TENSOR, _SPARE_PARTS = 8, 1 << 10
_TIMES_THE_FILE, _SPARE_NUMBERS = 4, 1 << 24


def as_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None = None) -> torch.dtype | None:
    """A dtype for weights, also by its name; None, and "auto", are that of the file.

    Raises:
        ValueError: if both are given, or it is none for weights.
    """
    if dtype is not None and torch_dtype is not None:
        raise ValueError("torch_dtype: expected nothing beside dtype, which is the same")
    given = torch_dtype if dtype is None else dtype
    names = {str(known).removeprefix("torch."): known for known in _FLOATS}
    found = names.get(given.removeprefix("torch."), given) if isinstance(given, str) else given
    if found is None or found == "auto":
        return None
    if found not in _FLOATS:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {shown(given)}")
    return found


class CheckpointError(ValueError):
    """A checkpoint that does not hold this model, or a damaged file."""


class NotFiniteWarning(UserWarning):
    """Weights that hold NaN or infinity, as after training that diverged. The command takes it for an error."""


def read_state(
    folder: str | Path, name: str | None = None, mark: str | None = None, weights: str | None = None, usual: str = ""
) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, or of one model in it, on the CPU, in the dtype of the file.

    Args:
        folder: with NAME.safetensors, its shards and NAME.safetensors.index.json, or NAME.bin, whole or likewise.
        name: of the files; if not given they are model.safetensors or pytorch_model.bin.
        mark: of a model, see `chosen_weights`; without one the file holds a model's tensors and nothing else.
        weights, usual: see `chosen_weights`.

    Raises:
        FileNotFoundError: if there is no such folder, no weights in it, or a shard that the index names is not there.
        NotADirectoryError: if it is a file.
        CheckpointError: if a file is damaged, or holds anything but dense tensors; as of `chosen_weights`.

    Warns:
        NotFiniteWarning: naming the tensors that hold NaN or infinity.
        UserWarning: as of `chosen_weights`.
    """
    folder = check_folder(folder)
    wholes = {f"{name or 'model'}.safetensors": _read_safetensors, f"{name or 'pytorch_model'}.bin": _read_pickle}
    for file, read in wholes.items():
        path = folder / file
        if path.exists():
            found = read(path)
            break
        if (path := folder / f"{file}.index.json").exists():
            found = _read_shards(path, read)
            break
    else:
        raise FileNotFoundError(f"no weights in {folder}: expected {' or '.join(wholes)}, or shards of it and an index")
    state = _checked(found if mark is None else chosen_weights(found, mark, path, weights, usual), path)
    warn_of_not_finite(state, folder)
    return state


def chosen_weights(
    values: Mapping[str, Any], mark: str, source: object, weights: str | None = None, usual: str = ""
) -> Mapping[str, Any]:
    """The tensors of one model, by its own names, in what a checkpoint holds.

    What torch.compile, DDP, FSDP and checkpointing put into the keys of a module is taken out, and dictionaries in
    dictionaries are opened. Where a key then has the mark behind a prefix ("module.", "model_ema."), all keys with this
    prefix are those of a model.

    Args:
        values: what the file holds, or a state_dict; returned as it is if it is one by the model's names, or if the
            mark is nowhere.
        mark: how a key begins that each such model has, as in "chal_proj.c_fc.weight".
        source: what errors and warnings call it.
        weights: which model, by its prefix or a word of that, as in "ema" for "model_ema", where there are several.
        usual: a prefix of which nothing needs to be said.

    Raises:
        CheckpointError: if there are several models and none is chosen, or not the one that is; they are listed.

    Warns:
        UserWarning: what was taken off or opened, if it was not chosen.
    """
    flat = _flattened(values)
    plain = {_WRAPPERS.sub("", name): value for name, value in flat.items()}
    if len(plain) < len(flat):
        raise CheckpointError(f"{source} holds tensors twice, under keys that differ in what torch puts into them")
    ends = {name: f".{name}".find(f".{mark}") for name in plain}
    prefixes = list(dict.fromkeys(name[:end] for name, end in ends.items() if end >= 0))
    known = {prefix.removesuffix("."): prefix for prefix in prefixes}
    named = [name for name in known if weights in (name, *re.split(r"[._]", name))]
    if weights in known:
        named = [weights]
    if weights is not None and len(named) != 1:
        raise CheckpointError(f"{source} holds no one model called {shown(weights)}; it holds {_models(known)}")
    if len(known) > 1 and weights is None:
        raise CheckpointError(f"{source} holds several models, {_models(known)}; choose one of them as weights")
    prefix = known[named[0]] if named else next(iter(prefixes), "")
    if prefix == "" and plain.keys() == values.keys() and len(known) < 2:
        return values
    others = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
    chosen = {
        name.removeprefix(prefix): value
        for name, value in plain.items()
        if name.startswith(prefix) and not (others and name.startswith(others))
    }
    if weights is None and prefix not in ("", usual):
        warnings.warn(
            f"{source} holds the model under {shown(prefix)}, which is taken off its keys; "
            f"{len(plain) - len(chosen)} other entries are left",
            stacklevel=3,
        )
    elif weights is None and plain.keys() != flat.keys():
        warnings.warn(f"{source}: what torch.compile and its like put into keys is taken out of them", stacklevel=3)
    return chosen


def _models(known: Iterable[str]) -> str:
    return ", ".join(shown(name) if name else "one whose keys have no prefix" for name in known) or "none"


def _flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    """With the entries of dictionaries in dictionaries, by the names of both; each is opened once, wherever it is."""
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Mapping[str, Any]]] = [("", values)]
    opened = {id(values)}
    while waiting:
        prefix, part = waiting.pop(0)
        for name, value in part.items():
            if isinstance(value, dict) and all(isinstance(key, str) for key in value):
                if id(value) not in opened:
                    opened.add(id(value))
                    waiting.append((f"{prefix}{name}.", value))
            else:
                found[f"{prefix}{name}"] = value
    return found


def warn_of_not_finite(state: Mapping[str, Tensor], source: object) -> None:
    """Warn of NaN and infinity; least and largest value are the quickest way there is to find them."""
    found = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.detach().aminmax()).isfinite().all()
    ]
    if found:
        warnings.warn(
            f"{source} holds weights that are not finite, as after training that diverged; keys ({len(found)}): "
            f"{listed(found)}",
            NotFiniteWarning,
            stacklevel=3,
        )


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


def outline(build: Callable[[], M], state: Mapping[str, Tensor], source: str) -> M:
    """What `build` makes on the meta device, if tensors like those of `state` can be all that it holds.

    A configuration may say anything. Building ends as soon as there are many more modules and parameters than tensors,
    and what was built may have only so many numbers more than they.

    Raises:
        CheckpointError: if it is larger than that.
    """
    parts = _PARTS_A_TENSOR * len(state) + _SPARE_PARTS
    with torch.device("meta"), _at_most(parts, source):
        model = build()
    numbers = sum(tensor.numel() for tensors in (model.parameters(), model.buffers()) for tensor in tensors)
    held = sum(tensor.numel() for tensor in state.values())
    if numbers > _TIMES_THE_FILE * held + _SPARE_NUMBERS:
        raise CheckpointError(
            f"{source} does not hold this model: its config.json is of one of {numbers} numbers, its weights are {held}"
        )
    return model


def assign_state(model: nn.Module, state: Mapping[str, Tensor], source: str, dtype: torch.dtype | None = None) -> None:
    """Make the tensors of `state` the model's parameters, after checking all of them.

    Args:
        model: on any device, the meta device too.
        state: by the model's names.
        source: what errors call it.
        dtype: that the model will be brought to; without one its parameters are all of the same.

    Raises:
        CheckpointError: with the number of missing, unexpected, misshapen and mistyped keys, and the first of each.
    """
    own = model.state_dict()
    check_keys(own, state, source)
    parameters = {name for name, _ in model.named_parameters()}
    dtypes = {found.dtype: name for name, found in state.items() if name in parameters}
    if dtype is None and len(dtypes) > 1:
        found = ", ".join(f"{str(kind).removeprefix('torch.')} ({name})" for kind, name in dtypes.items())
        raise CheckpointError(f"{source} holds weights of several dtypes, {found}; choose one dtype for all")
    model.load_state_dict(state, assign=True)


def check_keys(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Compare the tensors of a file with those of a model; errors as of `assign_state`."""
    both = [(name, tensor, state[name]) for name, tensor in own.items() if name in state]
    refuse_keys(
        source,
        {
            "missing": [name for name in own if name not in state],
            "unexpected": [name for name in state if name not in own],
            "of another shape": [
                f"{printable(name)} ({list(found.shape)}, expected {list(tensor.shape)})"
                for name, tensor, found in both
                if found.shape != tensor.shape
            ],
            "of another dtype": [
                f"{printable(name)} ({found.dtype}, expected {tensor.dtype})"
                for name, tensor, found in both
                if found.is_floating_point() != tensor.is_floating_point()
            ],
        },
    )


def refuse_keys(source: object, wrong: Mapping[str, Iterable[str]]) -> None:
    """Raise a CheckpointError if there are keys of any kind that is wrong, as in {"missing": ["a", "b"]}."""
    kinds = {kind: list(names) for kind, names in wrong.items()}
    found = [f"{kind} ({len(names)}): {listed(names)}" for kind, names in kinds.items() if names]
    if found:
        raise CheckpointError(f"{source} does not hold this model; keys {'; '.join(found)}")


def listed(names: Iterable[str]) -> str:
    """The first of many names of a file, for one line."""
    names = list(names)
    return ", ".join(map(printable, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")


def load_pickle(path: Path) -> Any:
    """What a file of `torch.save` holds, on the CPU; nothing in it is executed.

    Raises:
        CheckpointError: if it is damaged, or naming what it holds beside tensors and plain values.
    """
    _check_file(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise zipfile.BadZipFile("its parts are compressed, which torch.save never does")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the unpickler may not know the protocol; it then raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler met
        text = str(error)
        forbidden = re.search(r"GLOBAL ([\w.]+)", text)
        if forbidden:
            reason = f"it asks for {forbidden[1]}, and none of it was executed"
        elif "weights_only" in text:  # whose first line advises to execute it all the same
            reason = "none of it was executed"
        else:
            reason = text.partition("\n")[0]
        raise CheckpointError(f"{path} is damaged or holds more than tensors: {reason}") from None


@contextmanager
def _at_most(parts: int, source: str) -> Iterator[None]:
    """End what this thread builds here with more than so many modules and parameters."""
    thread, count = threading.get_ident(), 0

    def count_up(*_: object) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > parts:
            raise CheckpointError(f"{source} does not hold this model: its config.json is of a much larger one")

    hooks = [
        register_module_module_registration_hook(count_up),
        register_module_parameter_registration_hook(count_up),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_file(path: Path) -> None:
    try:
        check_file(path)
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _read_safetensors(path: Path) -> dict[str, Any]:
    _check_file(path)
    try:
        state = load_file(path)
    except Exception as error:  # of a dtype that torch has not, the reader raises what Python says to it
        raise CheckpointError(f"{path} is damaged: {error}") from None
    return state


def _read_shards(index: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        places = read_json(index).get("weight_map")
    except ValueError as error:
        raise CheckpointError(f"{index} is no index of shards: {error}") from None
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f"{index} is no index of shards: expected a weight_map from keys to files")
    state: dict[str, Any] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names a file outside the folder: {shown(shard)}")
        if not (index.parent / shard).exists():
            raise FileNotFoundError(f"{index} names {printable(shard)}, which is not there")
        state.update(read(index.parent / shard))
    # a key that the index names but no shard holds is found as a missing key of the model
    return state


def _read_pickle(path: Path) -> dict[str, Any]:
    values = load_pickle(path)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise CheckpointError(f"{path}: expected a dictionary of tensors")
    return values


def _checked(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: expected a dictionary of tensors, got {printable(name)}: {shown(tensor)}")
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        # a pickle may spread one number over any shape
        if not dense or tensor.nbytes > tensor.untyped_storage().nbytes() or tensor.dtype not in _DTYPES:
            kind = f"{tensor.layout}, {tensor.dtype}, on {tensor.device}".replace("torch.", "")
            raise CheckpointError(f"{path}: {printable(name)}: expected a dense tensor of numbers, got {kind}")
    return dict(state)
