import itertools
import json
import os
import pickle

import numpy as np
import pytest
import torch

from tests.conftest import png, smooth_picture, write_shard
from uniflow.data import Positions, load
from uniflow.pictures import PictureError, center_crop, to_tensor
from uniflow.unifluid.captions import CaptionedPictures, CaptionError, CaptionFolder, CaptionShards, Texts, every_text
from uniflow.unifluid.conversations import PICTURE, Turn, about_a_picture, conversation_ids
from uniflow.unifluid.slots import FEATURES, TOKENS
from uniflow.unifluid.texts import make_text_tokenizer, prompt_ids

pytest.importorskip("transformers")

QUESTION = {"question": "which digit?", "answer": "seven"}
LINES = [
    {"image": "a.png", "caption": "a seven"},
    {"image": "a.png", **QUESTION},
    {"image": "more/b.png", "caption": "a three", "question": "is it a seven?", "answer": "no"},
    {"image": "b.png", "caption": "a one", "question": None},
]
SIZES = {"drawing_size": (8, 12), "reading_size": (16, 16), "max_text": 40, "features": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return make_text_tokenizer(["a seven", "a three", "which digit?"], 270)


def write_folder(folder, lines):
    (folder / "more").mkdir(exist_ok=True)
    for seed, name in enumerate(("a.png", "b.png", "more/b.png")):
        smooth_picture((40, 30), seed).save(folder / name)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path, LINES)


def numbers_of(captions=0, both=0, questions=0):
    """Lines about as many different captions and questions."""
    lines = [{"image": "a.png", "caption": f"caption {i}"} for i in range(captions)]
    lines += [{"image": "a.png", "caption": f"caption {captions + i}", **QUESTION} for i in range(both)]
    return lines + [{"image": "b.png", "question": f"question {i}", "answer": "yes"} for i in range(questions)]


# where examples come from


def test_a_folder_of_captions(folder):
    examples = CaptionFolder(folder)
    assert len(examples) == 4
    assert examples.texts(0) == Texts("a seven")
    assert examples.texts(2) == Texts("a three", "is it a seven?", "no")
    assert examples.name(2) == f"{folder}/captions.jsonl:3 (more/b.png)"
    assert np.array_equal(examples.open(2), smooth_picture((40, 30), 2))
    assert list(every_text(examples))[:3] == ["a seven", "which digit?", "seven"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png", "caption": ', "is not JSON: Expecting value"),
        ('["a.png", "a seven"]', "expected a JSON object, got"),
        ({"caption": "a seven"}, "image: expected the path of a picture in the folder, got None"),
        ({"image": "none.png", "caption": "a seven"}, "image: no such file: .*none.png"),
        ({"image": "../a.png", "caption": "a seven"}, "image: ../a.png is outside the folder"),
        ({"image": "/a.png", "caption": "a seven"}, "image: /a.png is outside the folder"),
        ({"image": "a.png"}, "expected a caption, or question and answer"),
        ({"image": "a.png", "caption": " \n"}, "caption: expected a text, not empty, of valid Unicode, got ' "),
        ({"image": "a.png", "caption": 7}, "caption: expected a text, not empty, of valid Unicode, got 7"),
        (
            {"image": "a.png", "caption": "cut \ud83d"},
            "caption: expected a text, not empty, of valid Unicode, got 'cut",
        ),
        ({"image": "a.png", "caption": "a seven", "question": "which?"}, "question without answer"),
        ({"image": "a.png", "answer": "seven"}, "answer without question"),
        ({"image": "a.png", "question": "which?", "answer": ""}, "answer: expected a text, not empty"),
        ('{"image": "a.png", "caption": NaN}', "expected finite numbers, got nan"),
        ({"image": "a.png", "caption": ["a", {"b": "c"}]}, "caption: expected a text"),
        ({"image": ["a.png"], "caption": "a seven"}, "image: expected the path"),
        ({"image": "a" * 5000, "caption": "a seven"}, "image: no such file: '"),
        ({"image": "\ud800", "caption": "a seven"}, r"image: no such file: .*\\ud800"),
        ({"image": "\0", "caption": "a seven"}, r"image: no such file: .*\\x00"),
        ({"image": "more", "caption": "a seven"}, "image: no such file"),
        ({"image": "a.png", "caption": "\x1b[31m" * 10_000 + "\ud800"}, r"caption: expected a text.*\\x1b"),
        ("[" * 100_000, "lists and mappings are nested more than 64 deep"),
        ("[" + "[" * 90 + "]" * 91, "lists and mappings are nested more than 64 deep"),
        ("1" * 10_000, "is not JSON: Exceeds the limit"),
        ('{"image": "a.png", "caption": "' + "x" * (1 << 20), "is longer than 1 MiB"),
        (" " * (1 << 21) + "x", "is longer than 1 MiB"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path, line, message):
    write_folder(tmp_path, [LINES[0], "", line])
    with pytest.raises(CaptionError, match=rf"captions\.jsonl:3:? {message}") as caught:
        CaptionFolder(tmp_path)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


EDITED = {"image": "b.png", "caption": "make it bold", "source": ["a.png", "more/b.png"]}
TALK = {
    "image": ["a.png", "b.png"],
    "messages": [
        {"role": "system", "content": "Answer in a word."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "is "}, {"type": "image"}, {"type": "text", "text": "?"}],
        },
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ],
}


