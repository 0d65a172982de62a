"""Checkpoint folders of a run: whole or not there, kept by count, and checked before they are read.

What stands in one is the business of `uniflow.training.state`; manifest.json holds the SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uniflow import reading
from uniflow.checkpoint import CheckpointError, load_pickle
from uniflow.training.processes import Processes

MANIFEST = "manifest.json"
_PREFIX = "step-"
_REST = ".*.tmp*"  # how what is being written is called, and what a run leaves that is killed then


class Checkpoints:
    """The checkpoints in `folder`, of which the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int, processes: Processes) -> None:
        self.folder = folder
        self.keep = keep
        self.processes = processes

    def path(self, step: int) -> Path:
        """Of the checkpoint of a step."""
        return self.folder / f"{_PREFIX}{step:08}"

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder for all processes to write to, which becomes the checkpoint of `step` if the block ends well."""
        with replacing_folder(self.path(step), self.processes) as temporary:
            yield temporary
        if self.processes.first:
            for old in newest_first(self.folder)[self.keep :]:
                shutil.rmtree(old)


@contextmanager
def replacing_folder(final: Path, processes: Processes) -> Iterator[Path]:
    """Give all processes a folder beside `final`; it is written to the disk and renamed when all are done."""
    # a name that no other run has, even one that writes the same step
    token = processes.from_first(lambda: secrets.token_hex(4))
    temporary = final.with_name(f".{final.name}.{token}.tmp")
    if processes.first:
        temporary.mkdir(parents=True)
    processes.wait()
    try:
        yield temporary
        processes.wait()
        if processes.first:
            write_json(
                temporary / MANIFEST, {str(path.relative_to(temporary)): _digest(path) for path in _files(temporary)}
            )
            for path in [*_files(temporary), *_folders(temporary)]:
                _flush(path)
            if final.exists():  # the same step again, after a damaged one was passed over
                shutil.rmtree(final)
            os.rename(temporary, final)
            _flush(final.parent)
    finally:
        if processes.first:
            shutil.rmtree(temporary, ignore_errors=True)
    processes.wait()


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, unchecked."""
    found = [(step_of(path), path) for path in folder.glob(f"{_PREFIX}*") if path.is_dir()]
    return [path for _, path in sorted(((step, path) for step, path in found if step is not None), reverse=True)]


def step_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint is called after, None if it is called otherwise."""
    name = re.fullmatch(rf"{_PREFIX}([0-9]+)", checkpoint.name)
    return int(name[1]) if name else None


def rests(out: Path) -> list[Path]:
    """What runs that were killed while they wrote have left in their folder, if none is writing to it now."""
    return [path for part in ("", "checkpoints", "samples") for path in (out / part).glob(_REST)]


def check(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointError: naming what is damaged or missing.
    """
    for name, digest in read_json(folder / MANIFEST).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing")
        if _digest(path) != digest:
            raise CheckpointError(f"{folder} is damaged: {name} is not as it was written")


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in a folder that is whole, if there is one, and what is wrong with newer ones."""
    wrong = []
    for checkpoint in newest_first(folder):
        try:
            check(checkpoint)
        except CheckpointError as error:
            wrong.append(str(error))
        else:
            return checkpoint, wrong
    return None, wrong


def write_tensors(path: Path, values: Mapping[str, Any]) -> None:
    """torch.save, with an OSError where it cannot write."""
    try:
        torch.save(dict(values), path)
    except RuntimeError as error:  # how the writer reports a full disk
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from None


def read_tensors(path: Path) -> dict[str, Any]:
    """What `write_tensors` wrote, on the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: if the file cannot be read or holds anything else.
    """
    _check_regular(path)
    values = load_pickle(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a dictionary, got a {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Indented, as people read it."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        CheckpointError: if the file cannot be read or holds anything else.
    """
    _check_regular(path)
    try:
        return reading.read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from None


def _check_regular(path: Path) -> None:
    if not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{path.parent} is no checkpoint of a training run: no file {path.name}")


def random_states() -> dict[str, Any]:
    """Of Python's, NumPy's and torch's generators."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002 - whatever draws from it shall go on as it was
    assert isinstance(numpy, dict)
    return {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Go on where `random_states` was taken; GPUs that were not there then keep theirs."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _folders(folder: Path) -> list[Path]:
    return [folder, *(path for path in folder.rglob("*") if path.is_dir())]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
