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
from PIL import Image
from torch import Tensor

from uniflow.data import Epochs, PictureList, Pictures, PictureShards, Sample, Samples, sample_key
from uniflow.pictures import PictureError, open_picture
from uniflow.reading import check_file, parse_json, printable, shown
from uniflow.unifluid.conversations import PICTURE, ROLES, Turn, about_a_picture, check_turns, conversation_ids
from uniflow.unifluid.sizes import DrawingSize, Turns, nearest_size
from uniflow.unifluid.slots import picture_slots
from uniflow.unifluid.texts import padded, padded_marks, prompt_ids
from uniflow.unifluid.tiles import most_tiles, one_tile, tiles_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from uniflow.unifluid.cached import CachedLatents

CAPTIONS = "captions.jsonl"
_LONGEST = 1 << 20  # bytes of what is said about a picture
Kind = Literal["drawing", "reading"]
KINDS: tuple[Kind, Kind] = ("drawing", "reading")


class CaptionError(ValueError):
    """An example that cannot be trained on; the message says where it stands."""


class Texts(NamedTuple):
    """What is said about a picture: a caption to draw it from, a question with its answer, or both; "" for the rest.

    In the place of question and answer there may be a conversation, `turns`, which may be about several pictures.
    `sources` is how many pictures beside its caption a picture is drawn from.
    """

    caption: str = ""
    question: str = ""
    answer: str = ""
    turns: tuple[Turn, ...] = ()
    sources: int = 0

    def conversation(self) -> list[Turn]:
        """The turns, or those of question and answer; none if there are neither."""
        if self.turns or not self.question:
            return list(self.turns)
        return about_a_picture(self.question, self.answer)

    def written(self) -> Iterator[str]:
        """All that is said, a text after the other."""
        yield from filter(None, (self.caption, self.question, self.answer))
        for turn in self.turns:
            yield from filter(None, turn.text.split(PICTURE))


class Examples(Pictures, Protocol):
    """Where pictures with texts come from."""

    def texts(self, number: int) -> Texts:
        """What is said about a picture; raises CaptionError if this is nothing, or not as it should be."""
        ...

    def further(self, number: int, kind: Kind) -> list[Image.Image]:
        """Pictures beside the first: a drawing's sources, what is read besides it; errors as of `open`."""
        ...

    def size(self, number: int) -> tuple[int, int]:
        """(height, width) of the first picture, by its header; errors as of `open`."""
        ...


class StoredExamples(Examples, Protocol):
    """Those whose pictures `uniflow encode` finds, too."""

    def pictures_to_draw(self, number: int) -> list[str]:
        """What it calls the picture that is drawn, and its sources."""
        ...


def every_text(examples: Examples) -> Iterator[str]:
    """All captions, questions and answers, to make a tokenizer for."""
    for number in range(len(examples)):
        yield from examples.texts(number).written()


