"""`uniflow reconstruct`, `encode` and `decode`: pictures through the tokenizer in batches."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from uniflow.cli.bars import picture_bar
from uniflow.cli.batches import Item, Size, Slow, batches, fitted, runs, stacked
from uniflow.cli.files import (
    Given,
    Pictures,
    check_folder,
    check_not_read,
    check_outputs,
    find_pictures,
    picture_suffixes,
)
from uniflow.cli.inputs import InputError, Named, check_finite, explained, load_model
from uniflow.cli.printing import Column, Table, counted, say, say_json
from uniflow.cli.workers import Workers
from uniflow.latents import EncodedPicture, read_latents, write_latents
from uniflow.model import UniFlow
from uniflow.normalization import normalize
from uniflow.pictures import save_picture
from uniflow.sampler import Batch, Decoder
from uniflow_kernels.ops.fp8_linear import check_precision
from uniflow_kernels.solvers import Interval, Plan

LATENTS = ".safetensors"
PSNR, SSIM = Column("PSNR (dB)", "psnr", ".2f"), Column("SSIM", "ssim", ".4f", 6)


@dataclass(frozen=True)
class Sampling:
    """How to decode: the sampler's settings, the seed of its noise, the memory for it in bytes, and its precision."""

    steps: int | None
    schedule: str
    solver: str
    cfg: float
    cfg_interval: Interval | None
    temperature: float
    seed: int
    max_memory: int | None
    precision: str | None

    def check(self) -> None:
        """Find a bad value before any work is done."""
        with explained():
            Plan(self.steps or 1, self.schedule, self.solver, self.cfg, self.cfg_interval).check()
            check_precision(self.precision)
        check_finite("--temperature", self.temperature)

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
                precision=self.precision,
            )

    def noise(self) -> torch.Generator:
        """Gives the seeds of the pictures' noise in turn: the same whatever the batches, command and device."""
        return torch.Generator().manual_seed(self.seed)


