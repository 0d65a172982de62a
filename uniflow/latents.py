"""Latents on disk: one safetensors file that says which model they are of and what pictures they were."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from uniflow.atomic import replacing
from uniflow.model import UniFlow
from uniflow.reading import check_file, parse_json, shown
from uniflow_kernels.ops.patches import patch_grid

_FORMAT = "uniflow-latents-1"
# fields that change what a sampler does by default or how training went, not what a latent means
_NOT_OF_THE_LATENT = (
    *("num_sampling_steps", "use_flash_attn", "dropout", "attention_dropout", "drop_path_rate", "latent_noise"),
    "extra",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LatentsError(ValueError):
    """A file that holds no latents, or those of another model."""


@dataclass(frozen=True)
class EncodedPicture:
    """What a latent was: the file name to decode it to (with folders, if there were any) and its size in pixels."""

    name: str
    height: int
    width: int


def write_latents(path: Path, latents: Sequence[Tensor], pictures: Sequence[EncodedPicture], model: UniFlow) -> None:
    """Write latents [N, latent_ch], one a picture, with the model's config and fingerprint.

    Raises:
        ValueError: for what `read_latents` would refuse: two pictures of one name, latents that do not fit.
    """
    if len(latents) != len(pictures):
        raise ValueError(f"latents: expected one a picture, got {len(latents)} for {len(pictures)}")
    _check_names(pictures)
    _check_latents(latents, pictures, model)
    # the writer refuses tensors that share memory
    copies = [latent.cpu().clone(memory_format=torch.contiguous_format) for latent in latents]
    tensors = {f"latents.{i}": latent for i, latent in enumerate(copies)}
    metadata = {
        "format": _FORMAT,
        "config": json.dumps(meaning(model)),
        "fingerprint": fingerprint(model),
        "pictures": json.dumps([asdict(picture) for picture in pictures]),
    }
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # how the writer reports a full disk
            raise OSError(f"cannot write {path}: {error}") from None


def read_latents(path: Path, model: UniFlow) -> tuple[list[Tensor], list[EncodedPicture]]:
    """Read what `write_latents` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        LatentsError: if it is no file of latents, damaged, or of another model (saying in what they differ); if a name
            leads out of a folder, or two are the same.
    """
    try:
        check_file(path)
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise LatentsError(str(error)) from None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise LatentsError(f"{path} holds no UniFlow latents (format {_FORMAT})")
            check_tokenizer(path, parse_json(metadata["config"], "config"), metadata["fingerprint"], model)
            pictures = [EncodedPicture(**picture) for picture in parse_json(metadata["pictures"], "pictures")]
            _check_names(pictures)
            latents = [file.get_tensor(f"latents.{i}") for i in range(len(pictures))]
        _check_latents(latents, pictures, model)
    except LatentsError:
        raise
    except Exception as error:  # the reader and torch raise whatever a forged header makes them meet
        raise LatentsError(f"{path} is damaged or holds no latents: {error}") from None
    return latents, pictures


def _check_names(pictures: Sequence[EncodedPicture]) -> None:
    names = [_parts(picture.name) for picture in pictures]
    folders = {parts[:depth] for parts in names for depth in range(1, len(parts))}
    taken: set[tuple[str, ...]] = set()
    for parts, picture in zip(names, pictures, strict=True):
        if parts in taken or parts in folders:
            other = "another picture" if parts in taken else "a folder of another"
            raise ValueError(f"a picture has the name of {other}: {shown(picture.name)}")
        taken.add(parts)


def _check_latents(latents: Sequence[Tensor], pictures: Sequence[EncodedPicture], model: UniFlow) -> None:
    for latent, picture in zip(latents, pictures, strict=True):
        try:
            _check_latent(latent, (picture.height, picture.width), model)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{shown(picture.name)}: {error}") from None


def _parts(name: str) -> tuple[str, ...]:
    """The folders and the file of a name, which must lead to a place below any folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"expected the name of a picture, got {shown(name)}")
    os.fsencode(name)  # raises a ValueError for what no system can write
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.name or name.endswith("/"):
        raise ValueError(f"a picture's name leads outside the output folder, or to no file: {shown(name)}")
    return path.parts


def _check_latent(latent: Tensor, size: tuple[int, int], model: UniFlow) -> None:
    if any(type(side) is not int for side in size):
        raise TypeError(f"size: expected two integers, got {shown(size)}")
    if latent.ndim != 2 or latent.shape[1] != model.config.latent_ch or latent.dtype not in _DTYPES:
        raise ValueError(f"expected latents [N, {model.config.latent_ch}], got {latent.dtype} {list(latent.shape)}")
    patch_grid(latent.shape[0], model.config.patch_size, size)
    if not latent.isfinite().all():
        raise ValueError("its latents hold NaN or infinity")


def fingerprint(model: UniFlow) -> str:
    """A hash of the weights around the latent: it differs between models of the same shape, not between devices."""
    return hash_weights(model.chal_proj, model.chal_unproj)


def hash_weights(*modules: nn.Module) -> str:
    """A hash of the modules' parameters, the same on every device and after bringing them to bfloat16."""
    digest = hashlib.sha256()
    for module in modules:
        for parameter in module.parameters():
            rounded = parameter.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(rounded.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def meaning(model: UniFlow) -> dict[str, Any]:
    """What a model's config says of the latents that it makes."""
    return {name: value for name, value in asdict(model.config).items() if name not in _NOT_OF_THE_LATENT}


def check_tokenizer(path: Path, theirs: dict[str, Any], its_fingerprint: str, model: UniFlow) -> None:
    """Refuse latents of another model than this one.

    Args:
        path: of the latents, for the message.
        theirs: `meaning` of the model that made them.
        its_fingerprint: that one's.

    Raises:
        LatentsError: saying in what they differ.
    """
    if reason := why_not_of(theirs, its_fingerprint, model):
        raise LatentsError(f"{path} was written by another model: {reason}")


def why_not_of(theirs: dict[str, Any], its_fingerprint: str, model: UniFlow) -> str | None:
    """In what a model differs from the one that made latents, arguments as of `check_tokenizer`; None in nothing."""
    differing = [
        f"{name} {shown(theirs.get(name))} not {shown(value)}"
        for name, value in meaning(model).items()
        if theirs.get(name) != value
    ]
    if differing:
        return ", ".join(differing)
    return None if its_fingerprint == fingerprint(model) else "one of the same shape with other weights"
