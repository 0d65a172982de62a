"""Latents on disk: one safetensors file that says which model they are of and what pictures they were."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from uniflow.atomic import replacing
from uniflow.model import UniFlow
from uniflow_kernels.ops.patches import patch_grid

_FORMAT = "uniflow-latents-1"
# fields that change what a sampler does by default or how training went, not what a latent means
_NOT_OF_THE_LATENT = ("num_sampling_steps", "use_flash_attn", "dropout", "attention_dropout", "drop_path_rate", "extra")


class LatentsError(ValueError):
    """A file that holds no latents, or those of another model."""


@dataclass(frozen=True)
class EncodedPicture:
    """What a latent was: the file name to decode it to (with folders, if there were any) and its size in pixels."""

    name: str
    height: int
    width: int


def write_latents(path: Path, latents: Sequence[Tensor], pictures: Sequence[EncodedPicture], model: UniFlow) -> None:
    """Write latents [N, latent_ch], one a picture, with the model's config and fingerprint."""
    tensors = {f"latents.{i}": latent.cpu().contiguous() for i, latent in enumerate(latents)}
    metadata = {
        "format": _FORMAT,
        "config": json.dumps(_meaning(model)),
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
        LatentsError: if it is no file of latents, damaged, or of another model (saying in what they differ).
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise LatentsError(f"{path} holds no UniFlow latents (format {_FORMAT})")
            _check_model(path, metadata, model)
            pictures = [EncodedPicture(**picture) for picture in json.loads(metadata["pictures"])]
            for picture in pictures:
                if Path(picture.name).is_absolute() or ".." in Path(picture.name).parts:
                    raise LatentsError(f"{path} names a picture outside the output folder: {picture.name}")
            latents = [file.get_tensor(f"latents.{i}") for i in range(len(pictures))]
            for latent, picture in zip(latents, pictures, strict=True):
                _check_size(path, latent, picture, model)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise LatentsError(f"{path} is damaged or holds no latents: {error}") from None
    return latents, pictures


def _check_size(path: Path, latent: Tensor, picture: EncodedPicture, model: UniFlow) -> None:
    try:
        patch_grid(latent.shape[0], model.config.patch_size, (picture.height, picture.width))
    except (ValueError, TypeError) as error:
        raise LatentsError(f"{path} is damaged: {picture.name}: {error}") from None
    if latent.ndim != 2 or latent.shape[1] != model.config.latent_ch or not latent.is_floating_point():
        raise LatentsError(f"{path} is damaged: {picture.name} has latents {latent.dtype} {list(latent.shape)}")


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


def _meaning(model: UniFlow) -> dict[str, object]:
    return {name: value for name, value in asdict(model.config).items() if name not in _NOT_OF_THE_LATENT}


def _check_model(path: Path, metadata: dict[str, str], model: UniFlow) -> None:
    theirs, ours = json.loads(metadata["config"]), _meaning(model)
    differing = [
        f"{name} {theirs.get(name)!r} not {value!r}" for name, value in ours.items() if theirs.get(name) != value
    ]
    if differing:
        raise LatentsError(f"{path} was written by another model: {', '.join(differing)}")
    if metadata["fingerprint"] != fingerprint(model):
        raise LatentsError(f"{path} was written by a model of the same shape with other weights")