def test_sources_and_conversations(tmp_path):
    silent = {"image": ["a.png", "b.png"], "messages": [{"role": "user", "content": "which?"}, TALK["messages"][2]]}
    examples = CaptionFolder(write_folder(tmp_path, [EDITED, TALK, silent, {**EDITED, "source": "a.png"}]))
    assert examples.texts(0) == Texts("make it bold", sources=2)
    assert examples.texts(3).sources == 1
    picture_a, picture_b, further = (smooth_picture((40, 30), seed) for seed in range(3))
    assert np.array_equal(examples.open(0), picture_b)
    for found, expected in zip(examples.further(0, "drawing"), (picture_a, further), strict=True):
        assert np.array_equal(found, expected)
    assert examples.texts(1).turns == (
        Turn("system", "Answer in a word."),
        Turn("user", f"is {PICTURE}?"),
        Turn("assistant", "no"),
        Turn("user", f"{PICTURE}is"),
        Turn("assistant", "yes"),
    )
    assert np.array_equal(examples.open(1), picture_a)
    assert np.array_equal(examples.further(1, "reading")[0], picture_b)
    assert examples.further(1, "drawing") == []
    assert examples.texts(2).turns[0] == Turn("user", f"{PICTURE}{PICTURE}which?")  # none is named: all stand first
    assert [*every_text(examples)][:4] == ["make it bold", "Answer in a word.", "is ", "?"]


