"""Encoding and decoding as programs of torch.export and as ONNX, for every batch and size.

Noise is an input, since a program draws none: of the shape of the pictures, which says their size too.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from uniflow.atomic import replacing
from uniflow.model import UniFlow
from uniflow_kernels import backend, patchify

_LARGEST = 1 << 10  # batches, and lines and columns of patches
_OPSET = 20


class Encoding(nn.Module):
    """`model.encode` as a module: images [B, C, H, W], normalised, to latents [B, N, latent_ch]."""

    def __init__(self, model: UniFlow) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, latent_ch]."""
        return self.model.encode(images)


class Decoding(nn.Module):
    """`model.decode` as a module: latents [B, N, latent_ch] and noise [B, C, H, W] to images [B, C, H, W], normalised.

    Args:
        model: whose decoder it is.
        sampling: what `UniFlow.decode` takes beside noise and size: steps, schedule, solver, cfg, cfg_interval.
    """

    def __init__(self, model: UniFlow, **sampling: Any) -> None:
        super().__init__()
        self.model = model
        self.sampling = sampling

    def forward(self, latents: Tensor, noise: Tensor) -> Tensor:
        """[B, N, latent_ch] and standard normal numbers [B, C, H, W] -> [B, C, H, W]."""
        rows = patchify(noise, self.model.config.patch_size)
        return self.model.decode(latents, noise=rows, size=(noise.shape[2], noise.shape[3]), **self.sampling)


def export_programs(model: UniFlow, **sampling: Any) -> dict[str, ExportedProgram]:
    """The programs "encoder" and "decoder" of a tokenizer, for batches up to 1024 and sides of 2 to 1024 patches.

    Args:
        model: in evaluation mode, with an encoder that takes any size; on the CPU.
        sampling: see `Decoding`; one step if nothing else is said.

    Raises:
        ValueError: for a model in training mode or a lower precision, or settings that `UniFlow.decode` does not have.
    """
    if model.training:
        raise ValueError("model: expected it in evaluation mode, as model.eval() makes it")
    if model.precision is not None:
        raise ValueError(f"model: expected it in full precision, as other runtimes have it, got {model.precision}")
    config, dtype = model.config, model.dtype
    batch, patch = Dim("batch", max=_LARGEST), config.patch_size
    sides = {2: patch * Dim("lines", min=2, max=_LARGEST), 3: patch * Dim("columns", min=2, max=_LARGEST)}
    # sizes that are not equal to each other or to the trained one: what is equal once is taken to be so for ever
    lines = config.image_size // patch + 1
    images = torch.zeros(2, config.num_channels, lines * patch, (lines + 1) * patch, dtype=dtype)
    latents = torch.zeros(2, lines * (lines + 1), config.latent_ch, dtype=dtype)
    decoding = Decoding(model, **{"steps": 1, **sampling}).eval()
    with torch.no_grad(), backend("eager"), _quiet():
        return {
            "encoder": torch.export.export(Encoding(model).eval(), (images,), dynamic_shapes=({0: batch, **sides},)),
            "decoder": torch.export.export(
                decoding, (latents, images), dynamic_shapes=({0: batch, 1: Dim.AUTO}, {0: batch, **sides})
            ),
        }


def write_programs(programs: Mapping[str, ExportedProgram], folder: str | Path) -> list[Path]:
    """Write NAME.pt2 for each program, for `torch.export.load`; the folder is made if need be."""

    def write(name: str, path: Path) -> None:
        torch.export.save(programs[name], path)

    return [_written(Path(folder) / f"{name}.pt2", name, write) for name in programs]


def write_onnx(programs: Mapping[str, ExportedProgram], folder: str | Path) -> list[Path]:
    """Write NAME.onnx for each program; inputs are called images, latents and noise, and so are outputs.

    Raises:
        ImportError: if onnxscript is not installed.
    """
    if find_spec("onnxscript") is None:  # torch.onnx needs it, and says so at length
        raise ImportError("ONNX needs onnxscript: pip install 'uniflow-kernels[onnx]'")
    names = {"encoder": (["images"], ["latents"]), "decoder": (["latents", "noise"], ["images"])}

    def write(name: str, path: Path) -> None:
        inputs, outputs = names[name]
        with _quiet():
            made = torch.onnx.export(
                programs[name],
                (),
                dynamo=True,
                opset_version=_OPSET,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
            )
            assert made is not None
            made.save(path)

    return [_written(Path(folder) / f"{name}.onnx", name, write) for name in programs]


def _written(path: Path, name: str, write: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        write(name, temporary)
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of their own insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
