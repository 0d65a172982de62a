"""Pictures and what is said about them: captions to draw them from, and questions that they answer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from uniflow.data import Epochs, PictureList, Pictures, PictureShards, Sample, Samples, sample_key
from uniflow.pictures import center_crop, to_tensor
from uniflow.reading import check_file, parse_json, printable, shown
from uniflow.unifluid.texts import answer_ids, padded, prompt_ids, question_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CAPTIONS = "captions.jsonl"
_LONGEST = 1 << 20  # bytes of what is said about a picture
Kind = Literal["drawing", "reading"]
KINDS: tuple[Kind, Kind] = ("drawing", "reading")


class CaptionError(ValueError):
    """An example that cannot be trained on; the message says where it stands."""


class Texts(NamedTuple):
    """What is said about a picture: a caption to draw it from, a question with its answer, or both; "" for the rest."""

    caption: str = ""
    question: str = ""
    answer: str = ""


class Examples(Pictures, Protocol):
    """Where pictures with texts come from."""

    def texts(self, number: int) -> Texts:
        """What is said about a picture; raises CaptionError if this is nothing, or not as it should be."""
        ...


def every_text(examples: Examples) -> Iterator[str]:
    """All captions, questions and answers, to make a tokenizer for."""
    for number in range(len(examples)):
        yield from (text for text in examples.texts(number) if text)


class CaptionFolder(PictureList):
    """A folder with captions.jsonl, in which each line is a JSON object: {"image": "a.png", "caption": "a seven"}.

    Instead of a caption, or beside it, a line may hold a question and its answer. Images are given relative to the
    folder; any number of lines may be about the same one.

    Raises:
        FileNotFoundError: if there is no captions.jsonl.
        CaptionError: for a line that is no such object, whose image is not there or outside the folder, with an empty
            text or only half of question and answer; or if there are no lines.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / CAPTIONS
        if not file.exists():
            raise FileNotFoundError(f"no {CAPTIONS} in {folder}")
        try:
            check_file(file)
        except ValueError as error:
            raise CaptionError(str(error)) from None
        images: dict[str, Path] = {}
        self._texts: list[Texts] = []
        with file.open("rb") as lines:
            for number, line in enumerate(iter(partial(lines.readline, _LONGEST + 1), b""), 1):
                if line.strip() or len(line) > _LONGEST:
                    where = f"{file}:{number}"
                    fields = _fields(line.rstrip(b"\n"), where)
                    self._texts.append(_texts(fields, where))
                    images[f"{where} ({fields.get('image')})"] = _image(folder, fields.get("image"), where)
        if not images:
            raise CaptionError(f"{file} holds no examples")
        super().__init__(images)

    def texts(self, number: int) -> Texts:
        """What a line says."""
        return self._texts[number]


class CaptionShards(PictureShards):
    """WebDataset tar files with KEY.json beside KEY.png or another picture; fields as in captions.jsonl, but no image.

    KEY.txt may stand instead, or beside a KEY.json that has no caption; it holds the caption.

    Raises:
        PictureError: as `PictureShards`.
        CaptionError: for a text without a picture, or if there are no pictures. What a picture's texts are is found by
            `texts`.
    """

    def __init__(self, shards: Sequence[Path], suffixes: Sequence[str]) -> None:
        super().__init__(shards, suffixes, (".json", ".txt"))
        if not len(self):
            raise CaptionError(f"no pictures in {', '.join(map(str, shards)) or 'no shards'}")

    def check_members(self, shard: Path, members: Sequence[str]) -> None:
        """Refuse a text without a picture."""
        keys = {sample_key(member) for member in members if self.is_picture(member)}
        for member in members:
            if member.endswith(self.text_suffixes) and sample_key(member) not in keys:
                raise CaptionError(f"{shard}:{member}: a text without a picture beside it")

    def texts(self, number: int) -> Texts:
        """What stands beside a picture."""
        fields, where = {}, f"{self.name(number)}: no texts beside it"
        if (found := self.beside(number, ".json", _LONGEST + 1)) is not None:
            where, data = found
            fields = _fields(data, where)
        if fields.get("caption") is None and (found := self.beside(number, ".txt", _LONGEST + 1)) is not None:
            where, data = found
            _check_length(data, where)
            fields["caption"] = data.decode(errors="surrogateescape").strip()
        return _texts(fields, where)


def _check_length(text: bytes, where: str) -> None:
    if len(text) > _LONGEST:
        raise CaptionError(f"{where} is longer than {_LONGEST >> 20} MiB")


