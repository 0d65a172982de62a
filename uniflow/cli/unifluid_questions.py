"""`uniflow unifluid ask` of a file of questions, and `evaluate`: responses by one process or several, and scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniflow.atomic import replacing, write_json
from uniflow.cli.bars import picture_bar
from uniflow.cli.batches import runs, seeds_of_blocks
from uniflow.cli.files import check_outputs, read_picture
from uniflow.cli.inputs import InputError, Named, check_finite, check_text, choose_device, explained, load_checkpoint
from uniflow.cli.printing import Column, Table, finite, notice, say, say_json
from uniflow.cli.workers import Workers
from uniflow.evaluation.scores import InOrder, exact_mean
from uniflow.normalization import normalize
from uniflow.training.processes import Processes, joined
from uniflow.unifluid.accuracy import exact_match, vqa_accuracy
from uniflow.unifluid.asking import answer, log_likelihoods
from uniflow.unifluid.conversations import about_a_picture, question_ids
from uniflow.unifluid.features import VisionFeatures
from uniflow.unifluid.model import UniFluid
from uniflow.unifluid.objective import read_vision
from uniflow.unifluid.questions import LIKELIHOODS, RESPONSE, Question, read_questions
from uniflow.unifluid.slots import picture_slots
from uniflow.unifluid.texts import padded
from uniflow.unifluid.tiles import most_tiles, tiles_of


@dataclass(frozen=True)
class Asking:
    """Who is asked, and how.

    Attributes:
        checkpoint: of the UniFluid.
        vision: folder of its encoder; None for one that has its own.
        system: a system prompt, or None.
        how: arguments of transformers' `generate`.
        longest: ids that an answer may have.
        seed: of what is drawn, where `how` asks for that.
        batch_size: questions at a time.
        strict: whether a picture that cannot be read ends it all.
        max_pixels: that a picture may have.
        dtype, device: as the options of the same name.
    """

    checkpoint: Named
    vision: Path | None
    system: str | None
    how: dict[str, Any]
    longest: int
    seed: int
    batch_size: int
    strict: bool
    max_pixels: int
    dtype: str
    device: str

    def check(self) -> None:
        """Find a bad value before any work is done."""
        if self.system is not None:
            check_text("--system", self.system)

    def prompt(self, model: UniFluid, vision: VisionFeatures, question: str, tiles: int) -> list[int]:
        """The ids of a question about a picture, with the slots of its features."""
        turns = about_a_picture(question, system=self.system)
        return question_ids(model.text_tokenizer, turns, [picture_slots(vision.tokens * tiles)])

    def check_length(self, model: UniFluid, vision: VisionFeatures, question: str) -> None:
        """Raise a ValueError unless a question can be asked about any picture: what cannot be is found before work."""
        model.check_context(len(self.prompt(model, vision, question, most_tiles(model.config.vision_tiles))) + 1)


@dataclass(frozen=True)
class _Read:
    """A question, its place, and the tiles of its picture, uint8 [T, 3, H, W]; None if that cannot be read."""

    place: int
    question: Question
    tiles: Tensor | None


def how_to_write(temperature: float, top_p: float, beams: int) -> dict[str, Any]:
    """Arguments of transformers' `generate`: drawn at a temperature above zero, else the likeliest token each time."""
    check_finite("--temperature", temperature)
    if top_p < 1 and not temperature:
        raise InputError("--top-p: nothing is drawn at a temperature of 0")
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    return {**drawn, **({"num_beams": beams} if beams > 1 else {})}


def ask_file(file: Path, asking: Asking, out: Path, force: bool) -> None:
    """Write the file's lines with responses; the processes of torchrun share the questions."""
    asking.check()
    check_outputs([out], force)
    questions = _questions(file)
    with joined(choose_device(asking.device), "the same command begins anew") as (processes, own):
        answered = _answered(questions, asking, own, processes)
        if processes.first:
            _write(answered, out)
            say(f"{len(answered)} responses in {out}")
        processes.wait()


def evaluate_file(file: Path, asking: Asking | None, out: Path | None, force: bool, as_json: bool) -> None:
    """Print how many responses are right: those that the file has, or of the model that is asked."""
    check_outputs([] if out is None else [out], force)
    questions = _questions(file)
    if not any(question.answers for question in questions):
        raise InputError(f"{file}: no line has an answer to score by")
    if asking is None:
        _report(questions, out, as_json)
        return
    asking.check()
    with joined(choose_device(asking.device), "the same command begins anew") as (processes, own):
        answered = _answered(questions, asking, own, processes)
        if processes.first:
            _report(answered, out, as_json)
        processes.wait()


def _questions(file: Path) -> list[Question]:
    with explained():
        return read_questions(file)


