"""`uniflow unifluid train`, `generate` and `ask`: pictures from captions, answers about pictures."""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from uniflow.cli.batches import runs, seeds_of_blocks
from uniflow.cli.files import Given, check_folder, check_outputs, find_pictures, picture_suffixes
from uniflow.cli.inputs import InputError, check_text, choose_device, explained, load_checkpoint
from uniflow.cli.printing import notice, say
from uniflow.cli.runs import Trained, find_shards, train_as_written
from uniflow.cli.unifluid_questions import Asking, drawn_by
from uniflow.cli.workers import Workers
from uniflow.evaluation.scores import InOrder
from uniflow.normalization import normalize
from uniflow.training.processes import Processes, joined
from uniflow.unifluid.asking import answer
from uniflow.unifluid.attention import why_not_blocks
from uniflow.unifluid.backbone import read_backbone
from uniflow.unifluid.cached import CachedLatents
from uniflow.unifluid.captions import CaptionedPictures, CaptionFolder, CaptionShards, Examples, every_text
from uniflow.unifluid.config import UniFluidConfig
from uniflow.unifluid.features import VisionFeatures
from uniflow.unifluid.model import UniFluid
from uniflow.unifluid.objective import UniFluidObjective, read_vision
from uniflow.unifluid.orders import group_sizes
from uniflow.unifluid.places import Grid
from uniflow.unifluid.recipe import DataChoice, ModelChoice, UniFluidRun
from uniflow.unifluid.sizes import DrawingSize
from uniflow.unifluid.slots import source_slots
from uniflow.unifluid.texts import (
    ids_fingerprint,
    make_text_tokenizer,
    padded,
    read_text_tokenizer,
)
from uniflow.unifluid.tiles import most_tiles, tiles_of
from uniflow.unifluid.tokens import ImageTokenizer, UniFlowTokens, image_tokens, read_image_tokenizer
from uniflow.unifluid.validation import DrawingValidator

_VALIDATED = 256  # examples that a validation looks at
_AT_A_TIME = 32  # pictures, for their statistics


def train(config: Path, out: Path | None, resume: str | None, device: str, force: bool) -> None:
    """Train a UniFluid as the file says."""
    train_as_written(config, UniFluidRun, _build, out, resume, device, force)


def _build(run: UniFluidRun, device: torch.device, processes: Processes) -> Trained:
    data, recipe = run.data, run.recipe
    first = run.sizes[0] if run.sizes else run.image_size
    tokenizer = read_image_tokenizer(run.tokenizer, first, run.packing).to(device)
    at_sizes = [tokenizer, *(tokenizer.at_size(size) for size in (run.sizes or ())[1:])]
    examples = _examples(data)
    vision = _vision(run, tokenizer).to(device) if _reads(run, examples) else None
    trained = vision if any(stage.vision_learning_rate is not None for stage in recipe.stages) else None
    torch.manual_seed(recipe.seed)
    grids = None if run.sizes is None else tuple(each.grid for each in at_sizes)
    student = _student(run.model, examples, tokenizer, vision, trained, grids).to(device)
    if device.type == "cuda" and processes.first and (reason := why_not_blocks(student.backbone, device)):
        notice(f"the transformer trains with masks of all pairs of slots: {reason}")
    if run.model.checkpointing != "none":
        student.gradient_checkpointing_enable(flow_head=run.model.checkpointing == "all")
    sizes = (tokenizer.image_size, vision.image_size if vision else tokenizer.image_size)
    texts = (student.text_tokenizer, *sizes, _longest_text(data, student, vision))
    seen = vision.tokens if vision else 0
    own, *others = (_drawing_size(student, each, seen) for each in at_sizes)
    slots: dict[str, Any] = {
        "features": seen,
        "tiles": student.config.vision_tiles,
        "source": own.source,
        "context": student.check_context(0),
        "tokens": own.tokens,
        "others": others,
    }
    dropped = (data.drop_caption, data.flip, data.drop_source)
    cached = None if data.latents is None else CachedLatents(data.latents, tokenizer, examples, data.flip)
    slots["together"] = recipe.batch_size  # all processes have pictures of one size in a step
    samples = CaptionedPictures(examples, *texts, recipe.seed, data.reading_share, *dropped, **slots, cached=cached)
    _, size = recipe.micro_batches(processes.world)
    samples.check_batches(size)
    _check_sizes(samples)
    student.train_for(drawing=samples.reading_share < 1, reading=samples.reading_share > 0)
    if samples.reading_share < 1:
        student.set_statistics(_tokens(samples, tokenizer, data.statistics, device))
    objective = UniFluidObjective(student, tokenizer, None if trained else vision, **asdict(run.objective))
    if data.validation is None:
        return Trained(objective, samples, None)
    unseen, slots["together"] = CaptionFolder(data.validation), size
    share = None if vision and samples.reading_share < 1 else float(samples.reading_share)  # scored is what is trained
    scored = CaptionedPictures(unseen, *texts, recipe.seed, share, drop_caption=0.0, drop_source=0.0, **slots)
    first_ones = [] if share == 1 else _first_captions(scored, run.samples.captions)
    shown = scored.collate([scored.whole("drawing", number) for number in first_ones])[0] if first_ones else None
    how = {name: value for name, value in asdict(run.samples).items() if name != "captions"}
    from_others = any(unseen.texts(number).sources for number in first_ones)
    if run.samples.cfg_source != 1 and not (student.config.sources and from_others):
        raise InputError(f"samples.cfg_source: expected 1 for data without sources, got {run.samples.cfg_source}")
    if run.samples.steps is not None:
        group_sizes(
            min(each.tokens for each in samples.sizes), run.samples.steps
        )  # too many are found now, not at the first validation
    validator = DrawingValidator(objective, scored, min(len(unseen), _VALIDATED), size, shown, how)
    return Trained(objective, samples, validator)