def _fields(line: bytes, where: str) -> dict[str, Any]:
    _check_length(line, where)
    try:
        fields = parse_json(line.decode("utf-8-sig"), where)  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise CaptionError(f"{where} is not JSON in UTF-8: {error}") from None
    except ValueError as error:
        raise CaptionError(str(error)) from None
    if not isinstance(fields, dict):
        raise CaptionError(f"{where}: expected a JSON object, got {shown(fields)}")
    return fields


def _texts(fields: dict[str, Any], where: str) -> Texts:
    texts = Texts(*(_text(fields, name, where) for name in Texts._fields))
    if bool(texts.question) != bool(texts.answer):
        raise CaptionError(f"{where}: {'question without answer' if texts.question else 'answer without question'}")
    if not any(texts):
        raise CaptionError(f"{where}: expected a caption, or question and answer")
    return texts


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    text = fields.get(name)
    if text is None:
        return ""
    # half a surrogate pair, as of an emoji that was cut, has no UTF-8
    if not isinstance(text, str) or not text.strip() or re.search("[\ud800-\udfff]", text):
        raise CaptionError(f"{where}: {name}: expected a text, not empty, of valid Unicode, got {shown(text)}")
    return text


def _image(folder: Path, image: Any, where: str) -> Path:
    if not isinstance(image, str) or not image:
        raise CaptionError(f"{where}: image: expected the path of a picture in the folder, got {shown(image)}")
    if Path(image).is_absolute() or ".." in Path(image).parts:
        raise CaptionError(f"{where}: image: {printable(image)} is outside the folder")
    try:
        there = (folder / image).is_file()
    except OSError:  # its name is too long
        there = False
    if not there:
        raise CaptionError(f"{where}: image: no such file: {printable(str(folder / image))}")
    return folder / image


class Drawings(NamedTuple):
    """Pictures to draw from their captions, padded on the left; possibly none.

    images: uint8 [B, 3, H, W], as the image tokenizer takes them.
    ids: int64 [B, T], bos and the caption.
    real: bool [B, T], False for padding.
    """

    images: Tensor
    ids: Tensor
    real: Tensor


class Readings(NamedTuple):
    """Pictures with questions and answers, padded on the left; possibly none.

    images: uint8 [B, 3, H, W], as the vision encoder takes them.
    ids: int64 [B, T], bos, the question, eos, the answer, eos.
    real: bool [B, T], False for padding.
    answer: bool [B, A], of the last A ids: True for what is to be predicted, the answer and its eos.
    """

    images: Tensor
    ids: Tensor
    real: Tensor
    answer: Tensor


class CaptionedPicture(NamedTuple):
    """What `CaptionedPictures` collates: a picture, uint8 [3, H, W], ids [T], and how many of these are the answer."""

    kind: Kind
    pixels: Tensor
    ids: Tensor
    answer: int