def _answered(
    questions: Sequence[Question], asking: Asking, device: torch.device, processes: Processes
) -> list[Question]:
    """The questions with responses in their fields, in the first process."""
    model = load_checkpoint(UniFluid.from_pretrained, asking.checkpoint, str(device), asking.dtype)
    with explained():
        vision = read_vision(asking.vision, model)
    for question in questions:  # what cannot be asked is found now, not after hours
        try:
            asking.check_length(model, vision, question.text)
        except ValueError as error:
            raise InputError(f"{question.where}: {error}") from None
    answered: list[Question] = []
    blocks = -(-len(questions) // asking.batch_size)
    seeds = seeds_of_blocks(asking.seed, blocks)
    with picture_bar("asked", shown=processes.first) as bar, Workers(2) as files:
        task = bar.add_task("", total=len(questions))

        def take(batch: list[Question]) -> None:
            answered.extend(batch)
            bar.advance(task, len(batch))

        def read(place: int) -> _Read:
            try:
                picture = read_picture(questions[place].picture, asking.max_pixels)
            except InputError as error:
                if asking.strict:
                    raise
                notice(f"skipped: {error}")
                return _Read(place, questions[place], None)
            tiles = tiles_of(picture, vision.image_size, model.config.vision_tiles)
            return _Read(place, questions[place], tiles)

        order = InOrder[list[Question]](processes, blocks, take)
        mine = [place for place in range(len(questions)) if order.is_mine(place // asking.batch_size)]
        for run in runs(
            files.read(read, mine), lambda _: asking.batch_size, lambda each: each.place // asking.batch_size
        ):
            block = run[0].place // asking.batch_size
            with explained(), drawn_by(seeds[block], model.device):
                order.add(block, _respond(model, vision, run, asking))
        order.finish()
    return answered


@contextmanager
def drawn_by(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, what transformers draws is that of a seed: the same whichever process has the block."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _respond(model: UniFluid, vision: VisionFeatures, batch: Sequence[_Read], asking: Asking) -> list[Question]:
    """The questions of a batch, in order, with responses: written, or of choices the likeliest."""
    seen: dict[int, Tensor] = {}
    there = [(each.place, each.tiles) for each in batch if each.tiles is not None]
    if there:
        pictures = torch.cat([tiles for _, tiles in there])
        features = vision(normalize(pictures.to(model.device))).split([len(tiles) for _, tiles in there])
        seen = {place: rows for (place, _), rows in zip(there, features, strict=True)}
    found: dict[int, dict[str, Any]] = {each.place: {RESPONSE: None} for each in batch}
    written = [each for each in batch if each.place in seen and not each.question.choices]
    if written:
        prompts = [asking.prompt(model, vision, each.question.text, len(seen[each.place])) for each in written]
        ids, real = (part.to(model.device) for part in padded(prompts, model.text_tokenizer))
        rows = torch.cat([seen[each.place] for each in written])
        for each, text in zip(written, answer(model, rows, ids, real, asking.longest, **asking.how), strict=True):
            found[each.place] = {RESPONSE: text}
    for each in batch:
        if each.place in seen and (choices := each.question.choices):
            rows, tiles = seen[each.place].repeat(len(choices), 1, 1), [len(seen[each.place])] * len(choices)
            turns = [about_a_picture(each.question.text, choice, asking.system) for choice in choices]
            likely = log_likelihoods(model, rows, turns, tiles).tolist()
            best = max(range(len(choices)), key=likely.__getitem__)
            found[each.place] = {RESPONSE: choices[best], LIKELIHOODS: likely}
    return [replace(each.question, fields=each.question.fields | found[each.place]) for each in batch]


def _write(questions: Sequence[Question], out: Path) -> None:
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for question in questions:
            file.write(json.dumps(question.fields, ensure_ascii=False) + "\n")


def _report(questions: Sequence[Question], out: Path | None, as_json: bool) -> None:
    """Print the means over the questions whose pictures were read and that have answers, and write them."""
    with explained():
        values = scores(questions)
    if out is not None:
        write_json(out, finite(values))
    if as_json:
        say_json(values)
        return
    columns = [Column("questions", "questions")]
    cells: list[str | float] = [str(values["questions"])]
    for heading, key in (
        ("exact match", "exact_match"),
        ("VQA accuracy", "vqa_accuracy"),
        ("choice", "choice"),
        ("choice, per byte", "choice_per_byte"),
    ):
        if values[key] is not None:
            columns.append(Column(heading, key, ".4f", 6))
            cells.append(values[key])
    Table(columns).row(*cells)
    if values["skipped"]:
        notice(f"{values['skipped']} questions have no response, since their pictures could not be read: left out")
    if values["unanswered"]:
        notice(f"{values['unanswered']} questions have no answer to score by: left out")


def scores(questions: Sequence[Question]) -> dict[str, Any]:
    """Means of the scores of responses, those that no question has None; and how many questions there are."""
    found: dict[str, list[float]] = {"exact_match": [], "vqa_accuracy": [], "choice": [], "choice_per_byte": []}
    skipped = unanswered = 0
    for question in questions:
        response, answers = question.response, question.answers
        if response is None or not answers:
            skipped, unanswered = skipped + (response is None), unanswered + (response is not None)
        elif question.choices:
            lengths = [len(choice.encode()) for choice in question.choices]
            likely = [each / length for each, length in zip(question.likelihoods, lengths, strict=True)]
            best = question.choices[max(range(len(likely)), key=likely.__getitem__)]
            found["choice"].append(float(response == answers[0]))
            found["choice_per_byte"].append(float(best == answers[0]))
        else:
            found["exact_match"].append(exact_match(response, answers))
            found["vqa_accuracy"].append(vqa_accuracy(response, answers))
    means = {name: exact_mean(values) if values else None for name, values in found.items()}
    return {"questions": len(questions), "skipped": skipped, "unanswered": unanswered, **means}
