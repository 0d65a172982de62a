"""Networks that judge pictures, from files that the user gives: features of pictures, and distances of pairs (LPIPS).

A program of TorchScript or torch.export runs as it is written in its file: take one from where you would take code.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniflow.reading import check_file

Program = Callable[..., Any]

_WEIGHTS, _EXPORTED = ".pth", ".pt2"


class FeatureNetwork:
    """Features of pictures, and where the network has them the probabilities of classes.

    Args:
        file: by its suffix, *.pt2 a program of torch.export and *.pth the weights of torch-fidelity's Inception network
            (pt_inception-2015-12-05-6726825d.pth, which pytorch-fid uses too); else a program of TorchScript. A program
            takes pictures, uint8 [B, 3, H, W] for any B, and gives features [B, D], or a pair of features and
            probabilities [B, classes]. One with an argument `return_features`, as StyleGAN's inception-2015-12-05.pt,
            is called with it for features, and with `no_output_bias` for probabilities.
        device: where it runs.

    Raises:
        FileNotFoundError: if there is no such file.
        ModuleNotFoundError: if weights are given and torch-fidelity is not installed.
        ValueError: if the file is no such program, or no such weights.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        check_file(file)
        self.file, self.device = file, device
        self._network: Program
        self._arguments: tuple[str, ...]
        if file.suffix == _WEIGHTS:
            self._network, self._arguments = _inception(file, device), ()
        else:
            self._network, self._arguments = _program(file, device)

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        with self.file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __call__(self, pictures: Tensor) -> Tensor:
        """Features, float32 [B, D] on the network's device, of pictures uint8 [B, 3, H, W].

        Raises:
            ValueError: if the network fails, or gives something else.
        """
        return self._checked(pictures, self._called(pictures, return_features=True), "features")

    def with_probabilities(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features [B, D] and probabilities of classes [B, classes], or None, float32, of pictures uint8 [B, 3, H, W].

        Raises:
            ValueError: as when it is called.
        """
        given = self._called(pictures, return_features=True)
        if "no_output_bias" in self._arguments:
            likely = self._called(pictures, no_output_bias=True)
        else:
            likely = given[1] if isinstance(given, list | tuple) and len(given) == 2 else None
        if likely is not None:
            likely = self._checked(pictures, likely, "probabilities")
            if likely.min() < 0 or (likely.sum(1) - 1).abs().max() > 1e-2:
                raise ValueError(f"{self.file}: expected probabilities of classes, which are not negative and sum to 1")
        return self._checked(pictures, given, "features"), likely

    def _called(self, pictures: Tensor, **options: bool) -> Any:
        options = {name: value for name, value in options.items() if name in self._arguments}
        return _run(self.file, self._network, pictures.to(self.device), **options)

    def _checked(self, pictures: Tensor, given: Any, what: str) -> Tensor:
        first = given[0] if isinstance(given, list | tuple) and given else given
        if not isinstance(first, Tensor) or first.ndim != 2 or len(first) != len(pictures):
            found = list(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise ValueError(f"{self.file}: expected {what} [{len(pictures)}, D] of the network, got {found}")
        if not first.isfinite().all():
            raise ValueError(f"{self.file}: {what}: expected finite numbers, got NaN or infinity")
        return first.float()


class PerceptualDistance:
    """LPIPS of pairs of pictures, by a network in a file.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018).

    Args:
        file: by its suffix, *.pt2 a program of torch.export; else one of TorchScript. It takes two batches of pictures,
            float32 [B, 3, H, W] in [-1, 1], and gives their distances, [B] or [B, 1, 1, 1], as the modules of the lpips
            package do. One with an argument `return_lpips`, as StyleGAN's vgg16.pt, takes one batch in [0, 255] and
            gives values [B, n] whose squared differences sum to the distance.
        device: where it runs.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no such program.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        check_file(file)
        self.file, self.device = file, device
        self._network, self._arguments = _program(file, device)

    def __call__(self, one: Tensor, other: Tensor) -> Tensor:
        """Distances, float32 [B] on the network's device, of pictures uint8 [B, 3, H, W].

        Raises:
            ValueError: if the network fails, or gives something else.
        """
        one, other = one.to(self.device), other.to(self.device)
        if "return_lpips" in self._arguments:
            known = {"return_lpips": True, "resize_images": False}
            options = {name: value for name, value in known.items() if name in self._arguments}
            first, second = (_run(self.file, self._network, pictures, **options) for pictures in (one, other))
            distances = (first - second).float().square().sum(1)
        else:
            distances = _run(self.file, self._network, one.float() / 127.5 - 1, other.float() / 127.5 - 1)
        if not isinstance(distances, Tensor) or distances.numel() != len(one):
            found = list(distances.shape) if isinstance(distances, Tensor) else type(distances).__name__
            raise ValueError(f"{self.file}: expected distances [{len(one)}] of the network, got {found}")
        return distances.float().reshape(len(one))


def _program(file: Path, device: torch.device) -> tuple[Program, tuple[str, ...]]:
    """A program and, of TorchScript, the names of its arguments."""
    if file.suffix == _EXPORTED:
        from torch.export.passes import move_to_device_pass

        try:
            return move_to_device_pass(torch.export.load(file), device).module(), ()
        except Exception as error:  # of whatever kind: it may be any file
            raise ValueError(f"{file}: expected a program of torch.export ({_first_line(error)})") from None
    try:
        with warnings.catch_warnings():  # torch writes no such programs any more, but these are the field's
            warnings.simplefilter("ignore", DeprecationWarning)
            script = torch.jit.load(file, map_location=device).eval()
        return script, tuple(argument.name for argument in script.forward.schema.arguments)
    except Exception as error:
        raise ValueError(f"{file}: expected a program of TorchScript ({_first_line(error)})") from None


def _inception(file: Path, device: torch.device) -> Program:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{file}: weights need torch-fidelity: pip install 'uniflow-kernels[scores]'", name=error.name
        ) from None
    try:
        torch.load(file, "cpu", weights_only=True)  # torch-fidelity itself would execute what a file asks for
        network = FeatureExtractorInceptionV3("fid", ["2048", "logits_unbiased"], str(file))
    except Exception as error:
        raise ValueError(f"{file}: expected weights of torch-fidelity's Inception ({_first_line(error)})") from None
    network.to(device).eval()

    def features(pictures: Tensor) -> tuple[Tensor, Tensor]:
        found, logits = network(pictures)
        return found, logits.softmax(1)

    return features


def _run(file: Path, network: Program, *pictures: Tensor, **options: bool) -> Any:
    try:
        # optimised, TorchScript's first calls differ from later ones, and processes that share pictures would too
        off = torch.autocast(pictures[0].device.type, enabled=False)
        with torch.no_grad(), off, torch.jit.optimized_execution(False):
            return network(*pictures, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        shape = list(pictures[0].shape)
        raise ValueError(f"{file}: the network fails on pictures {shape}: {_first_line(error, last=True)}") from error


def _first_line(error: Exception, last: bool = False) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if last else 0]
