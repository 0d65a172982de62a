"""`uniflow reconstruct`, `encode`, `decode` and `evaluate`: pictures through the tokenizer in batches."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
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
from uniflow.cli.workers import Workers
from uniflow.config import UniFlowConfig
from uniflow.encoder import encoding_bytes_per_token
from uniflow.latents import EncodedPicture, read_latents, write_latents
from uniflow.metrics import ReconstructionFID, psnr, ssim
from uniflow.model import UniFlow
from uniflow.normalization import normalize
from uniflow.pictures import center_crop, fit_to_patches, save_picture, to_tensor
from uniflow.sampler import Decoder
from uniflow_kernels.solvers import Interval, Plan

T = TypeVar("T")


@dataclass(frozen=True)
class Sampling:
    """How to decode: the sampler's settings, the seed of its noise, and the memory for it in bytes."""

    steps: int | None
    schedule: str
    solver: str
    cfg: float
    cfg_interval: Interval | None
    temperature: float
    seed: int
    max_memory: int | None

    def check(self) -> None:
        """Find a bad value before any work is done."""
        with explained():
            Plan(self.steps or 1, self.schedule, self.solver, self.cfg, self.cfg_interval).check()

    def decoder(self, model: UniFlow, batch: int, size: tuple[int, int]) -> Decoder:
        """For batches of pictures of a size, and others when they come."""
        with explained():
            return model.compile_decoder(
                batch,
                size,
                self.steps,
                self.schedule,
                self.cfg,
                self.cfg_interval,
                self.solver,
                self.temperature,
                max_memory=self.max_memory,
            )

    def noise(self) -> torch.Generator:
        """Gives the seeds of the pictures' noise in turn: the same whatever the batches, command and device."""
        return torch.Generator().manual_seed(self.seed)


def reconstruct(
    pictures: Sequence[Path],
    checkpoint: Path,
    out: Path,
    sampling: Sampling,
    keep_size: bool,
    batch_size: int,
    workers: int,
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
    with Workers(workers) as files:
        for batch, originals, results in _reconstructions(model, sources, sampling, keep_size, batch_size, files):
            for source, original, result, db, similarity in zip(
                batch, originals, results, *scores.add(results, originals), strict=True
            ):
                files.write(_save, result, out / source.name)
                size = f"{original.shape[2]}x{original.shape[1]}"
                table.add_row(source.name, size, f"{db:.2f}", f"{similarity:.4f}")
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
    max_memory: int | None,
    workers: int,
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
    with torch.inference_mode(), picture_bar("encoding") as bar, Workers(workers) as files:
        fitted = files.read(partial(_fit, model.config, keep_size), sources)
        for batch, originals in _batches(model, fitted, len(sources), batch_size, max_memory, bar):
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
    workers: int,
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
    sizes = [(picture.height, picture.width) for picture in pictures]
    groups = list(_runs(range(len(pictures)), lambda _: batch_size, lambda i: sizes[i]))
    batches = ((torch.stack([tensors[i] for i in group]), sizes[group[0]]) for group in groups)
    with torch.inference_mode(), picture_bar("decoding") as bar, Workers(workers) as files, explained():
        task = bar.add_task("", total=len(pictures))
        decoder = sampling.decoder(model, len(groups[0]), sizes[0]) if groups else None
        for group, results in zip(groups, decoder.stream(batches, sampling.noise()) if decoder else (), strict=True):
            for i, result in zip(group, results, strict=True):
                files.write(_save, result, out / pictures[i].name)
            bar.advance(task, len(group))
    print(f"{len(pictures)} pictures in {out}")


def evaluate(
    folder: Path,
    checkpoint: Path,
    sampling: Sampling,
    fid_weights: Path | None,
    keep_size: bool,
    batch_size: int,
    workers: int,
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
    with Workers(workers) as files:
        for _, originals, results in _reconstructions(model, sources, sampling, keep_size, batch_size, files):
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


def _reconstructions(
    model: UniFlow, sources: Sequence[Source], sampling: Sampling, keep_size: bool, batch_size: int, files: Workers
) -> Iterator[tuple[list[Source], Tensor, Tensor]]:
    """Batches of sources, their pictures and their reconstructions, both uint8 [B, 3, H, W] on the CPU."""
    waiting: deque[tuple[list[Source], Tensor]] = deque()
    with torch.inference_mode(), picture_bar("reconstructing") as bar:
        pictures = files.read(partial(_fit, model.config, keep_size), sources)
        first = next(pictures)
        height, width = first[1].shape[-2:]
        decoder = sampling.decoder(model, min(batch_size, len(sources)), (height, width))

        def latents() -> Iterator[tuple[Tensor, tuple[int, int]]]:
            fitted = chain([first], pictures)
            for batch, originals in _batches(model, fitted, len(sources), batch_size, sampling.max_memory, bar):
                waiting.append((batch, originals))
                yield model.encode(normalize(originals.to(model.device))), (originals.shape[-2], originals.shape[-1])

        with explained():
            for results in decoder.stream(latents(), sampling.noise()):
                yield *waiting.popleft(), results


def _fit(config: UniFlowConfig, keep_size: bool, source: Source) -> tuple[Source, Tensor]:
    """A source and its picture, uint8 [3, H, W], as the model takes it."""
    picture = read_picture(source.path)
    fit = fit_to_patches(picture, config.patch_size) if keep_size else center_crop(picture, config.image_size)
    return source, to_tensor(fit)


def _batches(
    model: UniFlow,
    pictures: Iterable[tuple[Source, Tensor]],
    total: int,
    batch_size: int,
    max_memory: int | None,
    bar: Progress,
) -> Iterator[tuple[list[Source], Tensor]]:
    """Sources and their pictures, uint8 [B, 3, H, W]; pictures of one size that follow each other share a batch."""
    task = None

    def longest(item: tuple[Source, Tensor]) -> int:
        return min(batch_size, _most_encoded(model, item[1].shape[-2:], max_memory))

    for run in _runs(pictures, longest, lambda item: tuple(item[1].shape)):
        task = bar.add_task("", total=total) if task is None else task  # not before it is known that there is memory
        yield [source for source, _ in run], torch.stack([pixels for _, pixels in run])
        bar.advance(task, len(run))


def _most_encoded(model: UniFlow, size: Sequence[int], max_memory: int | None) -> int:
    """How many pictures of a size can be encoded together."""
    if max_memory is None:
        return sys.maxsize
    tokens = 1 + math.prod(size) // model.config.patch_size**2
    needed = tokens * encoding_bytes_per_token(model.config, model.dtype)
    if needed > max_memory:
        raise InputError(
            f"--max-memory: encoding a picture of {size[0]}x{size[1]} needs at least {needed / 1e6:.0f} MB, got "
            f"{max_memory / 1e6:.0f} MB"
        )
    return max_memory // needed


def _runs(items: Iterable[T], longest: Callable[[T], int], key: Callable[[T], object]) -> Iterator[list[T]]:
    """Split into runs of neighbours with the same key, at most `longest(first)` long."""
    run: list[T] = []
    most = 0
    for item in items:
        if run and (len(run) == most or key(item) != key(run[0])):
            yield run
            run = []
        if not run:
            most = longest(item)
        run.append(item)
    if run:
        yield run


def _save(pixels: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(pixels, path)