class CaptionFolder(PictureList):
    """A folder with captions.jsonl, in which each line is a JSON object: {"image": "a.png", "caption": "a seven"}.

    Instead of a caption, or beside it, a line may hold a question and its answer. Images are given relative to the
    folder; any number of lines may be about the same one. Beside a caption may stand the `source`, one picture or a
    list, that the image is drawn from: {"image": "b.png", "caption": "make it bold", "source": "a.png"}. A conversation
    stands in the place of question and answer as `messages`, as chat templates take them, of a "role" and a "content":
    a text, or a list of {"type": "text", "text": ...} and {"type": "image"}, one for each picture of `image`, which may
    be a list. If no message has an image, they stand before the first one of the user.

    Raises:
        FileNotFoundError: if there is no captions.jsonl.
        CaptionError: for a line that is no such object, whose image is not there or outside the folder, with an empty
            text or only half of question and answer; or if there are no lines.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / CAPTIONS
        if not file.exists():
            raise FileNotFoundError(f"no {CAPTIONS} in {folder}")
        images: dict[str, Path] = {}
        self._folder = folder
        self._texts: list[Texts] = []
        self._further: list[dict[Kind, list[Path]]] = []
        for where, fields in read_lines(file):
            first, *rest = pictures_of(folder, "image", fields, where)
            sources = pictures_of(folder, "source", fields, where)
            texts = _texts(fields, where, pictures=1 + len(rest))._replace(sources=len(sources))
            if sources and not texts.caption:
                raise CaptionError(f"{where}: source without caption")
            self._texts.append(texts)
            self._further.append({"drawing": sources, "reading": rest})
            images[f"{where} ({first.relative_to(folder)})"] = first
        if not images:
            raise CaptionError(f"{file} holds no examples")
        super().__init__(images)

    def texts(self, number: int) -> Texts:
        """What a line says."""
        return self._texts[number]

    def further(self, number: int, kind: Kind) -> list[Image.Image]:
        """The sources of a line, or its images behind the first."""
        return [open_picture(file, largest=self.largest) for file in self._further[number][kind]]

    def pictures_to_draw(self, number: int) -> list[str]:
        """Their paths below the folder."""
        files = [self.pictures[number], *self._further[number]["drawing"]]
        return [file.relative_to(self._folder).as_posix() for file in files if isinstance(file, Path)]


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
        if fields.get("source") is not None:
            raise CaptionError(f"{where}: source: pictures are drawn from others in folders with {CAPTIONS} alone")
        return _texts(fields, where)

    def further(self, number: int, kind: Kind) -> list[Image.Image]:
        """None: a sample has one picture."""
        return []

    def pictures_to_draw(self, number: int) -> list[str]:
        """Its name."""
        return [self.name(number)]


def _check_length(text: bytes, where: str) -> None:
    if len(text) > _LONGEST:
        raise CaptionError(f"{where} is longer than {_LONGEST >> 20} MiB")


def read_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line of a file stands, but for empty ones, and the object of JSON in it.

    Raises:
        FileNotFoundError: if there is no such file.
        CaptionError: if it is no regular file, or for a line that is no object or longer than 1 MiB.
    """
    try:
        check_file(file)
    except ValueError as error:
        raise CaptionError(str(error)) from None
    with file.open("rb") as lines:
        for number, line in enumerate(iter(partial(lines.readline, _LONGEST + 1), b""), 1):
            if line.strip() or len(line) > _LONGEST:
                where = f"{file}:{number}"
                yield where, _fields(line.rstrip(b"\n"), where)


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


def _texts(fields: dict[str, Any], where: str, pictures: int = 1) -> Texts:
    caption, question, answer = (text_of(fields.get(name), name, where) for name in ("caption", "question", "answer"))
    texts = Texts(caption, question, answer)
    if bool(texts.question) != bool(texts.answer):
        raise CaptionError(f"{where}: {'question without answer' if texts.question else 'answer without question'}")
    if fields.get("messages") is not None:
        if texts.question:
            raise CaptionError(f"{where}: expected either messages, or question and answer")
        texts = texts._replace(turns=_turns(fields["messages"], where, pictures))
    if not any(texts):
        raise CaptionError(f"{where}: expected a caption, or question and answer")
    return texts