def messages(*changed, image=("a.png", "b.png")):
    """The conversation with other messages in the place of its own, None for none."""
    told = list(TALK["messages"])
    for number, message in changed:
        told[number] = message
    return {"image": list(image), "messages": [message for message in told if message is not None]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**EDITED, "source": "none.png"}, "source: no such file: .*none.png"),
        ({**EDITED, "source": ["a.png", "../b.png"]}, "source: ../b.png is outside the folder"),
        ({**EDITED, "source": []}, r"source: expected the path of a picture in the folder, got \[\]"),
        ({"image": "a.png", **QUESTION, "source": "b.png"}, "source without caption"),
        ({**TALK, "image": []}, r"image: expected the path of a picture in the folder, got \[\]"),
        ({**TALK, "image": "a.png"}, "messages: expected as many images as image names, 1, got 2"),
        ({**TALK, "caption": "a seven"}, "image: expected one picture, to draw from the caption"),
        ({**TALK, **QUESTION}, "expected either messages, or question and answer"),
        ({**TALK, "messages": "hello"}, "messages: expected a list, got 'hello'"),
        ({**TALK, "messages": []}, "messages: expected user and assistant in turns"),
        (messages((4, None)), "messages: expected the assistant to speak last"),
        (messages((2, None)), "messages: expected user and assistant in turns"),
        (messages((0, {"role": "nobody", "content": "x"})), "message 1: expected an object with role system, user"),
        (messages((0, {"role": ["user"], "content": "x"})), "message 1: expected an object with role system, user"),
        (messages((1, {"role": "user", "content": None})), "message 2: content: expected a text"),
        (messages((1, {"role": "user", "content": [{"type": "image"}]})), "message 2: content: expected a text"),
        (messages((1, {"role": "user", "content": [{"type": "video"}]})), "message 2: content: expected texts, and"),
        (messages((2, {"role": "assistant", "content": [{"type": "image"}]})), "message 3: content: expected texts"),
        (messages((2, {"role": "assistant", "content": f"no {PICTURE}"})), "message 3: content: expected a text"),
    ],
)  # fmt: skip
def test_sources_and_conversations_that_cannot_be(tmp_path, line, message):
    write_folder(tmp_path, [LINES[0], "", line])
    with pytest.raises(CaptionError, match=rf"captions\.jsonl:3:? {message}"):
        CaptionFolder(tmp_path)


def test_a_folder_without_examples(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no captions\.jsonl in"):
        CaptionFolder(tmp_path)
    with pytest.raises(CaptionError, match=r"captions\.jsonl holds no examples"):
        CaptionFolder(write_folder(tmp_path, ["", ""]))


def test_a_line_of_gigabytes_is_not_read_whole(tmp_path):
    write_folder(tmp_path, [LINES[0]])
    with (tmp_path / "captions.jsonl").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CaptionError, match=r"captions\.jsonl:1 is longer than 1 MiB"):
        CaptionFolder(tmp_path)


def test_captions_that_are_no_file_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "captions.jsonl")
    with pytest.raises(CaptionError, match="expected a file, got a pipe or device"):
        CaptionFolder(tmp_path)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    write_folder(tmp_path, LINES)
    (tmp_path / "captions.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "captions.jsonl").read_bytes())
    assert CaptionFolder(tmp_path).texts(0).caption == "a seven"


def picture(seed):
    return png(smooth_picture((40, 30), seed))


def shards_of(path, members):
    return CaptionShards([write_shard(path / "x.tar", members)], (".png",))


def test_shards_of_captions(tmp_path):
    members = {"0.png": picture(0), "0.txt": b"a seven\n", "1.json": json.dumps(QUESTION).encode(), "1.png": picture(1)}
    members |= {"2.png": picture(2), "2.txt": b"a one", "2.json": json.dumps({**QUESTION, "width": 40}).encode()}
    members |= {"3.png": picture(3), "3.txt": b"not this", "3.json": b'{"caption": "but this"}'}
    examples = shards_of(tmp_path, members)
    assert [examples.texts(number) for number in range(4)] == [
        Texts("a seven"),
        Texts("", "which digit?", "seven"),
        Texts("a one", "which digit?", "seven"),
        Texts("but this"),
    ]
    assert np.array_equal(examples.open(2), smooth_picture((40, 30), 2))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"", "b.txt": b"a seven"}, r"x\.tar:b\.txt: a text without a picture beside it"),
        ({"a.png": b"", "b.json": b"{}"}, r"x\.tar:b\.json: a text without a picture beside it"),
        ({"a.png": b""}, r"x\.tar:a\.png: no texts beside it: expected a caption, or question and answer"),
        ({"a.png": b"", "a.json": b"{"}, r"x\.tar:a\.json is not JSON"),
        ({"a.png": b"", "a.json": b"{}"}, r"x\.tar:a\.json: expected a caption, or question and answer"),
        ({"a.png": b"", "a.txt": b" \n"}, r"x\.tar:a\.txt: caption: expected a text, not empty"),
        ({"a.png": b"", "a.txt": b"\xff"}, r"x\.tar:a\.txt: caption: expected a text, not empty, of valid Unicode"),
        ({"a.cls": b"7"}, r"no pictures in .*x\.tar"),
    ],
)
def test_bad_shards_are_refused_when_they_are_opened(tmp_path, tokenizer, members, message):
    with pytest.raises(CaptionError, match=message):
        CaptionedPictures(shards_of(tmp_path, members), tokenizer, **SIZES)


