"""`uniflow evaluate`: the scores of reconstructions over a folder of pictures, by one process or several."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniflow.atomic import write_json
from uniflow.cli.bars import picture_bar
from uniflow.cli.batches import Item, fitted, stacked
from uniflow.cli.files import Given, check_outputs, check_pictures_folder, find_pictures
from uniflow.cli.inputs import InputError, Named, choose_device, explained, load_model
from uniflow.cli.printing import Column, Table, finite, say, say_json
from uniflow.cli.tokenize import PSNR, SSIM, Sampling, reconstructions
from uniflow.cli.workers import Workers
from uniflow.config import UniFlowConfig
from uniflow.evaluation.frechet import FeatureStatistics
from uniflow.evaluation.networks import FeatureNetwork, PerceptualDistance
from uniflow.evaluation.precision import cosines
from uniflow.evaluation.scores import InOrder, ReconstructionScores, Scored, resized
from uniflow.evaluation.similarity import psnr
from uniflow.latents import fingerprint
from uniflow.model import UniFlow
from uniflow.normalization import normalize
from uniflow.sampler import Decoder, start_of
from uniflow.training.processes import Processes, ProcessLostError, joined
from uniflow_kernels import __version__

_COST = "cost of the precision: "  # how names of values begin that are no scores


@dataclass(frozen=True)
class Scoring:
    """What to score at which size, with which files, and where results go.

    Attributes:
        size: the side of the squares that are reconstructed; the checkpoint's own if None.
        score_size: the side at which they are scored; that of the reconstructions if None.
        keep_size: reconstruct and score each picture at its own size instead.
        features: network for rFID.
        lpips: network for LPIPS.
        reference: statistics of the originals' features, to read.
        keep_reference: where to write them.
        out: JSON file of the results.
    """

    size: int | None
    score_size: int | None
    keep_size: bool
    features: Path | None
    lpips: Path | None
    reference: Path | None
    keep_reference: Path | None
    out: Path | None

    def check(self, force: bool) -> None:
        """Find what cannot be before any work is done."""
        if self.keep_size and (self.size or self.score_size):
            raise InputError("--keep-size: pictures have their own sizes, expected neither --size nor --score-size")
        for name, path in (("--reference", self.reference), ("--keep-reference", self.keep_reference)):
            if path is not None and self.features is None:
                raise InputError(f"{name}: statistics are of a network's features, expected --features too")
        if self.reference is not None and self.keep_reference is not None:
            raise InputError("--keep-reference: expected no --reference, which holds these statistics already")
        check_outputs([path for path in (self.keep_reference, self.out) if path is not None], force)

    def side(self, config: UniFlowConfig) -> int:
        """Of the squares that are reconstructed."""
        side = self.size or config.image_size
        if side % config.patch_size:
            raise InputError(f"--size: expected a multiple of the checkpoint's patch, {config.patch_size}, got {side}")
        return side

    def at_size(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], uint8, at the size at which they are scored."""
        return images if self.score_size is None else resized(images, self.score_size)

    def networks(self, device: torch.device) -> ReconstructionScores:
        """What counts the scores, with the networks on a device."""
        with explained():
            network = None if self.features is None else FeatureNetwork(self.features, device)
            perceptual = None if self.lpips is None else PerceptualDistance(self.lpips, device)
            known = None
            if self.reference is not None and network is not None:
                known = FeatureStatistics.load(self.reference, network.digest)
        return ReconstructionScores(network, perceptual, known)


