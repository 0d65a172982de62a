"""What the commands are given, checked before anything is written: checkpoints, devices, dtypes, memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from uniflow.cli.printing import notice
from uniflow.hub import local_folder
from uniflow.model import UniFlow
from uniflow.reading import shown
from uniflow.recomputation import memory_of


class _Model(Protocol):
    """UniFlow, UniFluid, an encoder."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


M = TypeVar("M", bound=_Model)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LONGEST_MESSAGE = 600


class InputError(Exception):
    """Bad input; the message is the one line that the user sees."""


@contextmanager
def explained() -> Iterator[None]:
    """Turn the errors that a library raises for bad values into the line that the user sees."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        path = getattr(error, "filename", None)
        message = f"no such file: {path}" if path else str(error)
        if len(message) > _LONGEST_MESSAGE:  # a checkpoint of another model may name hundreds of keys
            message = message[:_LONGEST_MESSAGE] + " ..."
        raise InputError(message) from None


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device: {name} is not available here; torch sees no GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device: {name} is not available here; there are {torch.cuda.device_count()} GPUs")
    return device


def choose_dtype(name: str) -> torch.dtype | None:
    """The dtype called `name`; None for "auto", that of the file."""
    if name != "auto" and name not in DTYPES:
        raise InputError(f"--dtype: expected auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES.get(name)


@dataclass(frozen=True)
class Named:
    """The folder, or repository on the Hub, that the user names, and which model in it if there are several."""

    folder: Path
    weights: str | None = None


def load_model(checkpoint: Named, device: str, dtype: str, precision: str | None = None) -> UniFlow:
    """Read a UniFlow; the dtype "auto" is that of the file."""
    read = partial(UniFlow.from_pretrained, precision=precision)
    return load_checkpoint(read, checkpoint, device, dtype)


def load_checkpoint(read: Callable[..., M], checkpoint: Named, device: str, dtype: str) -> M:
    """Read a model of any kind by its `from_pretrained`; the dtype "auto" is that of the file.

    Where that is float32 on a GPU, what it costs is said.
    """
    own = choose_dtype(dtype)
    chosen = choose_device(device)
    with explained():
        folder = local_folder(checkpoint.folder)
    if not folder.is_dir():
        found = f"{folder} is a file, expected a checkpoint folder"
        raise InputError(found if folder.exists() else f"no such checkpoint folder: {folder}")
    with explained():
        model = read(folder, chosen, own, weights=checkpoint.weights)
    if own is None and model.device.type == "cuda" and model.dtype == torch.float32:
        notice(
            "computes in float32, as the checkpoint is: --dtype bfloat16 takes half the memory and lets a GPU multiply "
            "on its tensor cores, at bfloat16's precision; --dtype float32 keeps this line away"
        )
    return model


def check_finite(name: str, value: float) -> None:
    """Refuse NaN and infinity."""
    if not math.isfinite(value):
        raise InputError(f"{name}: expected a finite number, got {value}")


def check_text(name: str, text: str) -> None:
    """Refuse a text that is empty or, as of bytes that are no UTF-8, no text at all."""
    if not text.strip() or re.search("[\ud800-\udfff]", text):
        raise InputError(f"{name}: expected a text, not empty and in UTF-8, got {shown(text)}")


def parse_memory(text: str | None) -> int | None:
    """Bytes of "2GB", "500 MB" or "1.5e9"; None for None."""
    if text is None:
        return None
    with suppress(ValueError):
        if isinstance(memory := memory_of(text), int):
            return memory
    raise InputError(f"--max-memory: expected a number of bytes as in 2GB or 500MB, got {text!r}")