# the stream


def test_what_a_drawing_and_a_reading_are(folder, tokenizer):
    samples = CaptionedPictures(CaptionFolder(folder), tokenizer, **SIZES, drop_caption=0)
    drawn, read = (
        next(
            sample
            for sample in map(samples.__getitem__, range(8))
            if f"jsonl:{line} " in sample.name and wanted(sample)
        )
        for line, wanted in ((1, lambda s: s.value.kind == "drawing"), (3, lambda s: s.value.kind == "reading"))
    )
    assert drawn.value.ids.tolist() == prompt_ids(tokenizer, "a seven")
    assert not drawn.value.predicted.any()
    assert torch.equal(drawn.value.pixels[0], to_tensor(center_crop(smooth_picture((40, 30), 0), (8, 12))))
    ids, predicted = conversation_ids(tokenizer, about_a_picture("is it a seven?", "no"), [[FEATURES] * 4])
    assert read.value.ids.tolist() == ids
    assert read.value.predicted.tolist() == predicted
    assert sum(predicted) == 3
    assert torch.equal(read.value.pixels[0], to_tensor(center_crop(smooth_picture((40, 30), 2), (16, 16))))


@pytest.mark.parametrize(
    ("share", "length", "readings"), [(0.5, 2, 1), (0.25, 4, 1), (0.3, 10, 3), (0, 3, 0), (1, 3, 3)]
)
def test_every_run_of_neighbours_has_its_share_of_readings(tmp_path, tokenizer, share, length, readings):
    examples = CaptionFolder(write_folder(tmp_path, numbers_of(captions=2, questions=3)))
    samples = CaptionedPictures(examples, tokenizer, **SIZES, reading_share=share)
    kinds = [samples[position].value.kind == "reading" for position in range(40 + length)]
    assert {sum(kinds[first : first + length]) for first in range(40)} == {readings}


def test_every_epoch_of_a_kind_shows_all_its_examples_in_another_order(tmp_path, tokenizer):
    examples = CaptionFolder(write_folder(tmp_path, numbers_of(captions=4, both=2, questions=1)))
    samples = CaptionedPictures(examples, tokenizer, **SIZES, reading_share=0.25)
    stream = [samples[position] for position in range(24)]
    for kind, expected in (("drawing", range(1, 7)), ("reading", range(5, 8))):
        names = [sample.name for sample in stream if sample.value.kind == kind]
        epochs = [names[first : first + len(expected)] for first in range(0, len(names), len(expected))]
        assert len(epochs) in (2, 3)
        for epoch in epochs:
            assert sorted(int(name.split(":")[1].split()[0]) for name in epoch) == list(expected)
        if kind == "drawing":
            assert len(set(map(tuple, epochs))) > 1


def test_the_stream_follows_from_seed_and_position(folder, tokenizer):
    one, two, other = (CaptionedPictures(CaptionFolder(folder), tokenizer, **SIZES, seed=s) for s in (3, 3, 4))
    first = [one[position] for position in range(30)]
    assert [(s.name, s.value.ids.tolist()) for s in first] != [
        (other[p].name, other[p].value.ids.tolist()) for p in range(30)
    ]
    for position in (29, 3, 17):
        again = pickle.loads(pickle.dumps(two))[position]  # as workers that are not forked have it
        assert again.name == first[position].name
        assert torch.equal(again.value.ids, first[position].value.ids)
        assert torch.equal(again.value.pixels, first[position].value.pixels)


