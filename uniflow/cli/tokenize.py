"""`uniflow reconstruct`, `encode`, `decode` and `evaluate`: pictures through the tokenizer in batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from uniflow.cli.bars import picture_bar
from uniflow.cli.inputs import (
    InputError,
    Source,
    check_folder,
    check_outputs,
    explained,
    find_pictures,
    load_model,
    read_picture,
)
from uniflow.config import UniFlowConfig
from uniflow.flow import Interval, Plan
from uniflow.latents import EncodedPicture, read_latents, write_latents
from uniflow.metrics import ReconstructionFID, psnr, ssim
from uniflow.model import UniFlow
from uniflow.normalization import normalize, to_uint8
from uniflow.pictures import center_crop, fit_to_patches, save_picture, to_tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Sampling:
    """How to decode: the sampler's settings and the seed of its noise."""

    steps: int | None
    schedule: str
    solver: str
    cfg: float
    cfg_interval: Interval | None
    temperature: float
    seed: int

    def check(self) -> None:
        """Find a bad value before any work is done."""
        with explained():
            self.plan(1).check()

    def plan(self, default_steps: int) -> Plan:
        """As the sampler takes it."""
        return Plan(self.steps or default_steps, self.schedule, self.solver, self.cfg, self.cfg_interval)


def reconstruct(
    pictures: Sequence[Path],
    checkpoint: Path,
    out: Path,
    sampling: Sampling,
    keep_size: bool,
    batch_size: int,
    dtype: str,
    device: str,
    force: bool,
) -> None:
    """Write the reconstruction of each picture; print PSNR and SSIM of each, their means, and images/s."""
    sampling.check()
    check_folder(out)
    sources = find_pictures(pictures)
    check_outputs([out / source.name for source in sources], force)
    model = load_model(checkpoint, device, dtype)
    scores = _Scores()
    table = Table("picture", "size", "PSNR (dB)", "SSIM")
    start = time.perf_counter()
    for batch, originals, results in _reconstructions(model, sources, sampling, keep_size, batch_size):
        for source, original, result, db, similarity in zip(
            batch, originals, results, *scores.add(results, originals), strict=True
        ):
            _save(result, out / source.name)
            table.add_row(source.name, f"{original.shape[2]}x{original.shape[1]}", f"{db:.2f}", f"{similarity:.4f}")
    seconds = time.perf_counter() - start
    table.add_row("mean", "", *scores.means(), style="bold")
    Console().print(table)
    print(f"{len(sources) / seconds:.2f} images/s")


def encode(
    pictures: Sequence[Path],
    checkpoint: Path,
    out: Path,
    keep_size: bool,
    batch_size: int,
    dtype: str,
    device: str,
    force: bool,
) -> None:
    """Write the latents of all pictures to one file."""
    check_folder(out.parent)
    check_outputs([out], force)
    sources = find_pictures(pictures)
    model = load_model(checkpoint, device, dtype)
    latents: list[Tensor] = []
    encoded: list[EncodedPicture] = []
    with torch.inference_mode(), picture_bar("encoding") as bar:
        for batch, originals in _batches(model.config, sources, keep_size, batch_size, bar):
            latents.extend(model.encode(normalize(originals.to(model.device))).cpu())
            encoded.extend(EncodedPicture(source.name, *originals.shape[-2:]) for source in batch)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_latents(out, latents, encoded, model)
    print(f"{len(latents)} pictures in {out}")


def decode(
    latents: Path,
    checkpoint: Path,
    out: Path,
    sampling: Sampling,
    batch_size: int,
    dtype: str,
    device: str,
    force: bool,
) -> None:
    """Write the picture of each latent in a file."""
    sampling.check()
    check_folder(out)
    model = load_model(checkpoint, device, dtype)
    with explained():
        tensors, pictures = read_latents(latents, model)
    check_outputs([out / picture.name for picture in pictures], force)
    noise = _Noise(model, sampling.seed)
    with torch.inference_mode(), picture_bar("decoding") as bar:
        task = bar.add_task("", total=len(pictures))
        for group in _runs(list(range(len(pictures))), batch_size, lambda i: (pictures[i].height, pictures[i].width)):
            size = pictures[group[0]].height, pictures[group[0]].width
            batch = torch.stack([tensors[i] for i in group]).to(model.device)
            for i, result in zip(group, to_uint8(_decode(model, batch, sampling, noise, size)).cpu(), strict=True):
                _save(result, out / pictures[i].name)
            bar.advance(task, len(group))
    print(f"{len(pictures)} pictures in {out}")


