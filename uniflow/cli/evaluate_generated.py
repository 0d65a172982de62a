"""`uniflow evaluate --generated`: how near a folder of generated pictures is to others, by one process or several."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uniflow.atomic import write_json
from uniflow.cli.bars import picture_bar
from uniflow.cli.batches import Item, runs, stacked
from uniflow.cli.files import Given, check_outputs, check_pictures_folder, find_pictures, labels_of_folders
from uniflow.cli.generate import classes_of
from uniflow.cli.inputs import InputError, choose_device, explained
from uniflow.cli.printing import Column, Table, counted, finite, notice, say, say_json
from uniflow.cli.workers import Workers
from uniflow.evaluation.frechet import FeatureStatistics, frechet_distance
from uniflow.evaluation.generated import Judged, PictureSet
from uniflow.evaluation.inception_score import SPLITS
from uniflow.evaluation.manifolds import NEIGHBOURS, precision_recall
from uniflow.evaluation.networks import FeatureNetwork
from uniflow.evaluation.scores import InOrder, resized
from uniflow.pictures import center_crop, to_tensor
from uniflow.training.processes import Processes, joined
from uniflow_kernels import __version__

_PICTURES_OF_PAPERS = 50_000


@dataclass(frozen=True)
class Judging:
    """By which network, against what, at which size, and where results go.

    Attributes:
        features: the network.
        reference: a file of statistics, or a folder of pictures; None if the pictures' own statistics are wanted.
        keep_reference: where to write those that are made.
        size: the side of the squares that pictures are cropped to; they stay as they are if None.
        score_size: the side that they are resized to then.
        manifold: of how many pictures of a set the features are kept, for precision and recall.
        out: JSON file of the results.
        batch_size: pictures at a time.
        workers: threads that read.
    """

    features: Path | None
    reference: Path | None
    keep_reference: Path | None
    size: int | None
    score_size: int | None
    manifold: int
    out: Path | None
    batch_size: int
    workers: int

    def check(self, given: Given, force: bool) -> None:
        """Find what cannot be before any work is done."""
        check_pictures_folder(given.paths[0])
        if self.keep_reference is not None and self.reference is not None and not self.reference.is_dir():
            raise InputError("--keep-reference: expected a folder as --reference, or none; a file holds them already")
        check_outputs([path for path in (self.keep_reference, self.out) if path is not None], force)


@dataclass(frozen=True)
class _Found:
    """What was made of a folder's pictures, whole in the first process; the names of all, and what they took."""

    folder: Path
    pictures: PictureSet
    names: list[str]
    skipped: int
    seconds: float

    @property
    def count(self) -> int:
        """How many pictures there were."""
        return len(self.pictures.places)

    @property
    def per_second(self) -> float:
        """Pictures of all processes."""
        return self.count / self.seconds


def evaluate_generated(given: Given, judging: Judging, device: str, force: bool, as_json: bool) -> None:
    """Print FID, Inception Score, precision and recall of a folder; the processes of torchrun share the pictures."""
    judging.check(given, force)
    reference = judging.reference
    if reference is None:
        raise InputError("--generated: expected --reference too, a file of statistics or a folder of pictures")
    with _processes(device) as (processes, own):
        network = _network(judging, own)
        statistics = None
        if reference.is_dir():
            others = _judged(Given([reference], given.strict, given.max_pixels), network, judging, False, processes)
            if processes.first:
                statistics = _kept(others, judging)
        else:
            with explained():
                wanted = processes.first and judging.manifold > 0
                statistics = FeatureStatistics.load(reference, network.digest, with_features=wanted)
        width = None if statistics is None else len(statistics.mean)
        found = _judged(given, network, judging, True, processes, width)
        if processes.first and statistics is not None:
            with explained():
                values = _values(found, statistics, own)
            if judging.out is not None:
                settings = _settings(given, judging, network, processes)
                write_json(judging.out, {"scores": finite(values), "settings": settings})
            _report(values, statistics, as_json)
        processes.wait()


def keep_statistics(given: Given, judging: Judging, device: str, force: bool, as_json: bool) -> None:
    """Write the statistics of a folder's pictures, to be the reference of others."""
    judging.check(given, force)
    with _processes(device) as (processes, own):
        found = _judged(given, _network(judging, own), judging, False, processes)
        if processes.first:
            _kept(found, judging)
            if as_json:
                say_json({"pictures": found.count, "skipped": found.skipped, "images_per_second": found.per_second})
            else:
                say(f"statistics of {counted(found.count)} in {judging.keep_reference}")
        processes.wait()


def _processes(device: str) -> AbstractContextManager[tuple[Processes, torch.device]]:
    return joined(choose_device(device), "the same command begins anew")


def _network(judging: Judging, device: torch.device) -> FeatureNetwork:
    if judging.features is None:
        raise InputError("--features: expected a network, whose features are compared")
    with explained():
        return FeatureNetwork(judging.features, device)


