"""`uniflow unifluid` as a person uses it: training from files, resuming, drawing, asking, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.uniflow.test_cli import contents, fails, files, ok
from tests.uniflow.unifluid.conftest import LLAMA
from uniflow.unifluid import UniFluid

COLOURS = {"red": (220, 40, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "grey": (120, 120, 120)}
CONFIG = json.dumps({name: value for name, value in LLAMA.items() if name != "vocab_size"})
RECIPE = "stages: [{steps: 4, warmup_steps: 0}], batch_size: 4, log_every: 1, save_every: 1, validate_every: 2, keep: 9"


def picture(colour, seed):
    noise = np.random.default_rng(seed).integers(-25, 25, (8, 8, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).astype(np.uint8))


def write_folder(folder, texts):
    """A picture for each of some dictionaries of texts, whose colours come in turn; "{}" stands for the colour."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number, fields_ in enumerate(texts):
        colour = list(COLOURS)[number % len(COLOURS)]
        picture(colour, number).save(folder / f"{number}.png")
        filled = {name: text.replace("{}", colour) for name, text in fields_.items()}
        lines.append(json.dumps({"image": f"{number}.png", **filled}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


BOTH = {"caption": "a {} square", "question": "which colour?", "answer": "{}"}


@pytest.fixture
def place(tiny, tmp_path):
    """A tokenizer of 2x2 tokens, pictures with captions and questions; runs go to `run`."""
    tiny(image_size=8).save_pretrained(tmp_path / "tokenizer")
    write_folder(tmp_path / "data", [BOTH] * 8)
    return tmp_path


@pytest.fixture
def run_file(place):
    """Write a configuration of a quick run; changes are lines that replace those of the same key."""

    def write(**changes):
        lines = {
            "tokenizer": place / "tokenizer",
            "model": f"{{config: {CONFIG}, head_width: 32, head_depth: 1, vocabulary: 300}}",
            "data": f"{{folder: {place / 'data'}, validation: {place / 'data'}}}",
            "samples": "{captions: 3, steps: 2, head_steps: 2}",
            "out": place / "run",
            "tensorboard": "false",
            "recipe": f"{{{RECIPE}}}",
            **changes,
        }
        path = place / "run.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items() if value is not None))
        return path

    return write


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    return {line["step"]: (line["loss"], line["text"], line["image"]) for line in log(out) if "loss" in line}


def last(out):
    return sorted((out / "checkpoints").iterdir())[-1]


# training, and what its checkpoints are good for


def test_train_generate_and_ask(capsys, run_file, place):
    run = place / "run"
    printed = ok(capsys, "unifluid", "train", run_file())
    assert f"trained at step 4, last loss {losses(run)[4][0]:.4f}; checkpoint in {last(run)}" in printed
    lines = log(run)
    for line in lines:
        if "loss" in line:
            assert line["loss"] == pytest.approx(line["text"] + line["image_weight"] * line["image"], rel=1e-5)
            assert line["text"] > 0
            assert line["image"] > 0
    scored = [line for line in lines if "validation_text" in line]
    assert [line["step"] for line in scored] == [2, 4]
    assert all(line["validation_image"] > 0 for line in scored)
    assert sorted(files(run / "samples")) == ["step-00000002.png", "step-00000004.png"]
    assert Image.open(run / "samples" / "step-00000004.png").size == (24, 8)  # three captions

    model = UniFluid.from_pretrained(last(run))
    assert model.head.net.final_layer.linear.weight.abs().max() > 0 if hasattr(model.head, "net") else True
    assert model.token_std.min() > 0
    assert len(files(last(run) / "text_tokenizer")) >= 2

    out = place / "drawn"
    command = ["unifluid", "generate", "a red square", "A red square!", "--checkpoint", last(run)]
    command += ["--tokenizer", place / "tokenizer", "--steps", 3, "--head-steps", 2, "--count", 2]
    assert "4 pictures and sheet.png written" in ok(capsys, *command, "--out", out)
    names = ["a-red-square-0.png", "a-red-square-1.png", "a-red-square_2-0.png", "a-red-square_2-1.png", "sheet.png"]
    assert files(out) == names
    sheet = np.asarray(Image.open(out / "sheet.png"))
    assert sheet.shape == (16, 16, 3)
    for name, (top, left) in zip(names, [(0, 0), (0, 8), (8, 0), (8, 8)], strict=False):
        assert np.array_equal(np.asarray(Image.open(out / name)), sheet[top : top + 8, left : left + 8])
    before = contents(out)
    assert "exists; --force overwrites it" in fails(capsys, *command, "--out", out, "--seed", 1)
    assert contents(out) == before
    ok(capsys, *command, "--out", out, "--seed", 1, "--force")
    assert contents(out) != before
    ok(capsys, *command, "--out", out, "--force")
    assert contents(out) == before

    question = ["--question", "which colour?", "--checkpoint", last(run), "--vision", place / "tokenizer"]
    printed = ok(capsys, "unifluid", "ask", place / "data", *question, "--batch-size", 3)
    answered = [line.split("\t")[0] for line in printed.splitlines()]
    assert answered == [str(place / "data" / f"{number}.png") for number in range(8)]
    alone = ok(capsys, "unifluid", "ask", place / "data" / "5.png", *question)
    assert alone == printed.splitlines(keepends=True)[5]