def evaluate(
    folder: Path,
    checkpoint: Path,
    sampling: Sampling,
    fid_weights: Path | None,
    keep_size: bool,
    batch_size: int,
    dtype: str,
    device: str,
) -> None:
    """Print the mean PSNR and SSIM over a folder, and rFID or why there is none."""
    sampling.check()
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    sources = find_pictures([folder])
    model = load_model(checkpoint, device, dtype)
    fid, why_not = _fid(fid_weights, len(sources), model.device)
    scores = _Scores()
    start = time.perf_counter()
    for _, originals, results in _reconstructions(model, sources, sampling, keep_size, batch_size):
        scores.add(results, originals)
        if fid is not None:
            fid.update(results, originals)
    seconds = time.perf_counter() - start
    db, similarity = scores.means()
    table = Table("pictures", "PSNR (dB)", "SSIM", "rFID", "images/s")
    rfid = f"{fid.compute():.3f}" if fid is not None else "not computed"
    table.add_row(str(len(sources)), db, similarity, rfid, f"{len(sources) / seconds:.2f}")
    Console().print(table)
    if why_not:
        print(f"rFID was not computed: {why_not}")
    if scores.without_ssim:
        print(f"SSIM was not computed for {scores.without_ssim} pictures smaller than its window of 11 pixels")


def _fid(weights: Path | None, pictures: int, device: torch.device) -> tuple[ReconstructionFID | None, str]:
    if weights is None:
        return None, "it needs torch-fidelity and --fid-weights with its pt_inception-2015-12-05-6726825d.pth"
    if pictures < 2:
        return None, "it needs at least two pictures"
    try:
        with explained():
            return ReconstructionFID(weights, device), ""
    except ModuleNotFoundError:
        return None, "torch-fidelity is not installed (pip install torch-fidelity)"


class _Scores:
    """PSNR and SSIM of all pictures so far."""

    def __init__(self) -> None:
        self._psnr: list[Tensor] = []
        self._ssim: list[Tensor] = []

    def add(self, results: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
        """Of a batch of uint8 pictures [B, 3, H, W]: [B] and [B]."""
        self._psnr.append(psnr(results, originals))
        self._ssim.append(ssim(results, originals))
        return self._psnr[-1], self._ssim[-1]

    def means(self) -> tuple[str, str]:
        """As text; pictures too small for SSIM are left out of its mean."""
        return f"{torch.cat(self._psnr).mean():.2f}", f"{torch.cat(self._ssim).nanmean():.4f}"

    @property
    def without_ssim(self) -> int:
        return int(torch.cat(self._ssim).isnan().sum())


class _Noise:
    """Noise drawn picture after picture on the CPU: the same for a seed whatever the batches, command and device."""

    def __init__(self, model: UniFlow, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._row = model.config.patch_values

    def draw(self, pictures: int, tokens: int) -> Tensor:
        """[pictures, tokens, C*P*P], float32."""
        return torch.stack([torch.randn(tokens, self._row, generator=self._generator) for _ in range(pictures)])


def _decode(model: UniFlow, latents: Tensor, sampling: Sampling, noise: _Noise, size: tuple[int, int]) -> Tensor:
    return model.decode(
        latents,
        sampling.steps,
        sampling.schedule,
        sampling.cfg,
        sampling.cfg_interval,
        noise=noise.draw(*latents.shape[:2]),
        size=size,
        solver=sampling.solver,
        temperature=sampling.temperature,
    )


def _reconstructions(
    model: UniFlow, sources: Sequence[Source], sampling: Sampling, keep_size: bool, batch_size: int
) -> Iterator[tuple[list[Source], Tensor, Tensor]]:
    """Batches of sources, their pictures and their reconstructions, both uint8 [B, 3, H, W] on the CPU."""
    noise = _Noise(model, sampling.seed)
    with torch.inference_mode(), picture_bar("reconstructing") as bar:
        for batch, originals in _batches(model.config, sources, keep_size, batch_size, bar):
            latents = model.encode(normalize(originals.to(model.device)))
            size = originals.shape[-2], originals.shape[-1]
            yield batch, originals, to_uint8(_decode(model, latents, sampling, noise, size)).cpu()


def _batches(
    config: UniFlowConfig, sources: Sequence[Source], keep_size: bool, batch_size: int, bar: Progress
) -> Iterator[tuple[list[Source], Tensor]]:
    """Sources and their pictures, uint8 [B, 3, H, W]; pictures of one size that follow each other share a batch."""
    task = bar.add_task("", total=len(sources))

    def fitted() -> Iterator[tuple[Source, Tensor]]:
        for source in sources:
            picture = read_picture(source.path)
            fit = fit_to_patches(picture, config.patch_size) if keep_size else center_crop(picture, config.image_size)
            yield source, to_tensor(fit)

    for run in _runs(fitted(), batch_size, lambda item: tuple(item[1].shape)):
        yield [source for source, _ in run], torch.stack([pixels for _, pixels in run])
        bar.advance(task, len(run))


def _runs(items: Iterable[T], longest: int, key: Callable[[T], object]) -> Iterator[list[T]]:
    """Split into runs of neighbours with the same key, at most `longest` long."""
    run: list[T] = []
    for item in items:
        if run and (len(run) == longest or key(item) != key(run[0])):
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def _save(pixels: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(pixels, path)
