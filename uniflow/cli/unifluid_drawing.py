"""`uniflow unifluid generate`: pictures from captions, named one by one or in a file, by one process or several."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from uniflow.atomic import replacing
from uniflow.cli.bars import picture_bar
from uniflow.cli.batches import runs, seeds_of_blocks
from uniflow.cli.files import check_folder, check_outputs, read_picture
from uniflow.cli.inputs import InputError, Named, check_finite, check_text, choose_device, explained, load_checkpoint
from uniflow.cli.printing import say
from uniflow.evaluation.scores import InOrder
from uniflow.pictures import center_crop, save_picture, to_tensor
from uniflow.reading import shown
from uniflow.training.processes import Processes, joined
from uniflow.unifluid.captions import pictures_of, read_lines, text_of
from uniflow.unifluid.config import UniFluidConfig
from uniflow.unifluid.drawing import Sources, draw_pictures, see_sources
from uniflow.unifluid.features import VisionFeatures
from uniflow.unifluid.guidance import SCHEDULES
from uniflow.unifluid.model import UniFluid
from uniflow.unifluid.objective import check_tokenizer, read_vision
from uniflow.unifluid.orders import group_sizes
from uniflow.unifluid.slots import source_slots
from uniflow.unifluid.texts import prompt_ids
from uniflow.unifluid.tokens import ImageTokenizer, read_image_tokenizer

_LONGEST_NAME = 60
SHEET, LINES = "sheet.png", "pictures.jsonl"


@dataclass(frozen=True)
class Drawing:
    """Who draws, and how.

    Attributes:
        checkpoint: of the UniFluid.
        tokenizer: folder of its image tokenizer.
        vision: folder of its encoder, for a model that sees sources by it and does not have one itself.
        size: HxW in pixels, one of those that the model draws; the first one if None.
        how: arguments of `uniflow.unifluid.drawing.draw_tokens`.
        count: pictures for each caption.
        seed: of all that is drawn.
        batch_size: pictures at a time.
        dtype, device: as the options of the same name.
    """

    checkpoint: Named
    tokenizer: Path
    vision: Path | None
    size: str | None
    how: dict[str, Any]
    count: int
    seed: int
    batch_size: int
    dtype: str
    device: str

    def check(self, prompts: Sequence[Prompt], option: str) -> None:
        """Find a bad value before any work is done; `option` is where sources are given."""
        for name in ("temperature", "cfg", "cfg_source"):
            check_finite(f"--{name.replace('_', '-')}", self.how[name])
        if self.how["cfg_schedule"] not in SCHEDULES:
            expected = f"expected one of {', '.join(SCHEDULES)}"
            raise InputError(f"--cfg-schedule: {expected}, got {shown(self.how['cfg_schedule'])}")
        if self.how["cfg_source"] != 1 and not all(prompt.sources for prompt in prompts):
            raise InputError(f"--cfg-source: expected 1 without {option}, got {self.how['cfg_source']}")


@dataclass(frozen=True)
class Prompt:
    """What a picture is drawn from: a caption, and other pictures if there are any; the name that it is written to."""

    caption: str
    sources: tuple[Path, ...]
    name: str


def generate(captions: Sequence[str], sources: Sequence[Path], drawing: Drawing, out: Path, force: bool) -> None:
    """Draw pictures for each caption, a PNG each, and all of them on one sheet, a row a caption.

    All are drawn from the `sources` too. The processes of torchrun share the pictures, the same for any number of them.
    """
    names = [f"{name}-{number}.png" for name in _names(captions) for number in range(drawing.count)]
    each = [caption for caption in captions for _ in range(drawing.count)]
    prompts = [Prompt(caption, tuple(sources), name) for caption, name in zip(each, names, strict=True)]
    drawing.check(prompts, "--source")
    for source in sources:
        read_picture(source)  # what is wrong with it is found now
    check_folder(out)
    check_outputs([out / name for name in (*names, SHEET)], force)
    with joined(choose_device(drawing.device), "the same command begins anew") as (processes, own):
        pictures = _draw(prompts, drawing, out, own, processes, kept=True)
        if processes.first:
            sheet = rearrange(pictures, "(rows n) c h w -> c (rows h) (n w)", n=drawing.count)
            save_picture(sheet, out / SHEET)
            say(f"{len(pictures)} pictures and {SHEET} written to {out}")
        processes.wait()


def generate_file(file: Path, drawing: Drawing, out: Path, force: bool) -> None:
    """Draw pictures for each line of a file of captions, and write of what line each picture is.

    The processes of torchrun share the pictures, the same for any number of them.
    """
    with explained():
        lines = list(read_lines(file))
        captions = [text_of(fields.get("caption"), "caption", where, required=True) for where, fields in lines]
        sources = [tuple(pictures_of(file.parent, "source", fields, where)) for where, fields in lines]
    if not lines:
        raise InputError(f"{file} holds no captions")
    prompts = [
        Prompt(caption, own, f"{line:06}-{number}.png")
        for line, (caption, own) in enumerate(zip(captions, sources, strict=True))
        for number in range(drawing.count)
    ]
    drawing.check(prompts, "source in every line")
    check_folder(out)
    check_outputs([out / name for name in (*(prompt.name for prompt in prompts), LINES)], force)
    with joined(choose_device(drawing.device), "the same command begins anew") as (processes, own_device):
        _draw(prompts, drawing, out, own_device, processes, kept=False)
        if processes.first:
            with replacing(out / LINES) as temporary, temporary.open("w", encoding="utf-8") as written:
                for place, prompt in enumerate(prompts):
                    said = lines[place // drawing.count][1] | {"image": prompt.name}
                    written.write(json.dumps(said, ensure_ascii=False) + "\n")
            say(f"{len(prompts)} pictures and {LINES} written to {out}")
        processes.wait()


def _draw(
    prompts: Sequence[Prompt], drawing: Drawing, out: Path, device: torch.device, processes: Processes, kept: bool
) -> list[Tensor]:
    """Write the pictures; all of them in the first process if they are kept, uint8 [3, H, W]."""
    model = load_checkpoint(UniFluid.from_pretrained, drawing.checkpoint, str(device), drawing.dtype)
    with explained():
        config = model.config
        tokenizer = read_image_tokenizer(drawing.tokenizer, packing=config.packing, grid=config.grid).to(model.device)
        check_tokenizer(model, tokenizer)
        if drawing.size is not None:
            tokenizer = tokenizer.at_size(_known_size(drawing.size, config, tokenizer.side))
        count = tokenizer.grid[0] * tokenizer.grid[1]
        group_sizes(count, drawing.how["steps"] or 1)
        vision = _vision(prompts, drawing, model)
        _check_context(prompts, model, vision, count)
    size, pictures = drawing.batch_size, list[Tensor]()
    blocks = -(-len(prompts) // size)
    seeds = seeds_of_blocks(drawing.seed, blocks)
    out.mkdir(parents=True, exist_ok=True)
    with picture_bar("drawn", shown=processes.first) as bar:
        task = bar.add_task("", total=len(prompts))

        def take(drawn: tuple[int, list[Tensor]]) -> None:
            pictures.extend(drawn[1])
            bar.advance(task, drawn[0])

        order = InOrder[tuple[int, list[Tensor]]](processes, blocks, take)
        for block in filter(order.is_mine, range(blocks)):
            generator = torch.Generator().manual_seed(seeds[block])
            own = prompts[block * size : (block + 1) * size]
            for run in runs(own, lambda _: size, lambda prompt: len(prompt.sources)):
                with explained():
                    seen = _seen(run, model, tokenizer, vision)
                    captions = [prompt.caption for prompt in run]
                    drawn = draw_pictures(model, tokenizer, captions, generator, seen, **drawing.how).cpu()
                for picture, prompt in zip(drawn, run, strict=True):
                    save_picture(picture, out / prompt.name)
                order.add(block, (len(run), list(drawn) if kept else []))
        order.finish()
    return pictures


def _vision(prompts: Sequence[Prompt], drawing: Drawing, model: UniFluid) -> VisionFeatures | None:
    """The encoder by which sources are seen; None if there are none, or they are seen otherwise."""
    if not any(prompt.sources for prompt in prompts):
        return None
    if model.config.sources is None:
        raise InputError("sources: the model draws from text alone")
    if model.config.sources == "tokens":
        return None
    return read_vision(drawing.vision, model)


def _known_size(size: str, config: UniFluidConfig, side: int) -> tuple[int, int]:
    """(H, W) in pixels of a grid that the model draws, of tokens of so many pixels a side, as the option names it."""
    pixels = [(side * lines, side * columns) for lines, columns in config.grids or (config.grid,)]
    known = {f"{height}x{width}": (height, width) for height, width in pixels}
    if size not in known:
        raise InputError(f"--size: expected one that the model draws, {', '.join(known)}; got {shown(size)}")
    return known[size]


def _check_context(prompts: Sequence[Prompt], model: UniFluid, vision: VisionFeatures | None, tokens: int) -> None:
    """Find what is too long before anything is drawn."""
    features = 0 if vision is None else vision.tokens
    slots = len(source_slots(model.config.sources, features, tokens))
    for caption, count in {(prompt.caption, len(prompt.sources)) for prompt in prompts}:
        own = len(prompt_ids(model.text_tokenizer, caption))
        model.check_context(slots * count + own + tokens)


def _seen(
    prompts: Sequence[Prompt], model: UniFluid, tokenizer: ImageTokenizer, vision: VisionFeatures | None
) -> Sources | None:
    """What is seen of the sources of prompts that all have equally many; those of several prompts are seen once."""
    if not prompts[0].sources:
        return None
    opened = {source: read_picture(source) for prompt in prompts for source in prompt.sources}
    sizes = tokenizer.image_size, tokenizer.image_size if vision is None else vision.image_size
    pixels = [torch.stack([to_tensor(center_crop(picture, size)) for picture in opened.values()]) for size in sizes]
    seen = see_sources(model, tokenizer, vision, *(part.to(model.device) for part in pixels))
    place = {source: row for row, source in enumerate(opened)}
    rows = torch.tensor([place[source] for prompt in prompts for source in prompt.sources], device=model.device)
    return Sources(*(None if part is None else part[rows] for part in seen))


def _names(captions: Sequence[str]) -> list[str]:
    """A file name for each caption, all different."""
    names: list[str] = []
    for caption in captions:
        check_text("captions", caption)
        stem = re.sub(r"\W+", "-", caption.lower()).strip("-")[:_LONGEST_NAME] or "picture"
        name, number = stem, 1
        while name in names:
            number += 1
            name = f"{stem}_{number}"
        names.append(name)
    return names