def _turns(messages: Any, where: str, pictures: int) -> tuple[Turn, ...]:
    """Messages as chat templates take them, which the assistant ends, about so many pictures."""
    if not isinstance(messages, list):
        raise CaptionError(f"{where}: messages: expected a list, got {shown(messages)}")
    turns = [_turn(message, f"{where}: message {number}") for number, message in enumerate(messages, 1)]
    try:
        check_turns(turns)
    except ValueError as error:
        raise CaptionError(f"{where}: messages: {error}") from None
    if turns[-1].role != "assistant":
        raise CaptionError(f"{where}: messages: expected the assistant to speak last")
    named = sum(turn.text.count(PICTURE) for turn in turns)
    if not named:
        first = next(number for number, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", PICTURE * pictures + turns[first].text)
    elif named != pictures:
        raise CaptionError(f"{where}: messages: expected as many images as image names, {pictures}, got {named}")
    return tuple(turns)


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise CaptionError(f"{where}: expected an object with role {', '.join(ROLES)}, got {shown(message)}")
    role, content = message["role"], message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    pieces = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image" and role == "user":
            pieces.append(PICTURE)
        elif kind == "text":
            pieces.append(text_of(part.get("text"), "content", where, required=True))
        else:
            raise CaptionError(f"{where}: content: expected texts, and images of the user, got {shown(part)}")
    if not any(piece != PICTURE for piece in pieces):
        raise CaptionError(f"{where}: content: expected a text")
    return Turn(role, "".join(pieces))


def text_of(text: Any, name: str, where: str, required: bool = False) -> str:
    """What is a text, not empty, of valid Unicode; "" for none unless it is required; else raises CaptionError."""
    if text is None and not required:
        return ""
    # half a surrogate pair, as of an emoji that was cut, has no UTF-8; a picture's place is no text
    if not isinstance(text, str) or not text.strip() or re.search(f"[\ud800-\udfff{PICTURE}]", text):
        raise CaptionError(f"{where}: {name}: expected a text, not empty, of valid Unicode, got {shown(text)}")
    return text


def pictures_of(folder: Path, name: str, fields: dict[str, Any], where: str) -> list[Path]:
    """The pictures that a field names; a list where there may be one: of `source`, and of `image` with messages."""
    named = fields.get(name)
    if name == "source" and named is None:
        return []
    if not (isinstance(named, list) and named and (name == "source" or fields.get("messages") is not None)):
        return [picture_of(folder, name, named, where)]
    if name == "image" and len(named) > 1 and fields.get("caption") is not None:
        raise CaptionError(f"{where}: image: expected one picture, to draw from the caption, got {shown(named)}")
    return [picture_of(folder, name, part, where) for part in named]


def picture_of(folder: Path, name: str, image: Any, where: str) -> Path:
    """The file of a picture in the folder, relative to which it is named; raises CaptionError if it is none."""
    if not isinstance(image, str) or not image:
        raise CaptionError(f"{where}: {name}: expected the path of a picture in the folder, got {shown(image)}")
    if Path(image).is_absolute() or ".." in Path(image).parts:
        raise CaptionError(f"{where}: {name}: {printable(image)} is outside the folder")
    try:
        there = (folder / image).is_file()
    except OSError:  # its name is too long
        there = False
    if not there:
        raise CaptionError(f"{where}: {name}: no such file: {printable(str(folder / image))}")
    return folder / image


class Drawings(NamedTuple):
    """Pictures to draw from their captions, and from other pictures if there are any; possibly none.

    images: uint8 [B, 3, H, W], as the image tokenizer takes them; or the latents that it makes of them, of a floating-
        point dtype, [B, L, C], see `uniflow.unifluid.tokens.image_tokens`.
    ids: int64 [B, T], the sources' slots (below zero), bos and the caption, padded before the text.
    real: bool [B, T], False for padding.
    sources: uint8 [P, 3, H, W], the sources of all rows one after the other, as the image tokenizer takes them, or
        their latents; none if not given.
    seen: uint8 [P, 3, H', W'], the same as the vision encoder takes them.
    """

    images: Tensor
    ids: Tensor
    real: Tensor
    sources: Tensor | None = None
    seen: Tensor | None = None


class Readings(NamedTuple):
    """Pictures with questions and answers, padded before the last text; possibly none.

    images: uint8 [T, 3, H, W], the tiles of the pictures of all rows one after the other, as the vision encoder takes
        them; see `uniflow.unifluid.tiles`.
    ids: int64 [B, T], the slots of pictures (below zero), bos, the question, eos, the answer, eos; or a conversation.
    real: bool [B, T], False for padding.
    answer: bool [B, A], of the last A ids: True for what is to be predicted, answers and their ends.
    """

    images: Tensor
    ids: Tensor
    real: Tensor
    answer: Tensor


class CaptionedPicture(NamedTuple):
    """What `CaptionedPictures` collates.

    kind: whether it is drawn or read.
    pixels: uint8 [T, 3, H, W], the picture to draw, or the tiles of those to read; or the former's latents [1, L, C].
    ids: int64 [T].
    predicted: bool [T], which ids are to be predicted.
    sources, seen: uint8 [S, 3, H, W] (or latents [S, L, C]) and [S, 3, H', W'], see `Drawings`.
    """

    kind: Kind
    pixels: Tensor
    ids: Tensor
    predicted: Tensor
    sources: Tensor
    seen: Tensor


class _Opened(NamedTuple):
    """What was read of an example: parts of a `CaptionedPicture` by their names, and the slots of its pictures."""

    pixels: Tensor
    sources: Tensor
    seen: Tensor
    slots: list[list[int]]


class CaptionedPictures(Samples):
    """An endless stream of pictures to draw and pictures to read, mixed evenly.

    Every epoch of a kind shows all of its examples in another order. Instead of a picture that cannot be read comes the
    next one. Pictures are resized to just cover the size, and the middle is cut out: what a caption says of a picture
    is seldom true of a part of it. With `tiles` those that are read are seen as a whole.

    Args:
        examples: `CaptionFolder` or `CaptionShards`; the texts of all of them are read here once.
        tokenizer: for the texts, see `uniflow.unifluid.texts`.
        drawing_size, reading_size: (H, W) of pictures to draw and of tiles to read.
        max_text: how many ids an example may have, with bos and eos, and without the slots of pictures.
        seed: the same seed gives the same stream.
        reading_share: the share of readings, in any run of neighbours; if not given a half, or all or none where there
            are examples of one kind only.
        drop_caption: the share of captions dropped, for guidance: their ids are bos alone.
        flip: whether half of the pictures are mirrored; what is said of left and right is then no longer true.
        drop_source: of the drawings that have sources, the share that is drawn from nothing at all, for guidance.
        features: slots of a tile of a picture that is read, M of the vision encoder; none for data without such.
        tiles: of how many tiles at most the grid of such a picture is, see `uniflow.unifluid.tiles`.
        source: the slots of a drawing's source, see `uniflow.unifluid.slots.source_slots`.
        context: slots that the transformer has positions for; a drawing needs some for its own tokens.
        tokens: how many these are.
        cached: the latents of what is drawn, and of its sources, in the place of the pixels; all of `examples`.
        others: further sizes to draw at, beside `drawing_size`; a picture is brought to the nearest, see
            `uniflow.unifluid.sizes.nearest_size`, and so are its sources. The headers of all pictures are read here.
        together: how many neighbours, from each multiple of it, have drawings of one size, where there are several.
            Every epoch of a size shows all of its pictures, but for one a run where the share of readings does not
            divide the runs evenly.

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
        drop_source: float = 0.05,
        *,
        features: int = 0,
        tiles: int = 1,
        source: Sequence[int] = (),
        context: int | None = None,
        tokens: int = 0,
        cached: CachedLatents | None = None,
        others: Sequence[DrawingSize] = (),
        together: int = 1,
    ) -> None:
        for name, dropped in (("drop_caption", drop_caption), ("drop_source", drop_source)):
            if not 0 <= dropped <= 1:
                raise ValueError(f"{name}: expected a share in [0, 1], got {dropped}")
        self.examples = examples
        self.tokenizer = tokenizer
        self.drawing_size = drawing_size
        self.reading_size = reading_size
        self.max_text = max_text
        self.seed = seed
        self.drop_caption = drop_caption
        self.flip = flip
        self.drop_source = drop_source
        self.features = features
        self.tiles = tiles
        self.sizes = [DrawingSize(drawing_size, tokens, tuple(source)), *others]
        self.together = together
        self.context = context
        self.cached = cached
        kinds = np.array([_kinds(examples.texts(number)) for number in range(len(examples))])
        captions, questions = (bool(column.any()) for column in kinds.T)
        self.reading_share = _reading_share(reading_share, captions, questions)
        self.nearest = np.array([self._nearest(number) if drawn else -1 for number, drawn in enumerate(kinds[:, 0])])
        self._turns = Turns([self.count(size) for size in range(len(self.sizes))])
        # of the seed's streams the first is that of `RandomCrops`, the third that of readings
        chosen = {("reading", 0): (3, kinds[:, 1])}
        for size in range(len(self.sizes)):
            chosen["drawing", size] = (3 + size if size else 2, self.nearest == size)
        self._streams = {key: Epochs(examples, seed, *how) for key, how in chosen.items() if how[1].any()}
        if isinstance(examples, CaptionFolder):
            for place, kind in enumerate(KINDS):
                for number in np.flatnonzero(kinds[:, place]).tolist():
                    self._ids(kind, number, self._most_slots(kind, number))

    def count(self, size: int) -> int:
        """How many pictures are drawn at one of `sizes`, by its number."""
        return int((self.nearest == size).sum())

    def _nearest(self, number: int) -> int:
        if len(self.sizes) == 1:
            return 0
        try:
            return nearest_size(self.examples.size(number), [each.size for each in self.sizes])
        except (PictureError, OSError):
            return 0  # it will be skipped, and counted, when its turn comes

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position.

        Raises:
            PictureError: if no picture of its kind can be read.
            CaptionError: if its texts are too long.
        """
        share = self.reading_share
        before, after = (place * share.numerator // share.denominator for place in (position, position + 1))
        kind: Kind = "reading" if after > before else "drawing"
        size, own = (0, before) if kind == "reading" else self._turn(position, position - before)
        rng = np.random.default_rng((self.seed, position))
        drawn, flipped = rng.random(), self.flip and rng.random() < 0.5
        number, found, skipped = self._streams[kind, size].read(own, lambda number: self._open(kind, number, flipped))
        from_others = len(found.seen) > 0
        nothing = from_others and drawn < self.drop_source
        dropped = nothing or drawn < self.drop_caption + (self.drop_source if from_others else 0.0)
        if nothing:
            found = found._replace(sources=found.sources[:0], seen=found.seen[:0], slots=[])
        return Sample(self._value(kind, number, found, dropped), self.examples.name(number), skipped)

    def _turn(self, position: int, before: int) -> tuple[int, int]:
        """The size of the drawing at a position, before which there are some, and its place in that size's stream."""
        if len(self.sizes) == 1:
            return 0, before
        run = position // self.together
        size, earlier = self._turns.of(run)
        before_run, most = (  # drawings before the run, and of a run
            samples - math.floor(samples * self.reading_share) for samples in (run * self.together, self.together)
        )
        return size, earlier * most + before - before_run

    def whole(self, kind: Kind, number: int) -> CaptionedPicture:
        """An example as it is, of which nothing is dropped or mirrored; errors as of reading it from the stream."""
        return self._value(kind, number, self._open(kind, number, False), False)

    def _open(self, kind: Kind, number: int, flipped: bool) -> _Opened:
        def middles(pictures: list[Image.Image], size: tuple[int, int]) -> Tensor:
            return _joined([one_tile(picture, size, flipped) for picture in pictures], size)

        further = self.examples.further(number, kind)
        if kind == "reading":
            pictures = [self.examples.open(number), *further]
            tiles = [tiles_of(picture, self.reading_size, self.tiles, flipped) for picture in pictures]
            slots = [picture_slots(self.features * len(own)) for own in tiles]
            return _Opened(torch.cat(tiles), middles([], self.drawing_size), middles([], self.reading_size), slots)
        size, _, source = self._size(number)
        seen, slots = middles(further, self.reading_size), [list(source)] * len(further)
        if self.cached is not None:
            latents = self.cached.read(number, flipped)
            return _Opened(latents[:1], latents[1:], seen, slots)
        return _Opened(middles([self.examples.open(number)], size), middles(further, size), seen, slots)

    def _value(self, kind: Kind, number: int, found: _Opened, dropped: bool) -> CaptionedPicture:
        ids, predicted = self._ids(kind, number, found.slots, dropped)
        return CaptionedPicture(
            kind,
            found.pixels,
            torch.tensor(ids, dtype=torch.int64, device="cpu"),
            torch.tensor(predicted, dtype=torch.bool, device="cpu"),
            found.sources,
            found.seen,
        )

    def _size(self, number: int) -> DrawingSize:
        """What an example is drawn at."""
        return self.sizes[self.nearest[number]]

    def _most_slots(self, kind: Kind, number: int) -> list[list[int]]:
        """The slots of an example's pictures, whatever these are like."""
        texts = self.examples.texts(number)
        if kind == "drawing":
            return [list(self._size(number).source)] * texts.sources
        pictures = sum(turn.text.count(PICTURE) for turn in texts.conversation())
        return [picture_slots(self.features * most_tiles(self.tiles))] * pictures

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
        """Samples to a batch of each kind, in which those of the other kind are left out.

        Raises:
            ValueError: for drawings of several sizes.
        """
        drawn, read = ([value for value in values if value.kind == kind] for kind in KINDS)
        drawings, readings = (padded([value.ids for value in part], self.tokenizer) for part in (drawn, read))
        sizes = sorted({tuple(value.pixels.shape[1:]) for value in drawn})
        if len(sizes) > 1:
            raise ValueError(
                f"batch: expected drawings of one size, got {sizes[0]} and {sizes[1]}; of several sizes "
                f"{self.together} neighbours from a multiple of it have one, so a run goes on with the batch_size that "
                "it had"
            )
        predicted = padded_marks([value.ids for value in read], [value.predicted for value in read])
        first = int(predicted.any(0).float().argmax()) if predicted.any() else predicted.shape[1]
        return (
            Drawings(
                _joined([value.pixels for value in drawn], self.drawing_size),
                *drawings,
                _joined([value.sources for value in drawn], self.drawing_size),
                _joined([value.seen for value in drawn], self.reading_size),
            ),
            Readings(_joined([value.pixels for value in read], self.reading_size), *readings, predicted[:, first:]),
        )

    def _ids(
        self, kind: Kind, number: int, pictures: Sequence[Sequence[int]], dropped: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Of an example with the slots of its pictures, and which of them are to be predicted."""
        texts = self.examples.texts(number)
        try:
            if kind == "drawing":
                before = [slot for picture in pictures for slot in picture]
                ids = prompt_ids(self.tokenizer, None if dropped else texts.caption, before)
                predicted = [False] * len(ids)
            else:
                ids, predicted = conversation_ids(self.tokenizer, texts.conversation(), pictures)
        except ValueError as error:
            raise CaptionError(f"{self.examples.name(number)}: {error}") from None
        written = sum(number >= 0 for number in ids)
        if written > self.max_text:
            raise CaptionError(
                f"{self.examples.name(number)}: a text of {written} ids, with bos and eos; at most "
                f"{self.max_text} (max_text) are allowed"
            )
        length = len(ids) + (self._size(number).tokens if kind == "drawing" else 0)
        if self.context is not None and length > self.context:
            raise CaptionError(
                f"{self.examples.name(number)}: text and pictures take {length} slots; the transformer has positions "
                f"for {self.context}{'' if self.tiles == 1 else '; fewer vision_tiles take fewer slots'}"
            )
        return ids, predicted


def _kinds(texts: Texts) -> tuple[bool, bool]:
    return bool(texts.caption), bool(texts.conversation())


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


def _joined(parts: list[Tensor], size: tuple[int, int]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, 3, *size, dtype=torch.uint8, device="cpu")