def _reads(run: UniFluidRun, examples: Examples) -> bool:
    """Whether features of pictures are needed, to answer questions or to draw from sources."""
    if run.model.sources != "tokens" and _draws_from_others(examples):
        return True
    return run.data.reading_share != 0 and any(examples.texts(n).conversation() for n in range(len(examples)))


def _draws_from_others(examples: Examples) -> bool:
    # of shards, whose texts are read each time, no picture has sources
    return isinstance(examples, CaptionFolder) and any(examples.texts(n).sources for n in range(len(examples)))


def _vision(run: UniFluidRun, tokenizer: ImageTokenizer) -> VisionFeatures:
    if run.vision is None and not isinstance(tokenizer, UniFlowTokens):
        raise InputError(
            f"vision: the data have questions or sources, and {run.tokenizer} gives no features to read; expected the "
            "folder of a vision encoder, or data.reading_share: 0 and model.sources: tokens"
        )
    return VisionFeatures(run.vision or run.tokenizer, merge=run.model.vision_merge)


def _longest_text(data: DataChoice, student: UniFluid, vision: VisionFeatures | None) -> int:
    """How many ids a text may have beside a picture."""
    read = vision.tokens * most_tiles(student.config.vision_tiles) if vision else 0
    picture = max(student.config.tokens, read)
    room = student.check_context(picture + 1) + 1
    if (data.max_text or 0) > room:
        raise InputError(
            f"data.max_text: expected at most {room}, what the transformer's context leaves beside a picture of "
            f"{picture} tokens; got {data.max_text}"
        )
    return data.max_text or room


def _examples(data: DataChoice) -> CaptionFolder | CaptionShards:
    if data.folder is not None:
        return CaptionFolder(data.folder)
    return CaptionShards(find_shards(str(data.shards)), picture_suffixes())


def _drawing_size(student: UniFluid, tokenizer: ImageTokenizer, features: int) -> DrawingSize:
    """The tokenizer's size, with what it makes of a picture and of a source in which the student sees features."""
    count = tokenizer.grid[0] * tokenizer.grid[1]
    return DrawingSize(tokenizer.image_size, count, tuple(source_slots(student.config.sources, features, count)))


def _check_sizes(samples: CaptionedPictures) -> None:
    """Refuse a size that no picture has: it would be drawn as if it had been trained."""
    for number, (size, *_) in enumerate(samples.sizes):
        if samples.reading_share < 1 and not samples.count(number):
            raise InputError(f"sizes: no picture of the data is nearest to {size[0]}x{size[1]}")


