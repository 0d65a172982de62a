"""Scores over many pictures that processes share: the same, however many, since sums keep the pictures' order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from uniflow.evaluation.frechet import FeatureStatistics, frechet_distance
from uniflow.evaluation.networks import FeatureNetwork, PerceptualDistance
from uniflow.evaluation.similarity import psnr, ssim
from uniflow.training.processes import Processes

T = TypeVar("T")


@dataclass
class InOrder(Generic[T]):
    """Brings what processes make of the blocks of a list to the first of them, block after block.

    Block b falls to process b % world. The processes come together once for each `world` blocks, so that nothing but
    these is held.

    Attributes:
        processes: that share the blocks.
        blocks: how many there are.
        take: is called in the first process, with what was made of block 0, of block 1 and so on.
    """

    processes: Processes
    blocks: int
    take: Callable[[T], None]
    _round: int = 0
    _held: list[T] = field(default_factory=list)

    def is_mine(self, block: int) -> bool:
        """Whether a block falls to this process."""
        return block % self.processes.world == self.processes.rank

    def add(self, block: int, made: T) -> None:
        """What was made of a block of this process, or of a part of it; blocks come in their order."""
        self._wait_until(block // self.processes.world)
        self._held.append(made)

    def finish(self) -> None:
        """After the last block: all processes come here."""
        self._wait_until(-(-self.blocks // self.processes.world))

    def _wait_until(self, begun: int) -> None:
        while self._round < begun:
            for of_process in self.processes.to_first(self._held):
                for made in of_process:
                    self.take(made)
            self._held = []
            self._round += 1


@dataclass(frozen=True)
class Scored:
    """Of a batch, on the CPU: scores by name, [B] each, and features [B, D] where there is a network."""

    values: dict[str, Tensor]
    originals: Tensor | None = None
    reconstructions: Tensor | None = None


class ReconstructionScores:
    """PSNR, SSIM and, with networks, LPIPS and rFID of reconstructions.

    Args:
        network: of the features for rFID.
        perceptual: for LPIPS.
        reference: statistics of the originals' features; else they are made of the originals as they come.
    """

    def __init__(
        self,
        network: FeatureNetwork | None = None,
        perceptual: PerceptualDistance | None = None,
        reference: FeatureStatistics | None = None,
    ) -> None:
        self.network, self.perceptual, self.reference = network, perceptual, reference
        self._values: dict[str, list[float]] = {}
        self._statistics: dict[str, FeatureStatistics] = {}

    def of(self, reconstructions: Tensor, originals: Tensor) -> Scored:
        """Score a batch, uint8 [B, 3, H, W], in whichever process.

        Raises:
            ValueError: if a network fails, or its features are not as many as those of the reference.
        """
        with torch.autocast(originals.device.type, enabled=False):
            values = {"psnr": psnr(reconstructions, originals), "ssim": ssim(reconstructions, originals)}
        if self.perceptual is not None:
            values["lpips"] = self.perceptual(reconstructions, originals)
        values = {name: value.cpu() for name, value in values.items()}
        if self.network is None:
            return Scored(values)
        features = self.network(reconstructions).cpu()
        if self.reference is not None and len(self.reference.mean) != features.shape[1]:  # said now, not after hours
            width = len(self.reference.mean)
            raise ValueError(f"reference: expected statistics of {features.shape[1]} features, got those of {width}")
        return Scored(values, self.network(originals).cpu() if self.reference is None else None, features)

    def take(self, scored: Scored) -> None:
        """Count a batch in; the first process does so with all, in the pictures' order."""
        for name, value in scored.values.items():
            self._values.setdefault(name, []).extend(value.tolist())
        for name in ("originals", "reconstructions"):
            features = getattr(scored, name)
            if features is not None:
                device = None if self.network is None else self.network.device
                if name not in self._statistics:
                    self._statistics[name] = FeatureStatistics(features.shape[1], device)
                self._statistics[name].add(features.to(device))

    @property
    def pictures(self) -> int:
        """How many there were."""
        return len(self._values.get("psnr", ()))

    @property
    def without_ssim(self) -> int:
        """How many of them were too small for SSIM."""
        return sum(map(math.isnan, self._values.get("ssim", ())))

    @property
    def originals(self) -> FeatureStatistics | None:
        """Statistics of the originals' features: those that were given, or what was made of them so far."""
        return self.reference or self._statistics.get("originals")

    def means(self) -> dict[str, float]:
        """Over the pictures, by name; those too small for SSIM are left out of its mean."""
        return {name: exact_mean(values) for name, values in self._values.items()}

    def distance(self) -> float | None:
        """RFID, or None without a network or for fewer than two pictures."""
        made = self._statistics.get("reconstructions")
        if made is None or made.count < 2:
            return None
        assert self.originals is not None
        return frechet_distance(self.originals, made)


def exact_mean(values: Iterable[float]) -> float:
    """The mean of those that are not NaN, their sum rounded once; NaN of none."""
    numbers = [value for value in values if not math.isnan(value)]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def resized(pictures: Tensor, size: int) -> Tensor:
    """Pictures, uint8 [B, 3, H, W], as squares of `size`: bicubic, with antialiasing, as Pillow's; rounded to uint8."""
    if pictures.shape[-2:] == (size, size):
        return pictures
    sized = torch.nn.functional.interpolate(pictures.float(), (size, size), mode="bicubic", antialias=True)
    return sized.round().clamp(0, 255).to(torch.uint8)
