"""`uniflow unifluid generate` and `ask`: pictures from captions, answers about pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from uniflow.cli.bars import picture_bar
from uniflow.cli.inputs import (
    InputError,
    check_folder,
    check_outputs,
    choose_device,
    choose_dtype,
    explained,
    find_pictures,
    read_picture,
)
from uniflow.normalization import denormalize, normalize
from uniflow.pictures import center_crop, save_picture, to_tensor
from uniflow.unifluid.asking import answer
from uniflow.unifluid.drawing import draw_tokens
from uniflow.unifluid.features import VisionFeatures
from uniflow.unifluid.model import UniFluid
from uniflow.unifluid.objective import check_tokenizer, check_vision
from uniflow.unifluid.texts import padded, prompt_ids, question_ids
from uniflow.unifluid.tokens import ImageTokenizer, read_image_tokenizer

_LONGEST_NAME = 60
SHEET = "sheet.png"


@dataclass(frozen=True)
class Drawing:
    """How to draw; the names are those of `uniflow.unifluid.drawing.draw_tokens`."""

    steps: int | None
    head_steps: int
    cfg: float
    temperature: float
    seed: int


def generate(
    captions: Sequence[str],
    checkpoint: Path,
    tokenizer: Path,
    out: Path,
    count: int,
    drawing: Drawing,
    batch_size: int,
    dtype: str,
    device: str,
    force: bool,
) -> None:
    """Draw `count` pictures for each caption, a PNG each, and all of them on one sheet, a row a caption."""
    check_folder(out)
    names = _names(captions)
    files = [out / f"{name}-{number}.png" for name in names for number in range(count)]
    check_outputs([*files, out / SHEET], force)
    model = load_unifluid(checkpoint, device, dtype)
    with explained():
        images = read_image_tokenizer(tokenizer, None).to(model.device)
        check_tokenizer(model, images)
        prompts = [prompt_ids(model.text_tokenizer, caption) for caption in captions for _ in range(count)]
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(drawing.seed)
    pictures: list[Tensor] = []
    with picture_bar("drawn") as bar:
        task = bar.add_task("", total=len(prompts))
        for first in range(0, len(prompts), batch_size):
            batch = _draw(model, images, prompts[first : first + batch_size], drawing, generator)
            for picture, file in zip(batch, files[first:], strict=False):
                save_picture(picture, file)
            pictures += batch
            bar.advance(task, len(batch))
    save_picture(rearrange(pictures, "(rows n) c h w -> c (rows h) (n w)", n=count), out / SHEET)
    print(f"{len(pictures)} pictures and {SHEET} written to {out}")


def _draw(
    model: UniFluid, images: ImageTokenizer, prompts: list[list[int]], drawing: Drawing, generator: torch.Generator
) -> list[Tensor]:
    ids, real = (part.to(model.device) for part in padded(prompts, model.text_tokenizer))
    with explained():
        tokens = draw_tokens(
            model,
            ids,
            real,
            drawing.steps,
            head_steps=drawing.head_steps,
            cfg=drawing.cfg,
            temperature=drawing.temperature,
            generator=generator,
        )
    pixels = denormalize(images.decode(tokens, generator)).clamp(0, 1)
    return list((pixels * 255).round().to(torch.uint8).cpu())


def ask(
    pictures: Sequence[Path],
    question: str,
    checkpoint: Path,
    vision: Path,
    longest: int,
    batch_size: int,
    dtype: str,
    device: str,
) -> None:
    """Print the answer to a question about each picture, a line each: the file, a tab, the answer."""
    if not question.strip():
        raise InputError("--question: expected a text")
    sources = find_pictures(pictures)
    model = load_unifluid(checkpoint, device, dtype)
    with explained():
        features = VisionFeatures(vision).to(model.device)
        check_vision(model, features)
        prompt = question_ids(model.text_tokenizer, question)
    for first in range(0, len(sources), batch_size):
        batch = sources[first : first + batch_size]
        crops = [to_tensor(center_crop(read_picture(source.path), features.image_size)) for source in batch]
        ids, real = (part.to(model.device) for part in padded([prompt] * len(batch), model.text_tokenizer))
        with explained():
            seen = features(normalize(torch.stack(crops).to(model.device)))
            answers = answer(model, seen, ids, real, longest)
        for source, text in zip(batch, answers, strict=True):
            print(f"{source.path}\t{' '.join(text.split())}", flush=True)


def load_unifluid(checkpoint: Path, device: str, dtype: str) -> UniFluid:
    """Read a checkpoint folder; the dtype "auto" is that of the file."""
    own = choose_dtype(dtype)
    chosen = choose_device(device)
    if not checkpoint.is_dir():
        raise InputError(f"no such checkpoint folder: {checkpoint}")
    with explained():
        return UniFluid.from_pretrained(checkpoint, chosen, own)


def _names(captions: Sequence[str]) -> list[str]:
    """A file name for each caption, all different."""
    names: list[str] = []
    for caption in captions:
        if not caption.strip():
            raise InputError("captions: expected texts, got an empty one")
        stem = re.sub(r"\W+", "-", caption.lower()).strip("-")[:_LONGEST_NAME] or "picture"
        name, number = stem, 1
        while name in names:
            number += 1
            name = f"{stem}_{number}"
        names.append(name)
    return names