class CaptionedPictures(Samples):
    """An endless stream of pictures to draw and pictures to read, mixed evenly.

    Every epoch of a kind shows all of its examples in another order. Instead of a picture that cannot be read comes the
    next one. Pictures are resized to just cover the size, and the middle is cut out: what a caption says of a picture
    is seldom true of a part of it.

    Args:
        examples: `CaptionFolder` or `CaptionShards`; the texts of all of them are read here once.
        tokenizer: for the texts, see `uniflow.unifluid.texts`.
        drawing_size, reading_size: (H, W) of pictures to draw and to read.
        max_text: how many ids an example may have, with bos and eos.
        seed: the same seed gives the same stream.
        reading_share: the share of readings, in any run of neighbours; if not given a half, or all or none where there
            are examples of one kind only.
        drop_caption: the share of captions dropped, for guidance: their ids are bos alone.
        flip: whether half of the pictures are mirrored; what is said of left and right is then no longer true.

    Raises:
        CaptionError: for texts that are not as they should be or longer than `max_text`; in shards a text that is too
            long is found when it is read.
        ValueError: for a share outside [0, 1], or of a kind of which there are no examples.
    """

    def __init__(
        self,
        examples: Examples,
        tokenizer: PreTrainedTokenizerBase,
        drawing_size: tuple[int, int],
        reading_size: tuple[int, int],
        max_text: int,
        seed: int = 0,
        reading_share: float | None = None,
        drop_caption: float = 0.1,
        flip: bool = False,
    ) -> None:
        if not 0 <= drop_caption <= 1:
            raise ValueError(f"drop_caption: expected a share in [0, 1], got {drop_caption}")
        self.examples = examples
        self.tokenizer = tokenizer
        self.drawing_size = drawing_size
        self.reading_size = reading_size
        self.max_text = max_text
        self.seed = seed
        self.drop_caption = drop_caption
        self.flip = flip
        kinds = np.array([_kinds(examples.texts(number)) for number in range(len(examples))])
        captions, questions = (bool(column.any()) for column in kinds.T)
        self.reading_share = _reading_share(reading_share, captions, questions)
        # of the seed's streams the first is that of `RandomCrops`
        self._streams = {
            kind: Epochs(examples, seed, 2 + place, kinds[:, place])
            for place, kind in enumerate(KINDS)
            if kinds[:, place].any()
        }
        if isinstance(examples, CaptionFolder):
            for place, kind in enumerate(KINDS):
                for number in np.flatnonzero(kinds[:, place]).tolist():
                    self._ids(kind, number)

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position.

        Raises:
            PictureError: if no picture of its kind can be read.
            CaptionError: if its texts are too long.
        """
        share = self.reading_share
        before, after = (place * share.numerator // share.denominator for place in (position, position + 1))
        kind: Kind = "reading" if after > before else "drawing"
        own = before if kind == "reading" else position - before
        number, picture, skipped = self._streams[kind].read(own, self.examples.open)
        rng = np.random.default_rng((self.seed, position))
        ids, answer = self._ids(kind, number, dropped=rng.random() < self.drop_caption)
        pixels = to_tensor(center_crop(picture, self.drawing_size if kind == "drawing" else self.reading_size))
        pixels = pixels.flip(-1) if self.flip and rng.random() < 0.5 else pixels
        value = CaptionedPicture(kind, pixels, torch.tensor(ids, dtype=torch.int64, device="cpu"), answer)
        return Sample(value, self.examples.name(number), skipped)

    def check_batches(self, size: int) -> None:
        """Refuse batches of `size` neighbours of which some lack a kind: their losses would not count as the others'.

        Raises:
            ValueError: naming the size that is needed.
        """
        rarer = min(self.reading_share, 1 - self.reading_share)
        if rarer and size * rarer < 1:
            raise ValueError(
                f"micro_batch_size: expected at least {math.ceil(1 / rarer)}, to have pictures to draw and pictures to "
                f"read in each with a reading_share of {float(self.reading_share):g}; got {size}"
            )

    def collate(self, values: list[CaptionedPicture]) -> tuple[Drawings, Readings]:
        """Samples to a batch of each kind, in which those of the other kind are left out."""
        drawn, read = ([value for value in values if value.kind == kind] for kind in KINDS)
        drawings, readings = (padded([value.ids for value in part], self.tokenizer) for part in (drawn, read))
        lengths = torch.tensor([value.answer for value in read], dtype=torch.int64, device="cpu")
        longest = max((value.answer for value in read), default=0)
        answer = torch.arange(longest, 0, -1, device="cpu") <= lengths.unsqueeze(1)
        return (
            Drawings(_stacked(drawn, self.drawing_size), *drawings),
            Readings(_stacked(read, self.reading_size), *readings, answer),
        )

    def _ids(self, kind: Kind, number: int, dropped: bool = False) -> tuple[list[int], int]:
        """Of an example, with how many of them are the answer."""
        caption, question, answer = self.examples.texts(number)
        if kind == "drawing":
            ids, predicted = prompt_ids(self.tokenizer, None if dropped else caption), []
        else:
            ids, predicted = question_ids(self.tokenizer, question), answer_ids(self.tokenizer, answer)
        if len(ids) + len(predicted) > self.max_text:
            raise CaptionError(
                f"{self.examples.name(number)}: a text of {len(ids) + len(predicted)} ids, with bos and eos; at most "
                f"{self.max_text} (max_text) are allowed"
            )
        return ids + predicted, len(predicted)


def _kinds(texts: Texts) -> tuple[bool, bool]:
    return bool(texts.caption), bool(texts.question)


def _reading_share(share: float | None, captions: bool, questions: bool) -> Fraction:
    """The share of readings, checked against what there is."""
    if share is None:
        return Fraction(int(questions), int(captions) + int(questions))
    if not 0 <= share <= 1:
        raise ValueError(f"reading_share: expected a share in [0, 1], got {share}")
    if share > 0 and not questions:
        raise ValueError(f"reading_share: expected 0, as no example has a question, got {share}")
    if share < 1 and not captions:
        raise ValueError(f"reading_share: expected 1, as no example has a caption, got {share}")
    return Fraction(str(share))  # the decimal that was written, so that every run has its share exactly


def _stacked(values: list[CaptionedPicture], size: tuple[int, int]) -> Tensor:
    if not values:
        return torch.empty(0, 3, *size, dtype=torch.uint8, device="cpu")
    return torch.stack([value.pixels for value in values])