def reconstruct(
    given: Given,
    checkpoint: Named,
    out: Path,
    sampling: Sampling,
    keep_size: bool,
    batch_size: int,
    workers: int,
    dtype: str,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    """Write the reconstruction of each picture; print PSNR and SSIM of each, their means, and images/s."""
    from uniflow.evaluation.scores import ReconstructionScores

    sampling.check()
    check_folder(out)
    scores = ReconstructionScores()
    # the bar stays until the last file is written and its row printed
    with picture_bar("reconstructing") as bar, Workers(workers) as files, find_pictures(given, files) as pictures:
        sources = pictures.sources
        outputs = [out / source.name for source in sources]
        check_outputs(outputs, force)
        check_not_read(outputs, sources)
        model = load_model(checkpoint, device, dtype, sampling.precision)
        columns = (
            Column("picture", "picture", width=max(len(str(source.path)) for source in sources)),
            Column("size", "size", width=9),
            Column("reconstruction", "reconstruction", width=max(len(source.name) for source in sources)),
            Column("size", "reconstruction_size", width=9),
        )
        table = Table([*columns, PSNR, SSIM], as_json)
        start = time.perf_counter()
        items = fitted(pictures, model.config, keep_size, files)
        for batch, results in reconstructions(model, items, pictures, sampling, batch_size, bar):
            scores.take(scored := scores.of(results, stacked(batch)))
            for item, result, *values in zip(batch, results, *scored.values.values(), strict=True):
                path, name, made = str(item.source.path), item.source.name, f"{result.shape[2]}x{result.shape[1]}"
                cells = (path, "x".join(map(str, item.own)), name, made, *(value.item() for value in values))
                files.write(_save, result, out / name, then=partial(table.row, *cells))
    images_per_second = scores.pictures / (time.perf_counter() - start)
    if as_json:
        say_json({**scores.means(), "images_per_second": images_per_second, "skipped": pictures.skipped})
    else:
        table.row("mean", "", "", "", *scores.means().values())
        say(f"{images_per_second:.2f} images/s")
    pictures.say_skipped()


def encode(
    given: Given,
    checkpoint: Named,
    out: Path,
    keep_size: bool,
    batch_size: int,
    max_memory: int | None,
    workers: int,
    dtype: str,
    precision: str | None,
    device: str,
    force: bool,
) -> None:
    """Write the latents of all pictures to one file."""
    if out.suffix != LATENTS:
        raise InputError(f"--out: expected a file called *{LATENTS}, which is what is written, got {out}")
    check_outputs([out], force)
    latents: list[Tensor] = []
    encoded: list[EncodedPicture] = []
    with picture_bar("encoding") as bar, Workers(workers) as files, find_pictures(given, files) as pictures:
        model = load_model(checkpoint, device, dtype, precision)
        with torch.inference_mode():
            items = fitted(pictures, model.config, keep_size, files)
            for batch in batches(model, items, pictures, batch_size, max_memory, bar):
                found = model.encode(normalize(stacked(batch).to(model.device))).cpu()
                for item, latent in zip(batch, found, strict=True):
                    if not latent.isfinite().all():
                        raise InputError(
                            f"the latents of {item.source.path} are not finite: the weights are not, or their numbers "
                            f"are too large for {model.dtype}"
                        )
                    latents.append(latent)
                    encoded.append(EncodedPicture(item.source.name, *item.size))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_latents(out, latents, encoded, model)
    say(f"{counted(len(latents))} in {out}")
    pictures.say_skipped()


def decode(
    latents: Path,
    checkpoint: Named,
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
    for picture in pictures:
        if not picture.name.lower().endswith(picture_suffixes()):
            raise InputError(f"{latents}: {picture.name}: expected the name of a picture, as in {picture.name}.png")
    check_outputs([out / picture.name for picture in pictures], force)
    sizes = [(picture.height, picture.width) for picture in pictures]
    slow = Slow(model)
    groups = list(runs(range(len(pictures)), lambda i: 1 if slow(sizes[i]) else batch_size, lambda i: sizes[i]))

    def batches() -> Iterator[tuple[Tensor, Size]]:
        for group in groups:
            slow.say(pictures[group[0]].name, sizes[group[0]])
            yield torch.stack([tensors[i] for i in group]), sizes[group[0]]

    with torch.inference_mode(), picture_bar("decoding") as bar, Workers(workers) as files, explained():
        task = bar.add_task("", total=len(pictures))
        decoder = sampling.decoder(model, len(groups[0]), sizes[0]) if groups else None
        for group, results in zip(groups, decoder.stream(batches(), sampling.noise()) if decoder else (), strict=True):
            for i, result in zip(group, results, strict=True):
                files.write(_save, result, out / pictures[i].name)
            bar.advance(task, len(group))
    say(f"{counted(len(pictures))} in {out}")


def reconstructions(
    model: UniFlow,
    items: Iterator[Item],
    pictures: Pictures,
    sampling: Sampling,
    batch_size: int,
    bar: Progress,
    seeds: Tensor | None = None,
) -> Iterator[tuple[list[Item], Tensor]]:
    """Batches of pictures and their reconstructions, uint8 [B, 3, H, W] on the CPU.

    Their noise is that of `seeds`, int64, at their places among all that were given, or comes from the sampling's seed
    in turn.
    """
    waiting: deque[list[Item]] = deque()
    with torch.inference_mode():
        if (first := next(items, None)) is None:
            return
        decoder = sampling.decoder(model, min(batch_size, pictures.total), first.size)

        def latents() -> Iterator[Batch]:
            for batch in batches(model, chain([first], items), pictures, batch_size, sampling.max_memory, bar):
                waiting.append(batch)
                found = model.encode(normalize(stacked(batch).to(model.device)))
                if seeds is None:
                    yield found, batch[0].size
                else:
                    yield found, batch[0].size, seeds[[item.source.place for item in batch]]

        with explained():
            for results in decoder.stream(latents(), sampling.noise()):
                yield waiting.popleft(), results


def _save(pixels: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(pixels, path)