def _student(
    model: ModelChoice,
    examples: Examples,
    tokenizer: ImageTokenizer,
    vision: VisionFeatures | None,
    trained: VisionFeatures | None,
    grids: tuple[Grid, ...] | None,
) -> UniFluid:
    backbone = None if model.backbone is None else read_backbone(model.backbone)
    own_tokenizer = model.text_tokenizer or model.backbone
    if own_tokenizer is not None:
        texts = read_text_tokenizer(own_tokenizer)
    else:
        texts = make_text_tokenizer(every_text(examples), model.vocabulary)
    values = {"vocab_size": len(texts), **(model.config or {})} if backbone is None else backbone.config.to_diff_dict()
    values.pop("transformers_version", None)  # says nothing of the model
    config = UniFluidConfig(
        values,
        tokenizer.channels,
        tokenizer.grid,
        model.head_width,
        model.head_depth,
        model.head,
        model.order,
        None if vision is None else vision.width,
        model.sources if _draws_from_others(examples) else None,
        tokenizer.fingerprint(),
        None if vision is None else vision.fingerprint(),
        ids_fingerprint(texts),
        model.vision_merge,
        model.vision_layers,
        tokenizer.packing,
        model.vision_tiles,
        grids=grids,
        lora=model.lora,
        vision_encoder=None if trained is None else trained.fields,
    )
    return UniFluid(config, texts, backbone, trained).float()


def _tokens(samples: CaptionedPictures, tokenizer: ImageTokenizer, count: int, device: torch.device) -> Tensor:
    """Image tokens [..., C] of the first pictures to be drawn, about `count` of them or an epoch."""
    found: list[Tensor] = []
    at_a_time = _AT_A_TIME if len(samples.sizes) == 1 else math.gcd(_AT_A_TIME, samples.together)
    last = math.ceil(min(count, len(samples.examples)) / (1 - samples.reading_share))
    for first in range(0, last, at_a_time):
        values = [samples[position].value for position in range(first, min(last, first + at_a_time))]
        images = samples.collate(values)[0].images.to(device)
        own = tokenizer if len(samples.sizes) == 1 else tokenizer.at_size((images.shape[2], images.shape[3]))
        found.append(image_tokens(own, images).flatten(0, 1))
    return torch.cat(found)


def _first_captions(samples: CaptionedPictures, count: int) -> list[int]:
    """The numbers of the first captions that differ from each other, of pictures of one size; with sources, of any."""
    numbers: dict[object, int] = {}
    for number in range(len(samples.examples)):
        texts = samples.examples.texts(number)
        if texts.caption and samples.nearest[number] == samples.nearest[next(iter(numbers.values()), number)]:
            numbers.setdefault(number if texts.sources else texts.caption, number)
    return list(islice(numbers.values(), count))


def merge(checkpoint: Path, out: Path, force: bool) -> None:
    """Write a model with adapters as a plain one."""
    check_folder(out)
    check_outputs([out / "config.json", out / "model.safetensors"], force)
    with explained():
        model = UniFluid.from_pretrained(checkpoint)
        model.merge_adapters()
    model.save_pretrained(out)
    say(f"UniFluid written to {out}")


def ask(given: Given, question: str, asking: Asking) -> None:
    """Print the answer to a question about each picture, a line each: the file, a tab, the answer.

    The processes of torchrun share the pictures, and the first prints.
    """
    asking.check()
    check_text("--question", question)
    start = joined(choose_device(asking.device), "the same command begins anew")
    with start as (processes, own), Workers(1) as files, find_pictures(given, files) as pictures:
        model = load_checkpoint(UniFluid.from_pretrained, asking.checkpoint, str(own), asking.dtype)
        with explained():
            features = read_vision(asking.vision, model)
            asking.check_length(model, features, question)

        def fit(picture: Image.Image) -> Tensor:
            return tiles_of(picture, features.image_size, model.config.vision_tiles)

        def take(answered: tuple[Path, str]) -> None:
            say(str(answered[0]), " ".join(answered[1].split()))

        size = asking.batch_size
        blocks = -(-len(pictures.sources) // size)
        seeds = seeds_of_blocks(asking.seed, blocks)
        order = InOrder[tuple[Path, str]](processes, blocks, take)
        share = pictures.share(size, processes.rank, processes.world)
        for batch in runs(share.read(fit, files), lambda _: size, lambda each: each[0].place // size):
            block = batch[0][0].place // size
            prompts = [asking.prompt(model, features, question, len(tiles)) for _, _, tiles in batch]
            ids, real = (part.to(model.device) for part in padded(prompts, model.text_tokenizer))
            pixels = torch.cat([tiles for _, _, tiles in batch])
            with explained(), drawn_by(seeds[block], model.device):
                seen = features(normalize(pixels.to(model.device)))
                answers = answer(model, seen, ids, real, asking.longest, **asking.how)
            for (source, _, _), text in zip(batch, answers, strict=True):
                order.add(block, (source.path, text))
        order.finish()
        pictures.skipped = sum(processes.of_all(share.skipped))
        if processes.first:
            pictures.say_skipped()
