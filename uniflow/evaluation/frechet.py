"""Fréchet distance between two sets of features (FID, rFID), and the mean and covariance that it is made of."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uniflow.atomic import replacing
from uniflow.reading import check_file


class FeatureStatistics:
    """Count, mean and covariance of features, added to batch by batch in float64.

    The same batches in the same order give the same bits. Batches are merged by the formula of Chan, Golub and LeVeque
    (1979), which subtracts no large sums.

    Args:
        width: D, how many features a picture has.
        device: where the sums are kept; the CPU if not given.

    Attributes:
        features: those of some of the pictures, float32 [n, D] on the CPU, where they are kept beside; see `save`.
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.count = 0
        self.features: Tensor | None = None
        with torch.inference_mode(False):  # or they could not be added to outside of the mode they were made in
            self.mean = torch.zeros(width, dtype=torch.float64, device=device or "cpu")
            self._scatter = torch.zeros(width, width, dtype=torch.float64, device=device or "cpu")

    @property
    def covariance(self) -> Tensor:
        """[D, D], of a sample: divided by the count less one.

        Raises:
            ValueError: for fewer than two pictures.
        """
        if self.count < 2:
            raise ValueError(f"features: expected those of at least 2 pictures, got {self.count}")
        return self._scatter / (self.count - 1)

    def add(self, features: Tensor) -> None:
        """Add those of a batch, [B, D], of any floating dtype.

        Raises:
            ValueError: for another shape, or features that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features: expected shape [B, {len(self.mean)}], got {list(features.shape)}")
        if not features.isfinite().all():
            raise ValueError("features: expected finite numbers, got NaN or infinity")
        if not len(features):
            return
        features = features.to(self.mean)
        mean = features.mean(0)
        centred, moved = features - mean, mean - self.mean
        together = self.count + len(features)
        self._scatter.addmm_(centred.T, centred)
        self._scatter.addr_(moved, moved, alpha=self.count * len(features) / together)
        self.mean += moved * (len(features) / together)
        self.count = together

    def save(self, path: Path, network: str | None = None) -> None:
        """Write `mu` and `sigma` in float64 to an .npz file, the form that pytorch-fid and others read, and `count`.

        `features`, float32 [n, D], is there too if there are any.

        Args:
            path: the file.
            network: which network the features are of, to be kept beside them.
        """
        values = {"mu": self.mean.cpu().numpy(), "sigma": self.covariance.cpu().numpy(), "count": np.array(self.count)}
        if network is not None:
            values["network"] = np.array(network)
        if self.features is not None and len(self.features):
            values["features"] = self.features.numpy()
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **values)

    @classmethod
    def load(cls, path: Path, network: str | None = None, with_features: bool = False) -> FeatureStatistics:
        """Read an .npz file with `mu` [D] and `sigma` [D, D], whoever wrote it.

        Args:
            path: the file.
            network: which network's features are expected, where the file says of which its own are.
            with_features: whether `features` [n, D] are read too, where it has them.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no such file, holds numbers that are none, or features of another network.
        """
        check_file(path)
        try:
            held = np.load(path)
            if not isinstance(held, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array")
            with held:
                names = ("mu", "sigma", "count", "network", *(["features"] if with_features else []))
                arrays = {name: held[name] for name in names if name in held.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path}: expected an .npz file with mu and sigma ({error})") from None
        mean, covariance = (arrays.get(name, np.empty(0)) for name in ("mu", "sigma"))
        if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{path}: expected mu [D] and sigma [D, D], got {list(mean.shape)} and {list(covariance.shape)}"
            )
        if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
            raise ValueError(f"{path}: mu and sigma: expected numbers, got {mean.dtype} and {covariance.dtype}")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError(f"{path}: mu and sigma: expected finite numbers")
        count = arrays.get("count", np.array(2))  # it matters only to what is added
        if count.shape != () or count.dtype.kind != "i" or count < 2:
            raise ValueError(f"{path}: count: expected a whole number from 2 on, got {count}")
        own = str(arrays["network"]) if "network" in arrays else None
        if None not in (own, network) and own != network:
            raise ValueError(f"{path}: its features are those of another network than the one given (SHA-256 {own})")
        statistics = cls(0)
        statistics.count = int(count)
        statistics.mean = torch.from_numpy(mean.astype(np.float64))
        statistics._scatter = torch.from_numpy(covariance.astype(np.float64)) * (statistics.count - 1)
        if (features := arrays.get("features")) is not None:
            if features.dtype.kind != "f" or features.shape[1:] != mean.shape or not np.isfinite(features).all():
                raise ValueError(
                    f"{path}: features: expected finite numbers [n, {len(mean)}], got {features.dtype} "
                    f"{list(features.shape)}"
                )
            statistics.features = torch.from_numpy(features.astype(np.float32, copy=False))
        return statistics


def frechet_distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """|m1 - m2|² + trace(S1 + S2 - 2 (S1 S2)^½), with means m and covariances S.

    The trace of the root is that of (S1^½ S2 S1^½)^½, which is symmetric, so that no eigenvalue is complex.

    Source: Dowson and Landau (1982); of features Heusel et al., "GANs Trained by a Two Time-Scale Update Rule" (2017).

    Raises:
        ValueError: for fewer than two pictures, or features of different widths.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"features: expected one width, got {len(one.mean)} and {len(other.mean)}")
    first, second = one.covariance, other.covariance.to(one.mean.device)
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * _roots(values)) @ vectors.T
    trace = _roots(torch.linalg.eigvalsh(root @ second @ root)).sum()
    apart = (one.mean - other.mean.to(one.mean.device)).square().sum()
    return float(apart + first.trace() + second.trace() - 2 * trace)


def _roots(eigenvalues: Tensor) -> Tensor:
    # what rounding makes of a zero, 1e-16, would be 1e-8 as a root
    noise = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps * eigenvalues.abs().max()
    return torch.where(eigenvalues > noise, eigenvalues, 0).sqrt()