def evaluate(
    given: Given,
    checkpoint: Named,
    sampling: Sampling,
    scoring: Scoring,
    batch_size: int,
    workers: int,
    dtype: str,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    """Print the mean scores over a folder, which the processes of torchrun share; rFID too, or why there is none.

    In a lower precision also what that costs, beside the same model in full precision.
    """
    sampling.check()
    scoring.check(force)
    check_pictures_folder(given.paths[0])
    try:
        with joined(choose_device(device)) as (processes, own):
            model = load_model(checkpoint, str(own), dtype)
            scores, counts = _scored(model, given, sampling, scoring, batch_size, workers, processes)
            if processes.first:
                settings = _settings(model, given, checkpoint, sampling, scoring, batch_size, processes)
                _report(scores, counts, settings, scoring, as_json)
            processes.wait()
    except ProcessLostError:
        raise InputError("another process of the job has ended, and so does this one") from None


def _scored(
    model: UniFlow,
    given: Given,
    sampling: Sampling,
    scoring: Scoring,
    batch_size: int,
    workers: int,
    processes: Processes,
) -> tuple[ReconstructionScores, dict[str, Any]]:
    """The scores, whole in the first process, and what is reported beside them."""
    bar = picture_bar("reconstructing", shown=processes.first)
    with bar, Workers(workers) as files, find_pictures(given, files) as pictures:
        side = None if scoring.keep_size else scoring.side(model.config)
        with explained():
            lowered = model.at_precision(sampling.precision)
        exact = None if lowered is model else _Exact(model, lowered, sampling, batch_size)
        scores = scoring.networks(model.device)
        # a picture's noise is that of its place, whoever reconstructs it and whatever cannot be read
        seeds = start_of((len(pictures.sources),), None, sampling.noise(), None, torch.device("cpu"))
        order = InOrder[Scored](processes, -(-len(pictures.sources) // batch_size), scores.take)
        share = pictures.share(batch_size, processes.rank, processes.world)
        start = time.perf_counter()
        items = fitted(share, model.config, scoring.keep_size, files, side)
        for batch, results in reconstructions(lowered, items, share, sampling, batch_size, bar, seeds):
            made, originals = scoring.at_size(results), scoring.at_size(stacked(batch))
            with explained():
                scored = scores.of(made, originals)
            if exact is not None:
                full = scoring.at_size(exact.reconstructed(batch, seeds))
                costs = {"full": psnr(full, originals), "beside": psnr(made, full), **exact.cosines(batch)}
                scored.values.update({_COST + name: value for name, value in costs.items()})
            order.add(batch[0].source.place // batch_size, scored)
        order.finish()
        seconds = time.perf_counter() - start
        pictures.skipped = sum(processes.of_all(share.skipped))
    if processes.first:
        if not scores.pictures:
            raise InputError(f"none of {pictures.skipped} pictures can be read")
        pictures.say_skipped()
    return scores, {"skipped": pictures.skipped, "images_per_second": scores.pictures / seconds}


@dataclass
class _Exact:
    """The model in full precision, beside which one in a lower precision is looked at."""

    model: UniFlow
    lowered: UniFlow
    sampling: Sampling
    batch_size: int
    _decoder: Decoder | None = field(default=None, init=False)

    @torch.inference_mode()
    def reconstructed(self, batch: list[Item], seeds: Tensor) -> Tensor:
        """A batch's reconstructions from the same noise, uint8 [B, 3, H, W] on the CPU."""
        size, noise = batch[0].size, seeds[[item.source.place for item in batch]]
        if self._decoder is None:
            self._decoder = replace(self.sampling, precision=None).decoder(self.model, self.batch_size, size)
        return self._decoder(self.model.encode(self._images(batch)), seed=noise, size=size).cpu()

    def cosines(self, batch: list[Item]) -> dict[str, Tensor]:
        """See `uniflow.evaluation.precision.cosines`; on the CPU."""
        return {name: value.cpu() for name, value in cosines(self.lowered, self.model, self._images(batch)).items()}

    def _images(self, batch: list[Item]) -> Tensor:
        return normalize(stacked(batch).to(self.model.device))


def _report(
    scores: ReconstructionScores, counts: dict[str, Any], settings: dict[str, Any], scoring: Scoring, as_json: bool
) -> None:
    rfid = scores.distance()
    means = scores.means()
    costs = {name.removeprefix(_COST): means.pop(name) for name in list(means) if name.startswith(_COST)}
    precision = None
    if costs:
        full, beside = costs.pop("full"), costs.pop("beside")
        precision = {"psnr_full": full, "psnr_beside_full": beside, "cosine": costs}
    values = {
        "pictures": scores.pictures,
        "skipped": counts["skipped"],
        "without_ssim": scores.without_ssim,
        **means,
        "lpips": means.get("lpips"),
        "rfid": rfid,
        "precision": precision,
        "images_per_second": counts["images_per_second"],
    }
    if scoring.keep_reference is not None and scores.originals is not None and scores.network is not None:
        with explained():
            scores.originals.save(scoring.keep_reference, scores.network.digest)
    if scoring.out is not None:
        write_json(scoring.out, {"scores": finite(values), "settings": settings})
    if as_json:
        say_json(values)
        return
    columns = [Column("pictures", "pictures"), PSNR, SSIM]
    if scores.perceptual is not None:
        columns.append(Column("LPIPS", "lpips", ".4f", 6))
    columns += [Column("rFID", "rfid", ".3f", 12), Column("images/s", "images_per_second", ".2f")]
    distance = "not computed" if rfid is None else rfid
    Table(columns).row(str(scores.pictures), *means.values(), distance, counts["images_per_second"])
    if rfid is None:
        why_not = "it needs --features with a network" if scores.network is None else "it needs at least two pictures"
        say(f"rFID was not computed: {why_not}")
    if precision is not None:
        say(f"in full precision PSNR {full:.2f} dB; the two reconstructions beside each other {beside:.2f} dB")
        of_both = Table([Column("cosine similarity", "cosine", width=17), Column("1 - mean", "mean", ".2e", 8)])
        for name, value in costs.items():
            of_both.row(name, 1 - value)
    if scores.without_ssim:
        say(f"SSIM was not computed for {scores.without_ssim} pictures smaller than its window of 11 pixels")


def _settings(
    model: UniFlow,
    given: Given,
    checkpoint: Named,
    sampling: Sampling,
    scoring: Scoring,
    batch_size: int,
    processes: Processes,
) -> dict[str, Any]:
    """What the scores depend on."""
    return {
        "version": __version__,
        "pictures": [str(path) for path in given.paths],
        "checkpoint": str(checkpoint.folder),
        "weights": checkpoint.weights,
        "fingerprint": fingerprint(model),
        **asdict(sampling),
        "steps": sampling.steps or model.config.sampling_steps,
        "size": None if scoring.keep_size else scoring.side(model.config),
        "score_size": scoring.score_size,
        **{name: _text(getattr(scoring, name)) for name in ("features", "lpips", "reference")},
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "processes": processes.world,
    }


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
