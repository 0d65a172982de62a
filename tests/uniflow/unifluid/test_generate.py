"""`uniflow unifluid generate` of files of captions, and by several processes; `ask` likewise."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import smooth_picture
from tests.uniflow.evaluation.conftest import Colours, colours  # noqa: F401
from tests.uniflow.test_cli import contents, fails, files, ok
from tests.uniflow.training import two
from uniflow.cli import main
from uniflow.evaluation import FeatureStatistics, frechet_distance
from uniflow.pictures import open_picture, to_tensor


@pytest.fixture
def place(make_model, tiny, tmp_path):
    """A model that draws from text and other pictures, and a file of five captions, one without a source."""
    tiny(image_size=8).save_pretrained(tmp_path / "tokenizer")
    make_model(token_channels=8, grid=(2, 2), vision_channels=64, sources="both").save_pretrained(tmp_path / "model")
    (tmp_path / "sources").mkdir()
    for number in range(2):
        smooth_picture((12, 10), number).save(tmp_path / "sources" / f"{number}.png")
    lines = [
        {"caption": "a seven", "mine": [1, "\u00e9"]},
        {"caption": "bold", "source": "sources/0.png"},
        {"caption": "a mix", "source": ["sources/0.png", "sources/1.png"]},
        {"caption": "bold", "source": "sources/1.png"},
        {"caption": "bold", "source": ["sources/0.png"]},
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def command(place, what, out, *more):
    where = ["--checkpoint", place / "model", "--tokenizer", place / "tokenizer", "--vision", place / "tokenizer"]
    few = ["--steps", 2, "--head-steps", 2, "--cfg", 2, "--count", 2, "--batch-size", 4, "--device", "cpu"]
    return ["unifluid", "generate", what, *where, *few, "--out", place / out, *more]


def picture(path):
    return np.asarray(Image.open(path), np.int64)


def test_a_file_of_captions(capsys, place):
    """Each picture is of its line: what the command draws of the caption and the sources by themselves."""
    said = ok(capsys, *command(place, place / "captions.jsonl", "drawn"))
    assert f"10 pictures and pictures.jsonl written to {place / 'drawn'}" in said
    lines = [json.loads(line) for line in (place / "drawn" / "pictures.jsonl").read_text().splitlines()]
    names = [f"{line:06}-{number}.png" for line in range(5) for number in range(2)]
    assert [line.pop("image") for line in lines] == names
    assert files(place / "drawn") == sorted([*names, "pictures.jsonl"])
    given = [json.loads(line) for line in (place / "captions.jsonl").read_text().splitlines()]
    assert lines == [line for line in given for _ in range(2)]
    # the same in a file of one line: its block has the same seed, and there is nothing else that it could depend on
    (place / "one.jsonl").write_text(json.dumps(given[1]))
    ok(capsys, *command(place, place / "one.jsonl", "one"))
    both = ["--source", place / "sources" / "0.png"]
    ok(capsys, *command(place, "bold", "named", *both))
    for number in range(2):
        assert (
            np.abs(
                picture(place / "one" / f"000000-{number}.png") - picture(place / "named" / f"bold-{number}.png")
            ).max()
            <= 1
        )
    (place / "other.jsonl").write_text(json.dumps(given[3]))
    ok(capsys, *command(place, place / "other.jsonl", "other"))
    assert contents(place / "other") != contents(place / "one")  # sources are not mixed up


def test_what_was_drawn_is_scored(capsys, place, colours):  # noqa: F811
    """The two commands of the docs: all pictures of a file of captions, and nothing else, against a folder."""
    lines = [{"caption": f"a {word}"} for word in ("seven", "three", "nine", "one")]
    (place / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    few = ["--batch-size", 8, "--count", 4]
    assert "16 pictures" in ok(capsys, *command(place, place / "texts.jsonl", "many", *few))
    (place / "originals").mkdir()
    for number in range(20):
        smooth_picture((8, 8), 50 + number).save(place / "originals" / f"{number}.png")
    given = ["--generated", place / "many", "--reference", place / "originals", "--features", colours, "--size", 8]
    found = json.loads(ok(capsys, "evaluate", *given, "--json").splitlines()[-1])
    drawn = [json.loads(line)["image"] for line in (place / "many" / "pictures.jsonl").read_text().splitlines()]
    statistics = []
    for paths in ([place / "many" / name for name in drawn], sorted((place / "originals").iterdir())):
        statistics.append(FeatureStatistics(12))
        pictures = [to_tensor(open_picture(path)) for path in paths]
        statistics[-1].add(Colours()(torch.stack(pictures), return_features=True))
    assert (found["pictures"], found["skipped"]) == (16, 0)
    assert found["fid"] == pytest.approx(frechet_distance(*statistics), rel=1e-6)
    assert found["fid"] > 0


@pytest.mark.parametrize("what", ["file", "captions", "answers"])
def test_processes_share_the_pictures(place, what):
    """One and three: the same bytes, of a file's pictures, of a sheet, and of drawn answers in their order."""

    def arguments(world):
        if what == "file":
            return command(place, place / "captions.jsonl", f"{world}")
        if what == "captions":
            return command(place, "a seven", f"{world}", "--count", 9)
        ask = ["unifluid", "ask", place / "sources", "-q", "which?", "--checkpoint", place / "model", "--batch-size", 1]
        return [*ask, "--vision", place / "tokenizer", "--longest", 3, "--temperature", 2, "--device", "cpu"]

    def act():
        with open(place / f"printed-{world}", "a", encoding="utf-8") as sys.stdout:
            main([str(each) for each in arguments(world)])

    for world in (1, 3):
        (place / f"{world}").mkdir()
        for said, status in two.both(act, place, world):
            assert status == 0, said
    assert contents(place / "1") == contents(place / "3")
    printed = [(place / f"printed-{world}").read_text(encoding="utf-8").splitlines() for world in (1, 3)]
    assert len(printed[0]) == len(printed[1]) == (2 if what == "answers" else 1)
    if what == "answers":
        assert printed[0] == printed[1]
        assert [line.split("\t")[0] for line in printed[0]] == [str(place / "sources" / f"{n}.png") for n in range(2)]
    else:
        assert len(files(place / "1")) == {"file": 11, "captions": 10}[what]