def test_captions_are_dropped_and_pictures_mirrored_as_often_as_wanted(folder, tokenizer):
    examples = CaptionFolder(folder)
    plain = CaptionedPictures(examples, tokenizer, **SIZES, drop_caption=0)
    other = CaptionedPictures(examples, tokenizer, **SIZES, drop_caption=0.25, flip=True)
    dropped, mirrored = [], []
    for position in range(400):
        a, b = plain[position].value, other[position].value
        mirrored.append(torch.equal(b.pixels, a.pixels.flip(-1)))
        assert mirrored[-1] != torch.equal(b.pixels, a.pixels)
        if a.kind == "drawing":
            dropped.append(b.ids.tolist() == [tokenizer.bos_token_id])
        assert torch.equal(a.ids, b.ids) != (a.kind == "drawing" and dropped[-1])
    assert 30 < sum(dropped) < 70
    assert 150 < sum(mirrored) < 250


def test_which_captions_are_dropped_follows_from_the_seed(folder, tokenizer):
    def dropped(seed):
        samples = CaptionedPictures(CaptionFolder(folder), tokenizer, **SIZES, seed=seed, drop_caption=0.5)
        return [len(samples[position].value.ids) == 1 for position in range(0, 40, 2)]

    assert dropped(0) == dropped(0) != dropped(1)


def test_the_share_must_fit_the_examples(tmp_path, tokenizer):
    both = CaptionFolder(write_folder(tmp_path, LINES))
    assert CaptionedPictures(both, tokenizer, **SIZES)[1].value.kind == "reading"
    with pytest.raises(ValueError, match=r"reading_share: expected a share in \[0, 1\], got 1.5"):
        CaptionedPictures(both, tokenizer, **SIZES, reading_share=1.5)
    with pytest.raises(ValueError, match=r"drop_caption: expected a share in \[0, 1\], got -1"):
        CaptionedPictures(both, tokenizer, **SIZES, drop_caption=-1)
    captions = CaptionFolder(write_folder(tmp_path, numbers_of(captions=2)))
    assert {CaptionedPictures(captions, tokenizer, **SIZES)[p].value.kind for p in range(4)} == {"drawing"}
    with pytest.raises(ValueError, match="expected 0, as no example has a question"):
        CaptionedPictures(captions, tokenizer, **SIZES, reading_share=0.5)
    questions = CaptionFolder(write_folder(tmp_path, numbers_of(questions=2)))
    assert {CaptionedPictures(questions, tokenizer, **SIZES)[p].value.kind for p in range(4)} == {"reading"}
    with pytest.raises(ValueError, match="expected 1, as no example has a caption"):
        CaptionedPictures(questions, tokenizer, **SIZES, reading_share=0.5)


def test_a_text_that_is_too_long_is_named(tmp_path, tokenizer):
    line = LINES[2]
    length = len(conversation_ids(tokenizer, about_a_picture(line["question"], line["answer"]), [[]])[0])
    examples = CaptionFolder(write_folder(tmp_path, [LINES[0], line]))
    sizes = {**SIZES, "max_text": length}
    CaptionedPictures(examples, tokenizer, **sizes)
    sizes["max_text"] -= 1
    with pytest.raises(
        CaptionError, match=rf"jsonl:2 \(more/b\.png\): a text of {length} ids, .* {length - 1} \(max_text\)"
    ):
        CaptionedPictures(examples, tokenizer, **sizes)
    samples = CaptionedPictures(
        shards_of(tmp_path, {"0.png": picture(0), "0.txt": b"a " * 40}), tokenizer, **SIZES, drop_caption=0
    )
    with pytest.raises(CaptionError, match=r"x\.tar:0\.png: a text of"):
        samples[0]


