"""`uniflow probe`: what the layers of a tokenizer's encoder know of pictures' classes, and its teacher's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from uniflow.atomic import replacing, write_json
from uniflow.cli.bars import picture_bar
from uniflow.cli.files import (
    Given,
    Pictures,
    check_folder,
    check_outputs,
    check_pictures_folder,
    find_pictures,
    labels_of_folders,
)
from uniflow.cli.inputs import InputError, Named, choose_device, explained, load_checkpoint
from uniflow.cli.printing import Column, Table, counted, notice, say
from uniflow.cli.workers import Workers
from uniflow.evaluation.feature_set import FeatureSet, feature_key
from uniflow.evaluation.probing import Labelled, PooledLayers, linear_accuracy, neighbour_accuracy, split_by_class
from uniflow.normalization import normalize
from uniflow.pictures import center_crop, to_tensor
from uniflow.pretrained import pretrained_encoder
from uniflow.reading import shown
from uniflow.teachers import EncoderTeacher
from uniflow.training.checkpoints import rests
from uniflow.training.lock import held
from uniflow.training.processes import Processes, joined
from uniflow.training.state import encoder_source
from uniflow_kernels import __version__

_STUDENT, _TEACHER = "student", "teacher"
_RESULTS, _PLOT, _FEATURES = "probe.json", "probe.png", "features"


@dataclass(frozen=True)
class Probing:
    """Which features of which pictures, how they are judged, and where results go.

    Attributes:
        validation: folder of the pictures to judge by; if None, some of the only folder are held out.
        held_out: which share of each class.
        seed: of that choice.
        layers: numbers from 1; at the quarters of the depth if None.
        pooling: see `uniflow.evaluation.PooledLayers`.
        size: side of the squares that pictures are made; the checkpoint's own if None.
        neighbours: that have a voice each.
        c: of the logistic regression.
        out: folder for the results.
        keep: folder for the features; one in `out` if None.
    """

    validation: Path | None
    held_out: float
    seed: int
    layers: tuple[int, ...] | None
    pooling: str
    size: int | None
    neighbours: int
    c: float
    out: Path
    keep: Path | None

    def check(self, force: bool) -> None:
        """Find what cannot be before any work is done."""
        if missing := [package for package in ("sklearn", "matplotlib") if find_spec(package) is None]:
            raise InputError(f"the probe needs {', '.join(missing)}: pip install 'uniflow-kernels[probe]'")
        for name, value, most in (("--held-out", self.held_out, 1.0), ("--c", self.c, math.inf)):
            if not 0 < value < most:
                raise InputError(f"{name}: expected a number above 0{' and below 1' * (most == 1)}, got {value}")
        check_folder(self.features)
        check_outputs([self.out / _RESULTS, self.out / _PLOT], force)

    @property
    def features(self) -> Path:
        """Folder for the features of all encoders and pictures."""
        return self.keep or self.out / _FEATURES


@dataclass(frozen=True)
class _Encoder:
    """An encoder as it is read, and what the fields of a config around it are."""

    encoder: EncoderTeacher
    fields: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, device: torch.device, dtype: torch.dtype | None, weights: str | None) -> _Encoder:
        pretrained = pretrained_encoder(folder, weights=weights)
        encoder = EncoderTeacher(pretrained.embeddings, pretrained.encoder, dtype).to(device)
        return cls(encoder, pretrained.fields)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.device


@dataclass(frozen=True)
class _Folder:
    """The pictures of a folder, by their names in it, and the class of each, [N]."""

    pictures: Pictures
    names: list[str]
    labels: np.ndarray
    classes: list[str]

    @classmethod
    def of(cls, folder: Path, pictures: Pictures) -> _Folder:
        names = [source.path.relative_to(folder).as_posix() for source in pictures.sources]
        labels, classes = labels_of_folders(names)
        if labels is None or classes is None or len(classes) < 2:
            raise InputError(f"{folder}: expected two folders of pictures or more, one a class, and no pictures beside")
        return cls(pictures, names, labels, classes)

    def labelled_as(self, classes: Sequence[str]) -> np.ndarray:
        """The labels by the places in another list of classes."""
        if others := [name for name in self.classes if name not in classes]:
            raise InputError(f"--validation: expected the classes of the other folder, got {others[0]} too")
        return np.array([classes.index(name) for name in self.classes])[self.labels]


@dataclass(frozen=True)
class _Split:
    """Which pictures are seen, and which are not: the classes of these, and -1 for all others, [N] of a folder each."""

    seen: np.ndarray
    unseen: np.ndarray

    @classmethod
    def of(cls, folders: Sequence[_Folder], probing: Probing) -> _Split:
        labels = folders[0].labels
        if len(folders) > 1:
            return cls(labels, folders[1].labelled_as(folders[0].classes))
        with explained():
            seen, unseen = split_by_class(labels, probing.held_out, probing.seed)
        places = np.arange(len(labels))
        return cls(np.where(np.isin(places, seen), labels, -1), np.where(np.isin(places, unseen), labels, -1))


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """The numbers in "6,12"; None for None."""
    try:
        return None if text is None else tuple(int(number) for number in text.split(","))
    except ValueError:
        raise InputError(f"--layers: expected numbers as in 6,12, got {shown(text)}") from None


def probe(
    folder: Path,
    checkpoint: Named,
    encoder: Path | None,
    probing: Probing,
    batch_size: int,
    workers: int,
    strict: bool,
    max_pixels: int,
    dtype: str,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    """Print the accuracy of classifiers on the features of both encoders, layer by layer; write it, and a plot."""
    probing.check(force)
    paths = [folder] if probing.validation is None else [folder, probing.validation]
    for path in paths:
        check_pictures_folder(path)
    kept: dict[str, list[FeatureSet]] = {}
    with (
        joined(choose_device(device), "the same command goes on from there") as (processes, own),
        Workers(workers) as files,
        ExitStack() as stack,
    ):
        given = [Given([path], strict, max_pixels) for path in paths]
        folders = [_Folder.of(*pair) for pair in zip(paths, _all_found(given, files, stack), strict=True)]
        split = _Split.of(folders, probing)
        if probing.neighbours > (most := np.count_nonzero(split.seen >= 0)):
            raise InputError(f"--neighbours: expected at most {most}, the pictures to see, got {probing.neighbours}")
        with explained():
            known = encoder_source(checkpoint.folder) if encoder is None else None
        teacher = Path(known) if known is not None and Path(known).is_dir() else encoder
        named = {_STUDENT: checkpoint} | ({} if teacher is None else {_TEACHER: Named(teacher)})
        encoders = {name: load_checkpoint(_Encoder.read, each, str(own), dtype) for name, each in named.items()}
        side = _side(encoders, probing.size)
        pooled = _pooled(encoders, probing)
        if teacher is None and processes.first:
            reason = "does not say what it was distilled from"
            if known is not None:
                reason = f"was distilled from {known}, which is not here"
            notice(f"the checkpoint {reason}: --encoder DIR compares with it")
        for name, layers in pooled.items():
            for each in folders:
                named_files = zip(each.names, (source.path for source in each.pictures.sources), strict=True)
                key = feature_key(layers, encoders[name].fields, side, named_files, largest=max_pixels)
                if len(set(processes.of_all(key))) > 1:
                    raise InputError("the processes do not find the same pictures or encoders; all must see the same")
                features = FeatureSet(probing.features / key, layers.layers, len(each.names))
                kept.setdefault(name, []).append(features)
                bar = picture_bar(f"features of the {name}", shown=processes.first)
                width = encoders[name].fields["hidden_size"]
                with explained():
                    _make(features, layers, width, each.pictures, side, batch_size, files, bar, processes)
    if processes.first:
        settings = {
            "version": __version__,
            "pictures": str(folder),
            "validation": None if probing.validation is None else str(probing.validation),
            "checkpoint": str(checkpoint.folder),
            "weights": checkpoint.weights,
            "encoder": None if teacher is None else str(teacher),
            "size": side,
            "dtype": {name: str(each.dtype).removeprefix("torch.") for name, each in encoders.items()},
            **{name: getattr(probing, name) for name in ("held_out", "seed", "pooling", "neighbours", "c")},
        }
        _report(kept, split, probing, settings, as_json)


def _all_found(given: Sequence[Given], files: Workers, stack: ExitStack) -> list[Pictures]:
    return [stack.enter_context(find_pictures(each, files)) for each in given]


def _side(encoders: Mapping[str, _Encoder], size: int | None) -> int:
    """Of the squares that both encoders are given."""
    side = size or encoders[_STUDENT].fields["image_size"]
    for name, each in encoders.items():
        patch, channels = each.fields["patch_size"], each.fields["num_channels"]
        if side % patch:
            raise InputError(f"--size: expected a multiple of the {name}'s patch, {patch}, got {side}")
        if channels != 3:
            raise InputError(f"the {name}: expected an encoder of pictures in colours, got one of {channels} channels")
    return side


def _pooled(encoders: Mapping[str, _Encoder], probing: Probing) -> dict[str, PooledLayers]:
    """The student's layers, and the teacher's of the same numbers."""
    pooled: dict[str, PooledLayers] = {}
    numbers = probing.layers
    for name, each in encoders.items():
        try:
            pooled[name] = PooledLayers(each.encoder, numbers, probing.pooling)
        except ValueError as error:
            raise InputError(f"the {name}: {error}") from None
        numbers = pooled[name].layers
    return pooled


def _make(
    kept: FeatureSet,
    layers: PooledLayers,
    width: int,
    pictures: Pictures,
    side: int,
    batch_size: int,
    files: Workers,
    bar: Progress,
    processes: Processes,
) -> None:
    """The parts that are not there yet, of which each process makes its own."""
    with held(kept.folder) if processes.first else nullcontext(), bar:
        if processes.first:
            for path in rests(kept.folder):
                path.unlink()
        missing = processes.from_first(kept.missing)[processes.rank :: processes.world]
        parts = {part: pictures.within(kept.places(part)) for part in missing}
        task = bar.add_task("", total=sum(len(part.sources) for part in parts.values())) if parts else None
        for part, its in parts.items():
            numbers, made = [], [torch.empty(len(layers.layers), 0, width)]
            read = its.read(lambda picture: to_tensor(center_crop(picture, side)), files)
            while batch := list(islice(read, batch_size)):
                numbers += [source.place for source, _, _ in batch]
                images = torch.stack([pixels for _, _, pixels in batch]).to(layers.encoder.device, non_blocking=True)
                made.append(layers(normalize(images)).cpu())
                if task is not None:
                    bar.advance(task, len(batch))
            kept.write(part, numbers, torch.cat(made, 1))
        processes.wait()


def _report(
    kept: Mapping[str, Sequence[FeatureSet]],
    split: _Split,
    probing: Probing,
    settings: dict[str, Any],
    as_json: bool,
) -> None:
    """Judge layer after layer; a row is printed when its classifiers are done."""
    students = kept[_STUDENT]
    with explained():
        numbers = [features.numbers() for features in students]
    unread = sum(features.pictures for features in students) - sum(map(len, numbers))
    if unread:
        notice(f"{unread} of {sum(features.pictures for features in students)} pictures cannot be read: skipped")
    seen, unseen = split.seen[numbers[0]], split.unseen[numbers[-1]]
    counts = {"seen": int((seen >= 0).sum()), "unseen": int((unseen >= 0).sum()), "skipped": unread}
    if len(np.unique(seen[seen >= 0])) < 2 or not counts["unseen"]:
        raise InputError("expected pictures to see of two classes or more, and some to judge by; they cannot be read")
    columns = [
        Column(f"{heading}, {name} (%)", f"{key}_{name}", ".2f")
        for key, heading in (("knn", "kNN"), ("linear", "linear"))
        for name in (_STUDENT, _TEACHER)
        if as_json or name in kept
    ]
    table = Table([Column("layer", "layer", "d", 5), *columns], as_json)
    rows: list[dict[str, Any]] = []
    for layer in students[0].layers:
        row: dict[str, Any] = {"layer": layer} | {column.key: None for column in columns}
        for name, sets in kept.items():
            with explained():
                given = sets[0].features(layer)
                asked = given if len(sets) == 1 else sets[1].features(layer)
                known = Labelled(given[seen >= 0], seen[seen >= 0])
                others = Labelled(asked[unseen >= 0], unseen[unseen >= 0])
                row[f"knn_{name}"] = neighbour_accuracy(known, others, probing.neighbours)
                row[f"linear_{name}"] = linear_accuracy(known, others, probing.c)
        table.row(*row.values())
        rows.append(row)
    probing.out.mkdir(parents=True, exist_ok=True)
    write_json(probing.out / _RESULTS, {"scores": rows, **counts, "settings": settings})
    _draw(rows, list(kept), probing.out / _PLOT)
    if not as_json:
        say(f"{counted(counts['seen'])} seen, {counts['unseen']} not; written to {probing.out}: {_RESULTS}, {_PLOT}")


def _draw(rows: Sequence[Mapping[str, Any]], names: Sequence[str], path: Path) -> None:
    """Accuracy over the layers, a line for each encoder."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained", dpi=120)
    layers = [row["layer"] for row in rows]
    kinds = {"knn": "nearest neighbours", "linear": "linear classifier"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), kinds.items(), strict=True):
        for name in names:
            axes.plot(layers, [row[f"{key}_{name}"] for row in rows], marker="o", label=name)
        axes.set(title=title, xlabel="layer", xticks=layers)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy, %")
    figure.axes[0].legend()
    with replacing(path) as temporary:
        figure.savefig(temporary)