def test_bad_input(capsys, place, make_model):
    make_model(token_channels=8, grid=(2, 2)).save_pretrained(place / "text")
    for name, line in (
        ("none", {"source": "sources/0.png"}),
        ("away", {"caption": "a", "source": "../0.png"}),
        ("plain", {"caption": "a"}),
        ("long", {"caption": "far too many words " * 20}),
    ):
        (place / f"{name}.jsonl").write_text(json.dumps({"caption": "first"}) + "\n" + json.dumps(line))
    (place / "empty.jsonl").write_text("\n")
    for arguments, message in (
        (command(place, place / "none.jsonl", "out"), "none.jsonl:2: caption: expected a text"),
        (command(place, place / "away.jsonl", "out"), "source: ../0.png is outside the folder"),
        (command(place, place / "empty.jsonl", "out"), "holds no captions"),
        (command(place, place / "long.jsonl", "out"), "context: the transformer has positions for 64"),
        (command(place, place / "plain.jsonl", "out", "--cfg-source", 2), "--cfg-source: expected 1 without source in"),
        (command(place, place / "plain.jsonl", "out", "--source", "a.png"), "--source: expected none with a file"),
        (command(place, place / "captions.jsonl", "out", "--checkpoint", place / "text"), "draws from text alone"),
        (command(place, place / "missing.jsonl", "out"), "no such file"),
    ):
        assert message in fails(capsys, *arguments), message
        assert not (place / "out").exists()
