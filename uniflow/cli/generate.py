"""`uniflow generate`: pictures from a generator of latents, a folder of them by one process or many, or a sheet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from uniflow.atomic import write_json
from uniflow.cli.bars import picture_bar
from uniflow.cli.files import check_folder, check_outputs
from uniflow.cli.inputs import InputError, Named, check_finite, choose_device, explained, load_checkpoint, load_model
from uniflow.cli.printing import counted, say
from uniflow.cli.workers import Workers
from uniflow.generation.drawing import draw_latents, picture_seeds, picture_size, usual_schedule
from uniflow.generation.model import FlowTransformer
from uniflow.latents import hash_weights
from uniflow.model import UniFlow
from uniflow.pictures import save_picture
from uniflow.reading import read_json, shown
from uniflow.sampler import Decoder
from uniflow.training.checkpoints import rests
from uniflow.training.lock import held
from uniflow.training.processes import Processes, joined
from uniflow_kernels.solvers import Interval, Plan

MANIFEST = "generation.json"
SHEET = ".png"
_FORMAT = "uniflow-generation-1"
_FOR_FID, _IN_A_ROW = 50_000, 8  # pictures, if the user does not say


@dataclass(frozen=True)
class HowToGenerate:
    """What the options of the command say of the drawing."""

    steps: int
    schedule: str
    solver: str
    cfg: float
    cfg_interval: Interval | None
    temperature: float
    decoder_steps: int | None
    seed: int
    batch_size: int
    workers: int

    def plan(self, model: FlowTransformer) -> Plan:
        """What the sampler does, checked."""
        schedule = usual_schedule(model) if self.schedule == "auto" else self.schedule
        plan = Plan(self.steps, schedule, self.solver, self.cfg, self.cfg_interval)
        with explained():
            plan.check()
        check_finite("--temperature", self.temperature)
        if plan.cfg != 1.0 and model.config.classes is None:
            raise InputError(f"--cfg: expected 1, as the generator has no classes to guide to, got {plan.cfg}")
        return plan


@dataclass(frozen=True)
class Drawer:
    """Pictures by their numbers alone: number i has class i of `classes`, taken again and again, and its own seeds."""

    model: FlowTransformer
    decoder: Decoder
    classes: list[int] | None
    plan: Plan
    how: HowToGenerate

    def pictures(self, batches: list[list[int]]) -> Iterator[Tensor]:
        """Uint8 [B, 3, H, W] on the host for each batch of numbers."""
        return self.decoder.stream(map(self._latents, batches))

    def _latents(self, numbers: list[int]) -> tuple[Tensor, tuple[int, int], Tensor]:
        seeds, of_decoder = picture_seeds(self.how.seed, numbers)
        labels = None
        if self.classes is not None:
            own = [self.classes[number % len(self.classes)] for number in numbers]
            labels = torch.tensor(own, dtype=torch.int64, device="cpu")
        latents = draw_latents(self.model, seeds, labels, self.plan, self.how.temperature)
        return latents, self.decoder.size, of_decoder

    def settings(self) -> dict[str, Any]:
        """What the pictures are of, by name, as JSON has it; neither how many they are nor in which batches."""
        tokenizer, steps = self.decoder.sampler.model, self.decoder.sampler.plan.steps
        assert isinstance(tokenizer, UniFlow)
        interval = self.plan.cfg_interval
        return {
            "generator": hash_weights(self.model),
            "tokenizer": hash_weights(tokenizer),
            "classes": self.classes,
            "size": list(self.decoder.size),
            **self.plan._asdict(),
            "cfg_interval": None if interval is None else list(interval),
            "temperature": self.how.temperature,
            "decoder_steps": steps,
            "seed": self.how.seed,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }


def generate(
    checkpoint: Named,
    tokenizer: Named,
    out: Path,
    count: int | None,
    classes: str | None,
    how: HowToGenerate,
    dtype: str,
    device: str,
    force: bool,
) -> None:
    """Write `count` pictures to a folder, going on with what is there; or a sheet with as many of each class."""
    is_sheet = out.suffix == SHEET and not out.is_dir()
    if is_sheet:
        check_outputs([out], force)
    elif out.suffix and not out.is_dir():
        raise InputError(f"--out: expected a file called *{SHEET} for a sheet, or a folder, got {out}")
    else:
        check_folder(out)
    with joined(choose_device(device), "the same command goes on from there") as (processes, own_device):
        drawer = _drawer(checkpoint, tokenizer, classes, how, dtype, str(own_device))
        if is_sheet:
            if processes.first:
                _draw_sheet(drawer, out, count or _IN_A_ROW)
        else:
            with held(out) if processes.first else nullcontext():
                _draw_folder(drawer, out, count or _FOR_FID, processes, force)
        processes.wait()


def _drawer(
    checkpoint: Named, tokenizer: Named, classes: str | None, how: HowToGenerate, dtype: str, device: str
) -> Drawer:
    model = load_checkpoint(FlowTransformer.from_pretrained, checkpoint, device, dtype)
    plan, chosen = how.plan(model), _chosen(classes, model)
    decoder = load_model(tokenizer, device, dtype)
    with explained():
        model.check_tokenizer(decoder)
        return Drawer(
            model,
            decoder.compile_decoder(how.batch_size, picture_size(model, decoder), how.decoder_steps),
            chosen,
            plan,
            how,
        )


def _chosen(classes: str | None, model: FlowTransformer) -> list[int] | None:
    """The labels that a text with commas names; all if there is none."""
    known, names = model.config.classes, model.config.names or []
    if known is None:
        if classes is not None:
            raise InputError("--classes: the generator has none")
        return None
    if classes is None:
        return list(range(known))
    labels = []
    for name in (part.strip() for part in classes.split(",")):
        if name in names:
            labels.append(names.index(name))
        elif name.isdecimal() and int(name) < known:
            labels.append(int(name))
        else:
            called = " or a name" if names else ""
            raise InputError(f"--classes: expected numbers from 0 to {known - 1}{called}, got {shown(name)}")
    return labels


def _draw_sheet(drawer: Drawer, out: Path, columns: int) -> None:
    """A row for each class; its pictures are the first ones of the class in a folder."""
    rows = len(drawer.classes) if drawer.classes is not None else _IN_A_ROW
    pictures: list[Tensor] = []
    with picture_bar("drawn") as bar:
        task = bar.add_task("", total=rows * columns)
        for batch in drawer.pictures(_blocks(rows * columns, drawer.how.batch_size)):
            pictures += batch
            bar.advance(task, len(batch))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_picture(rearrange(pictures, "(n rows) c h w -> c (rows h) (n w)", n=columns), out)
    say(f"{counted(len(pictures))} of {rows} rows written to {out}")


def _draw_folder(drawer: Drawer, out: Path, count: int, processes: Processes, force: bool) -> None:
    """The pictures that are not there yet; the processes share the batches."""
    blocks = processes.from_first(lambda: _begin(drawer, out, count, force))
    mine, there = blocks[processes.rank :: processes.world], {path.name for path in out.iterdir()}
    with picture_bar("drawn", shown=processes.first) as bar, Workers(drawer.how.workers) as files:
        task = bar.add_task("", total=sum(map(len, mine)))
        for numbers, pictures in zip(mine, drawer.pictures(mine), strict=True):
            for number, picture in zip(numbers, pictures, strict=True):
                if _name(number) not in there:
                    files.write(save_picture, picture, out / _name(number))
            bar.advance(task, len(numbers))
    made = sum(processes.of_all(sum(map(len, mine))))
    if processes.first:
        before = f", {count - made} of them from before" if made < count else ""
        say(f"{counted(count)} in {out}{before}")


def _begin(drawer: Drawer, out: Path, count: int, force: bool) -> list[list[int]]:
    """The batches to draw, after making sure that what is there is of the same; what was left half-written is deleted.

    A batch of which a part is missing is drawn whole, so that its pictures have the bits that they would have had.
    """
    for path in rests(out):
        path.unlink()
    settings = {"format": _FORMAT, **drawer.settings()}
    pictures = {path.name: path for path in out.glob(f"*{SHEET}")}
    if force:
        for path in (out / MANIFEST, *pictures.values()):
            path.unlink(missing_ok=True)
        pictures = {}
    if (out / MANIFEST).exists():
        with explained():
            there = read_json(out / MANIFEST)
        if there != settings:
            differing = ", ".join(name for name in settings if there.get(name) != settings[name]) or "kind"
            raise InputError(
                f"{out} holds pictures of another {differing}; --force deletes them, or take another --out"
            )
    elif pictures:
        raise InputError(
            f"{min(pictures.values())} exists, but no {MANIFEST}; --force deletes it, or take another --out"
        )
    else:
        write_json(out / MANIFEST, settings)
    expected = {_name(number) for number in range(count)}
    if others := sorted(pictures.keys() - expected):
        raise InputError(
            f"{out} holds {len(others)} pictures beside the first {count}, as {others[0]}; --force deletes all, or "
            "take another --out"
        )
    blocks = _blocks(count, drawer.how.batch_size)
    return [block for block in blocks if any(_name(number) not in pictures for number in block)]


def classes_of(folder: Path, names: Sequence[str]) -> tuple[np.ndarray, int] | None:
    """The class of each picture, int64 from 0 in the order in which they were chosen, and how many classes there are.

    None of a folder that `generate` has not drawn, or not of classes.

    Raises:
        ValueError: if the folder's manifest is damaged, or pictures are called otherwise than it calls them.
    """
    if not (folder / MANIFEST).exists():
        return None
    chosen = read_json(folder / MANIFEST).get("classes")
    if chosen is None:
        return None
    if not isinstance(chosen, list) or not chosen:
        raise ValueError(f"{folder / MANIFEST}: classes: expected a list of them, got {shown(chosen)}")
    stems = [name.removesuffix(SHEET) for name in names]
    for name, stem in zip(names, stems, strict=True):
        if not stem.isdecimal():
            raise ValueError(f"{folder}: expected pictures as {_name(0)}, as {MANIFEST} is there, got {shown(name)}")
    return np.array([int(stem) % len(chosen) for stem in stems], np.int64), len(chosen)


def _blocks(count: int, size: int) -> list[list[int]]:
    return [list(range(first, min(first + size, count))) for first in range(0, count, size)]


def _name(number: int) -> str:
    return f"{number:06}{SHEET}"