def test_a_damaged_picture_is_skipped_and_named(tmp_path, tokenizer):
    (tmp_path / "c.png").write_text("no picture")
    folder = write_folder(tmp_path, [*LINES, {"image": "c.png", "caption": "a nine"}])
    samples = CaptionedPictures(CaptionFolder(folder), tokenizer, **SIZES)
    stream = [samples[position] for position in range(8)]
    assert {name for sample in stream for name in sample.skipped} == {f"{folder}/captions.jsonl:5 (c.png)"}
    assert all("c.png" not in sample.name for sample in stream)
    for file in folder.rglob("*.png"):
        file.write_text("no picture")
    with pytest.raises(PictureError, match=r"none of the 2 pictures can be read"):
        samples[1]


def test_drawings_with_sources(tmp_path, tokenizer):
    """Their pictures in both sizes and their slots; of some everything is dropped, of some the caption alone."""
    source = [FEATURES] * 2 + [TOKENS]
    examples = CaptionFolder(write_folder(tmp_path, [EDITED, {"image": "a.png", "caption": "a seven"}]))
    how = {"drop_caption": 0.3, "drop_source": 0.2, "flip": True, "source": source}
    samples = CaptionedPictures(examples, tokenizer, **SIZES, **how)
    bos, caption = [tokenizer.bos_token_id], prompt_ids(tokenizer, "make it bold")
    whole = samples.whole("drawing", 0)
    assert whole.ids.tolist() == source * 2 + caption
    for place, seed in enumerate((0, 2)):
        picture = smooth_picture((40, 30), seed)
        assert torch.equal(whole.sources[place], to_tensor(center_crop(picture, (8, 12))))
        assert torch.equal(whole.seen[place], to_tensor(center_crop(picture, (16, 16))))
    counts = dict.fromkeys(("nothing", "sources", "whole"), 0)
    for position in range(400):
        sample = samples[position]
        if ":1 " not in sample.name:
            assert len(sample.value.sources) == 0
            continue
        ids, sources = sample.value.ids.tolist(), len(sample.value.sources)
        kind = {0: "nothing", 2: "whole" if ids[len(source) * 2 :] == caption else "sources"}[sources]
        assert ids == source * sources + (caption if kind == "whole" else bos)
        counts[kind] += 1
        mirrored = torch.equal(sample.value.pixels, whole.pixels.flip(-1))
        if sources:
            assert torch.equal(sample.value.sources, whole.sources.flip(-1) if mirrored else whole.sources)
    assert 25 < counts["nothing"] < 57
    assert 40 < counts["sources"] < 82
    drawings, _ = samples.collate([whole, samples.whole("drawing", 1), whole])
    assert torch.equal(drawings.sources, torch.cat([whole.sources] * 2))
    assert torch.equal(drawings.seen, torch.cat([whole.seen] * 2))
    assert drawings.ids[1].tolist()[-3:] == prompt_ids(tokenizer, "a seven")[-3:]
    with pytest.raises(CaptionError, match=r"jsonl:1 .*: text and pictures take \d+ slots; .* positions for 20"):
        CaptionedPictures(examples, tokenizer, **SIZES, source=source, context=20, tokens=12)
    with pytest.raises(ValueError, match=r"drop_source: expected a share in \[0, 1\], got 2"):
        CaptionedPictures(examples, tokenizer, **SIZES, drop_source=2)


def test_readings_of_several_pictures(tmp_path, tokenizer):
    told = {**TALK, "messages": TALK["messages"][1:]}  # there is no template for a system prompt
    folder = write_folder(tmp_path, [told, {"image": "b.png", **QUESTION}])
    samples = CaptionedPictures(CaptionFolder(folder), tokenizer, **SIZES)
    values = [samples.whole("reading", number) for number in (0, 1)]
    _, readings = samples.collate(values)
    assert torch.equal(readings.images, torch.cat([value.pixels for value in values]))
    assert len(readings.images) == 3
    for row, value in enumerate(values):
        assert readings.ids[row][readings.real[row]].tolist() == value.ids.tolist()
        answers = readings.ids[row, -readings.answer.shape[1] :][readings.answer[row]]
        assert answers.tolist() == value.ids[value.predicted].tolist()
    assert (readings.ids == FEATURES).sum() == 12
    with pytest.raises(CaptionError, match=r"jsonl:1 .*: a system prompt needs a tokenizer with a chat template"):
        CaptionedPictures(CaptionFolder(write_folder(tmp_path, [TALK])), tokenizer, **SIZES)