def _judged(
    given: Given,
    network: FeatureNetwork,
    judging: Judging,
    scored: bool,
    processes: Processes,
    width: int | None = None,
) -> _Found:
    """A folder's pictures through the network, whose features must be as many as `width` says."""

    def fit(picture: Image.Image) -> Tensor:
        return to_tensor(picture if judging.size is None else center_crop(picture, judging.size))

    batch = judging.batch_size
    bar = picture_bar(f"features of {given.paths[0]}", shown=processes.first)
    with bar, Workers(judging.workers) as files, find_pictures(given, files) as pictures:
        start = time.perf_counter()
        task = bar.add_task("", total=pictures.total)
        made = PictureSet(network, len(pictures.sources), judging.manifold, scored)
        share = pictures.share(batch, processes.rank, processes.world)

        def take(judged: Judged) -> None:
            made.take(judged)
            bar.advance(task, len(judged.places))

        order = InOrder[Judged](processes, -(-len(pictures.sources) // batch), take)
        items = (Item(source, own, pixels) for source, own, pixels in share.read(fit, files))
        for run in runs(items, lambda _: batch, lambda item: (item.source.place // batch, item.size)):
            images = stacked(run)
            if judging.score_size is not None:
                images = resized(images, judging.score_size)
            with explained():
                judged = made.of(torch.tensor([item.source.place for item in run]), images)
            if width not in (None, judged.features.shape[1]):  # said now, not after hours
                raise InputError(
                    f"--reference: expected statistics of {judged.features.shape[1]} features, got those of {width}"
                )
            order.add(run[0].source.place // batch, judged)
        order.finish()
        pictures.skipped = sum(processes.of_all(share.skipped))
    names, seconds = [source.name for source in pictures.sources], time.perf_counter() - start
    found = _Found(given.paths[0], made, names, pictures.skipped, seconds)
    if processes.first:
        if not found.count:
            raise InputError(f"none of {pictures.skipped} pictures can be read")
        pictures.say_skipped()
    return found


def _kept(found: _Found, judging: Judging) -> FeatureStatistics:
    statistics = found.pictures.statistics()
    if judging.keep_reference is not None:
        with explained():
            statistics.save(judging.keep_reference, found.pictures.network.digest)
    return statistics


def _values(found: _Found, reference: FeatureStatistics, device: torch.device) -> dict[str, Any]:
    own = found.pictures.statistics()
    inception = found.pictures.inception.result() or (None, None)
    manifold: tuple[float | None, float | None] = (None, None)
    both = [each.features for each in (reference, own) if each.features is not None and len(each.features) > NEIGHBOURS]
    if len(both) == 2:
        manifold = precision_recall(both[0], both[1], device=device)
    per_class = _per_class(found)
    return {
        "pictures": found.count,
        "skipped": found.skipped,
        "classes": None if per_class is None else len(per_class),
        "fewest_of_a_class": None if per_class is None else min(per_class),
        "most_of_a_class": None if per_class is None else max(per_class),
        "fid": None if found.count < 2 else frechet_distance(reference, own),
        "inception_score": inception[0],
        "inception_score_std": inception[1],
        "precision": manifold[0],
        "recall": manifold[1],
        "images_per_second": found.per_second,
    }


def _per_class(found: _Found) -> list[int] | None:
    """How many pictures each class has, by folders or as `uniflow generate` has drawn them; None if there are none."""
    labels, classes = labels_of_folders(found.names)
    known = None if labels is None or classes is None else (labels, len(classes))
    known = known or classes_of(found.folder, found.names)
    return None if known is None else np.bincount(known[0][found.pictures.places], minlength=known[1]).tolist()


def _report(values: dict[str, Any], reference: FeatureStatistics, as_json: bool) -> None:
    _warn(values, len(reference.mean))
    if as_json:
        say_json(values)
        return
    columns = [Column("pictures", "pictures")]
    cells: list[str | float] = [str(values["pictures"])]
    if values["classes"] is not None:
        few, most = values["fewest_of_a_class"], values["most_of_a_class"]
        columns += [Column("classes", "classes"), Column("per class", "per_class")]
        cells += [str(values["classes"]), str(few) if few == most else f"{few} to {most}"]
    for heading, key, written in (
        ("FID", "fid", ".3f"),
        ("IS", "inception_score", ".3f"),
        ("±", "inception_score_std", ".3f"),
        ("precision", "precision", ".4f"),
        ("recall", "recall", ".4f"),
        ("images/s", "images_per_second", ".2f"),
    ):
        columns.append(Column(heading, key, written, 8))
        cells.append("not computed" if values[key] is None else values[key])
    Table(columns).row(*cells)
    if values["fid"] is None:
        say("FID was not computed: it needs at least two pictures")
    if values["inception_score"] is None:
        say(f"IS was not computed: it needs a network that gives probabilities of classes, and {SPLITS} pictures")
    if values["precision"] is None:
        sets = f"more than {NEIGHBOURS} pictures of each set, from a folder or a file that keeps them, and --manifold"
        say(f"precision and recall were not computed: they need features of {sets}")


def _warn(values: dict[str, Any], width: int) -> None:
    """Say what makes the numbers others than those of papers."""
    count, few, most = values["pictures"], values["fewest_of_a_class"], values["most_of_a_class"]
    if few != most:
        notice(f"warning: classes have from {few} to {most} pictures; the common protocol has equally many of each")
    if count <= width:
        notice(
            f"warning: {counted(count)} are no more than the {width} features: their covariance is singular, and FID "
            "far from that of many"
        )
    elif count < _PICTURES_OF_PAPERS:
        notice(f"warning: FID of {count} pictures is larger than of {_PICTURES_OF_PAPERS}, which papers take")


def _settings(given: Given, judging: Judging, network: FeatureNetwork, processes: Processes) -> dict[str, Any]:
    """What the scores depend on."""
    return {
        "version": __version__,
        "generated": str(given.paths[0]),
        "reference": str(judging.reference),
        "features": str(judging.features),
        "network": network.digest,
        "size": judging.size,
        "score_size": judging.score_size,
        "manifold": judging.manifold,
        "neighbours": NEIGHBOURS,
        "splits": SPLITS,
        "batch_size": judging.batch_size,
        "processes": processes.world,
    }