# batches


def test_batches_are_padded_before_the_last_text(folder, tokenizer):
    samples = CaptionedPictures(CaptionFolder(folder), tokenizer, **SIZES)
    values = [samples[position].value for position in range(12)]
    drawings, readings = samples.collate(values)
    for kind, batch, size in (("drawing", drawings, (8, 12)), ("reading", readings, (16, 16))):
        own = [value for value in values if value.kind == kind]
        longest = max(len(value.ids) for value in own)
        assert batch.images.shape == (6, 3, *size)
        assert batch.images.dtype == torch.uint8
        assert batch.ids.shape == batch.real.shape == (6, longest)
        assert batch.ids.dtype == torch.int64
        assert batch.real.dtype == torch.bool
        for row, value in enumerate(own):
            padding, pictures = longest - len(value.ids), 4 if kind == "reading" else 0
            assert torch.equal(batch.images[row], value.pixels[0])
            assert batch.ids[row, :pictures].tolist() == [FEATURES] * pictures
            assert batch.ids[row, pictures : pictures + padding].tolist() == [tokenizer.pad_token_id] * padding
            assert batch.ids[row][batch.real[row]].tolist() == value.ids.tolist()
            if kind == "reading":
                answers = [int(own_value.predicted.sum()) for own_value in own]
                assert batch.answer[row].tolist() == [False] * (max(answers) - answers[row]) + [True] * answers[row]
    assert not drawings.real.all()


def test_a_batch_of_one_kind_has_no_rows_of_the_other(folder, tokenizer):
    samples = CaptionedPictures(CaptionFolder(folder), tokenizer, **SIZES)
    drawings, readings = samples.collate([samples[1].value])
    assert readings.images.shape == (1, 3, 16, 16)
    assert [tuple(tensor.shape) for tensor in drawings] == [
        *((0, 3, 8, 12), (0, 0), (0, 0)),
        *((0, 3, 8, 12), (0, 3, 16, 16)),
    ]
    assert [tensor.dtype for tensor in drawings[:3]] == [torch.uint8, torch.int64, torch.bool]
    drawings, readings = samples.collate([samples[0].value])
    assert drawings.images.shape == (1, 3, 8, 12)
    assert [tuple(tensor.shape) for tensor in readings] == [(0, 3, 16, 16), (0, 0), (0, 0), (0, 0)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_workers_give_the_same_batches(tmp_path, tokenizer, kind, workers, capfd):
    if kind == "shards":
        members = {f"{i}.png": picture(i) for i in range(5)} | {f"{i}.txt": b"a seven" for i in range(3)}
        members |= {f"{i}.json": json.dumps(QUESTION).encode() for i in range(2, 5)}
        examples = shards_of(tmp_path, members)
    else:
        examples = CaptionFolder(write_folder(tmp_path, LINES))
    samples = CaptionedPictures(examples, tokenizer, **SIZES)
    batches = list(itertools.islice(load(samples, Positions(6, 4, 4), workers, pin_memory=False), 3))
    for number, batch in enumerate(batches):
        expected = [samples[position] for position in range(6 + 4 * number, 10 + 4 * number)]
        assert batch.names == [sample.name for sample in expected]
        for ours, theirs in zip(batch.inputs, samples.collate([sample.value for sample in expected]), strict=True):
            assert type(ours) is type(theirs)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not capfd.readouterr().err  # the tokenizers package may not complain of having been forked
