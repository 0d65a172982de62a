"""`uniflow unifluid` as a person uses it: training from files, resuming, drawing, asking, and what is refused."""

import functools
import io
import json
import pickle
import re
import shutil
import signal
import sys
import tarfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters

from tests.conftest import randomize
from tests.uniflow.test_cli import contents, fails, files, in_the_third_step, ok
from tests.uniflow.unifluid.conftest import LLAMA
from tests.uniflow.unifluid.test_features import siglip
from tests.uniflow.unifluid.test_tokens import autoencoder
from uniflow.cli import run as run_command
from uniflow.training.recipe import read_run
from uniflow.unifluid import UniFluid, UniFluidConfig
from uniflow.unifluid.recipe import UniFluidRun

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


@pytest.fixture(autouse=True)
def no_bars():
    """Those that transformers shows when it reads and writes weights stand where errors are looked for."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


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


def test_train_generate_and_ask(capsys, monkeypatch, run_file, place):
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
    question += ["--longest", 8]
    printed = ok(capsys, "unifluid", "ask", place / "data", *question, "--batch-size", 3)
    answered = [line.split("\t")[0] for line in printed.splitlines()]
    assert answered == [str(place / "data" / f"{number}.png") for number in range(8)]
    alone = ok(capsys, "unifluid", "ask", place / "data" / "5.png", *question)
    assert alone == printed.splitlines(keepends=True)[5]

    odd = place / "odd"
    odd.mkdir()
    shutil.copy(place / "data" / "5.png", odd / "[b]\x1b[31m.png")
    (odd / "bad.png").write_text("x")
    monkeypatch.setattr("uniflow.cli.unifluid.answer", lambda *_: ["red\x1b[0m\nor\tblue"])
    assert run_command(["unifluid", "ask", str(odd), *map(str, question)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{odd}/[b]\\x1b[31m.png\tred\\x1b[0m or blue\n"
    assert f"skipped: {odd}/bad.png is not a picture" in printed.err
    assert "bad.png is not a picture" in fails(capsys, "unifluid", "ask", odd, *question, "--strict")


def test_train_on_shards(capsys, run_file, place):
    """What a folder says, shards say in KEY.json and KEY.txt."""
    lines = [json.loads(line) for line in (place / "data" / "captions.jsonl").read_text().splitlines()]
    for shard in range(2):
        with tarfile.open(place / f"{shard}.tar", "w") as tar:
            for line in lines[4 * shard : 4 * shard + 4]:
                name = line.pop("image")
                parts = {name: (place / "data" / name).read_bytes()}
                if shard:
                    parts[name.replace("png", "txt")] = line.pop("caption").encode()
                parts[name.replace("png", "json")] = json.dumps(line).encode()
                for part, content in parts.items():
                    member = tarfile.TarInfo(part)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    recipe = f"{{{RECIPE.replace('steps: 4', 'steps: 2')}, workers: 1}}"
    ok(capsys, "unifluid", "train", run_file(data=f"{{shards: '{place}/{{0..1}}.tar'}}", recipe=recipe))
    assert list(losses(place / "run")) == [1, 2]
    # the texts are those of the folder, and so are what they are made of
    ok(capsys, "unifluid", "train", run_file(data=f"{{folder: {place}/data}}", recipe=recipe), "--out", place / "other")
    assert contents(last(place / "run") / "text_tokenizer") == contents(last(place / "other") / "text_tokenizer")


def test_train_around_a_pretrained_backbone(capsys, run_file, place, make_model):
    given = make_model({"tie_word_embeddings": True})
    given.backbone.save_pretrained(place / "llama")
    given.text_tokenizer.save_pretrained(place / "llama")
    model = f"{{backbone: {place / 'llama'}, head_width: 32, head_depth: 1, order: raster, head: ddpm}}"
    rate = (
        "stages: [{steps: 2, train: decoder, warmup_steps: 0}, {steps: 2, encoder_learning_rate: 1e-4}], batch_size: 2"
    )
    ok(capsys, "unifluid", "train", run_file(model=model, recipe=f"{{{rate}, log_every: 1, save_every: 2}}"))
    frozen, trained = (UniFluid.from_pretrained(folder) for folder in sorted((place / "run/checkpoints").iterdir()))
    for name, value in given.backbone.state_dict().items():
        assert torch.equal(frozen.backbone.state_dict()[name], value)
        assert not torch.equal(trained.backbone.state_dict()[name], value)
    assert (trained.config.order, trained.config.head) == ("raster", "ddpm")
    assert trained.text_tokenizer.get_vocab() == given.text_tokenizer.get_vocab()
    assert str(place) not in (last(place / "run") / "config.json").read_text()
    command = ["unifluid", "generate", "a blue square", "--checkpoint", last(place / "run"), "--head-steps", 2]
    ok(capsys, *command, "--tokenizer", place / "tokenizer", "--count", 1, "--out", place / "drawn")


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_train_with_sources_and_conversations(capsys, run_file, place, make_model):
    """Around a backbone whose tokenizer has a chat template; its validation draws from the first sources."""
    given = make_model({"max_position_embeddings": 128})
    tokenizer = pickle.loads(pickle.dumps(given.text_tokenizer))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    given.backbone.save_pretrained(place / "llama")
    tokenizer.save_pretrained(place / "llama")
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "which?"}]
    talk += [{"role": "assistant", "content": "red"}]
    lines = [{"image": f"{n}.png", "caption": "its mirror image", "source": f"{n + 1}.png"} for n in range(4)]
    lines += [{"image": ["5.png", "6.png"], "messages": talk}, {"image": "0.png", "caption": "a red square"}]
    (place / "data" / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    model = f"{{backbone: {place / 'llama'}, head_width: 32, head_depth: 1, checkpointing: all}}"
    recipe = f"{{{RECIPE.replace('steps: 4', 'steps: 2')}}}"
    samples = "{captions: 3, steps: 2, head_steps: 2, cfg: 2.0, cfg_source: 1.5, cfg_schedule: linear}"
    ok(capsys, "unifluid", "train", run_file(model=model, recipe=recipe, samples=samples))
    assert all(text > 0 and image > 0 for _, text, image in losses(place / "run").values())
    trained = UniFluid.from_pretrained(last(place / "run"))
    assert trained.config.sources == "both"
    assert trained.text_tokenizer.chat_template == TEMPLATE

    for parameter in trained.head.parameters():  # so short a training leaves its output about zero
        nn.init.normal_(parameter, std=0.2)
    trained.save_pretrained(place / "model")
    seen = ["--checkpoint", place / "model", "--tokenizer", place / "tokenizer", "--head-steps", 2, "--count", 1]
    seen += ["--cfg-schedule", "cosine"]
    source = ["--source", place / "data" / "1.png"]
    command = ["unifluid", "generate", "its mirror image", *seen, "--cfg-source", 2]
    assert "--cfg-source: expected 1 without --source" in fails(capsys, *command, "--out", place / "none")
    assert "vision: expected the folder of the encoder" in fails(capsys, *command, *source, "--out", place / "none")
    assert not (place / "none").exists()
    drawn = {}
    for name, sources in (("one", source), ("other", ["--source", place / "data" / "2.png"]), ("two", source * 2)):
        ok(capsys, *command, *sources, "--vision", place / "tokenizer", "--out", place / name)
        drawn[name] = (place / name / "sheet.png").read_bytes()
    assert len(set(drawn.values())) == 3
    ask = ["unifluid", "ask", place / "data" / "0.png", "--question", "which?", "--checkpoint", last(place / "run")]
    assert ok(capsys, *ask, "--vision", place / "tokenizer", "--system", "Be brief.", "--longest", 4).count("\t") == 1
    assert "spells no special token" in fails(capsys, *ask, "--vision", place / "tokenizer", "--system", "<|im_end|>")


@pytest.fixture
def others(place):
    """An AutoencoderKL of diffusers and a SigLIP, as folders."""
    autoencoder(sample_size=16).save_pretrained(place / "autoencoder")
    siglip().save_pretrained(place / "siglip")
    return {"tokenizer": place / "autoencoder", "vision": place / "siglip"}


def test_train_with_an_autoencoder_and_another_encoder(capsys, run_file, place, others):
    """At another size than the autoencoder's own, of packed latents, which generate finds by itself; merged patches."""
    recipe = f"{{{RECIPE.replace('steps: 4', 'steps: 2')}}}"
    model = f"{{config: {CONFIG}, head_width: 32, head_depth: 1, vocabulary: 300, vision_merge: 2, vision_layers: 2}}"
    ok(capsys, "unifluid", "train", run_file(**others, image_size="[8, 16]", packing=2, recipe=recipe, model=model))
    checkpoint = last(place / "run")
    config = UniFluidConfig.from_pretrained(checkpoint)
    assert (config.grid, config.token_channels, config.packing) == ((2, 4), 16, 2)
    assert [line["step"] for line in log(place / "run") if "validation_text" in line] == [2]
    command = ["unifluid", "generate", "a grey square", "--checkpoint", checkpoint, "--head-steps", 2, "--count", 1]
    ok(capsys, *command, "--tokenizer", others["tokenizer"], "--out", place / "drawn")
    assert Image.open(place / "drawn" / "a-grey-square-0.png").size == (16, 8)
    question = ["--question", "which colour?", "--checkpoint", checkpoint, "--longest", 4]
    assert ok(capsys, "unifluid", "ask", place / "data" / "0.png", *question, "--vision", others["vision"])

    # neither is any other one
    assert "tokenizer: gives" in fails(capsys, *command, "--tokenizer", place / "tokenizer", "--out", place / "none")
    autoencoder(seed=1).save_pretrained(place / "autoencoder2")
    assert "tokenizer: has other weights than the one that the model was trained with" in fails(
        capsys, *command, "--tokenizer", place / "autoencoder2", "--out", place / "none"
    )
    siglip(seed=1).save_pretrained(place / "siglip2")
    for other, message in (("siglip2", "vision: has other weights"), ("tokenizer", "features of 256 channels")):
        assert message in fails(
            capsys, "unifluid", "ask", place / "data" / "0.png", *question, "--vision", place / other
        )
    assert not (place / "none").exists()


@pytest.mark.parametrize(
    ("texts", "kind", "untrained"),
    [
        ({"caption": "a {} square"}, "image", ["backbone.lm_head.weight"]),
        ({"question": "which colour?", "answer": "{}"}, "text", ["head.", "place_embedding", "query_", "token_proj"]),
    ],
)
def test_data_of_one_kind(capsys, run_file, place, others, texts, kind, untrained):
    """It needs no encoder to draw only; what it does not train stays as it is, without decay or moments."""
    write_folder(place / "data", [texts] * 4)
    changes = {"tokenizer": others["tokenizer"], "image_size": "[8, 8]"} if kind == "image" else {}
    recipe = f"{{{RECIPE}, weight_decay: 0.5, micro_batch_size: 1}}"
    ok(capsys, "unifluid", "train", run_file(**changes, recipe=recipe))
    run = place / "run"
    for _, text, image in losses(run).values():
        assert (text > 0, image > 0) == (kind == "text", kind == "image")
    assert {key for line in log(run) for key in line if "validation" in key} == {f"validation_{kind}"}
    assert (run / "samples").exists() == (kind == "image")
    first, end = (load_file(run / f"checkpoints/step-0000000{step}/model.safetensors") for step in (1, 4))
    same = [name for name in first if torch.equal(first[name], end[name]) and not name.startswith("token_")]
    assert [name for name in same if not name.startswith(tuple(untrained))] == []
    assert {prefix for prefix in untrained if any(name.startswith(prefix) for name in same)} >= set(untrained) - {
        "token_proj"
    }


# resuming


def resumed(capsys, run_file, place, step, **changes):
    """The run as it was when it was killed after its checkpoint of a step, gone on with."""
    for checkpoint in (place / "run" / "checkpoints").iterdir():
        if checkpoint.name > f"step-{step:08}":
            shutil.rmtree(checkpoint)
    return run_file(**changes), "--resume", "auto"


@pytest.fixture
def averaging(run_file):
    """A run of both kinds in micro-batches, with a moving average and a change of stage."""
    stages = "[{steps: 2, warmup_steps: 0, train: decoder}, {steps: 2, warmup_steps: 0}]"
    recipe = f"{{{RECIPE.replace('[{steps: 4, warmup_steps: 0}]', stages)}, micro_batch_size: 2, ema_decay: 0.9}}"

    def write(**changes):
        return run_file(recipe=recipe, **changes)

    return write


def test_a_run_goes_on_as_if_it_had_never_stopped(capsys, averaging, place):
    run = place / "run"
    ok(capsys, "unifluid", "train", averaging())
    whole, end = losses(run), contents(last(run))
    assert len(whole) == 4
    for step in (3, 2, 1):
        ok(capsys, "unifluid", "train", *resumed(capsys, averaging, place, step))
        assert losses(run) == whole
        for name in ("model.safetensors", "ema/model.safetensors"):
            assert contents(last(run))[name] == end[name]


def test_it_does_not_go_on_with_other_ids_or_encoders(capsys, averaging, place, tiny):
    run = place / "run"
    ok(capsys, "unifluid", "train", averaging())
    before = contents(run)
    texts = [{"caption": "a {} circle, a {} circle", "question": "which hue?", "answer": "{}"}] * 8
    write_folder(place / "data", texts)
    wrong = fails(capsys, "unifluid", "train", averaging(), "--resume", "auto")
    assert "step-00000004 does not hold this model: its config.json has another" in wrong
    assert wrong.endswith("text_tokenizer")
    randomize(tiny(image_size=8), seed=1).save_pretrained(place / "tokenizer2")
    other = averaging(tokenizer=place / "tokenizer2", vision=place / "tokenizer")
    wrong = fails(capsys, "unifluid", "train", other, "--resume", "auto")
    assert re.search("has another (backbone, )?tokenizer, text_tokenizer$", wrong)
    assert contents(run) == before
    # with the tokenizer that it had, it learns the new texts
    old = shutil.copytree(last(run) / "text_tokenizer", place / "old")
    model = f"{{config: {CONFIG}, head_width: 32, head_depth: 1, text_tokenizer: {old}}}"
    changed = averaging(model=model)
    changed.write_text(changed.read_text().replace("{steps: 2, warmup_steps: 0}]", "{steps: 3, warmup_steps: 0}]"))
    shutil.rmtree(last(run))
    ok(capsys, "unifluid", "train", changed, "--resume", "auto")
    assert list(losses(run)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=lambda end: end.name)
def test_a_killed_run_goes_on(forked, capsys, averaging, place, end):
    killed, whole = place / "killed", place / "whole"
    config = averaging()
    status, said = forked(in_the_third_step(end), "unifluid", "train", config, "--out", killed)
    assert status == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 0}[end], said
    assert last(killed).name == {signal.SIGKILL: "step-00000002", signal.SIGTERM: "step-00000003"}[end]
    ok(capsys, "unifluid", "train", config, "--out", killed, "--resume", "auto")
    ok(capsys, "unifluid", "train", config, "--out", whole)
    assert losses(killed) == losses(whole)
    for part in ("model.safetensors", "ema/model.safetensors"):
        assert (last(killed) / part).read_bytes() == (last(whole) / part).read_bytes()


# bad input: one line, status 2, and nothing written


def test_texts_and_pictures_that_cannot_be(capsys, run_file, place):
    """To draw and to read, with a model that is what it should be."""
    ok(capsys, "unifluid", "train", run_file(recipe="{stages: [{steps: 1}], batch_size: 2}"))
    checkpoint = last(place / "run")
    (place / "file").write_text("x")
    data = (place / "data" / "0.png").read_bytes()
    (place / "cut.png").write_bytes(data[: len(data) // 2])
    out = ["--out", place / "none"]
    long = "far too many words " * 20
    generate = {"--checkpoint": checkpoint, "--tokenizer": place / "tokenizer", "--head-steps": 2}
    ask = {"--checkpoint": checkpoint, "--vision": place / "tokenizer", "--question": "which colour?"}
    picture = place / "data" / "0.png"
    cases = [
        (["generate", "  "], {}, "captions: expected a text, not empty and in UTF-8, got '  '"),
        (["generate", "\udcff"], {}, r"captions: expected a text, not empty and in UTF-8, got '\udcff'"),
        (["generate", "a"], {"--count": 10**9}, "Invalid value for '--count'"),
        (["generate", "a"], {"--cfg": "nan"}, "cfg: expected a finite number, got nan"),
        (["generate", "a"], {"--cfg-schedule": "cos"}, "--cfg-schedule: expected one of constant, linear, cosine"),
        (["generate", "a"], {"--source": picture}, "sources: the model draws from text alone"),
        (["generate", "a"], {"--source": place / "none.png"}, "none.png"),
        (["generate", "a"], {"--cfg-source": "nan"}, "--cfg-source: expected a finite number, got nan"),
        (["ask", picture], {"--system": "x"}, "a system prompt needs a tokenizer with a chat template"),
        (["generate", "a"], {"--temperature": "inf"}, "--temperature: expected a finite number, got inf"),
        (["generate", "a red square", long], {"--batch-size": 1}, "context: the transformer has positions for 64 tok"),
        (["generate", "a"], {"--steps": 5}, "steps: expected between 1 and 4, the picture's tokens, got 5"),
        (["generate", "a"], {"--steps": 0}, "Invalid value for '--steps'"),
        (["generate", "a"], {"--tokenizer": place / "file"}, "no image tokenizer in"),
        (["generate", "a"], {"--tokenizer": place / "none"}, "no image tokenizer in"),
        (["generate", "a"], {"--tokenizer": checkpoint}, "'uniflow_with_encoder', got 'unifluid'"),
        (["generate", "a"], {"--checkpoint": place / "tokenizer"}, "expected a JSON object with model_type 'unifluid'"),
        (["generate", "a"], {"--checkpoint": place / "file"}, "is a file, expected a checkpoint folder"),
        (["generate", "a"], {"--checkpoint": place}, f"no such file: {place / 'config.json'}"),
        (["generate", "a"], {"--out": place / "file"}, "is a file, expected a folder to write to"),
        (["generate", "a"], {"--dtype": "int8"}, "--dtype: expected auto, float32, bfloat16, float16, got 'int8'"),
        (["ask", picture], {"--question": " "}, "--question: expected a text"),
        (["ask", picture], {"--question": long}, "context: the transformer has positions for 64 tokens"),
        (["ask", picture, place / "cut.png"], {}, "cut.png is damaged"),
        (["ask", place / "none.png"], {}, "no such file or folder"),
        (["ask", picture], {"--checkpoint": place / "tokenizer"}, "model_type 'unifluid'"),
        (["ask", picture], {"--vision": place / "file"}, "file is a file, expected the folder with config.json"),
        (["ask", picture], {"--vision": checkpoint}, "has no model of the kind 'unifluid'"),
    ]
    for (command, *what), changes, message in cases:
        options = {**(generate | dict([out]) if command == "generate" else ask), **changes}
        arguments = [part for option in options.items() for part in option]
        assert message in fails(capsys, "unifluid", command, *what, *arguments), (what, changes)
        assert not (place / "none").exists()
    assert (place / "file").read_text() == "x"


def test_a_model_that_only_draws_is_not_asked(capsys, run_file, place):
    write_folder(place / "data", [{"caption": "a {} square"}] * 4)
    ok(capsys, "unifluid", "train", run_file(recipe="{stages: [{steps: 1}], batch_size: 2}"))
    wrong = fails(
        capsys,
        *("unifluid", "ask", place / "data" / "0.png", "--question", "which colour?"),
        *("--checkpoint", last(place / "run"), "--vision", place / "tokenizer"),
    )
    assert "the model was made without vision_channels, it reads no pictures" in wrong


def test_training_that_cannot_be(capsys, run_file, place, others):
    questions = write_folder(place / "questions", [{"question": "which colour?", "answer": "{}"}] * 4)
    captions = write_folder(place / "captions", [{"caption": "a {} square"}] * 4)
    long = write_folder(place / "long", [BOTH, {"caption": "far too many words " * 20}])
    cut = write_folder(place / "cut", [BOTH])
    data = (cut / "0.png").read_bytes()
    (cut / "0.png").write_bytes(data[: len(data) // 2])
    halves = write_folder(place / "halves", [{"question": "which colour?"}])
    both = place / "data"
    (place / "file").write_text("x")
    once = "stages: [{steps: 1}]"
    small = {"tokenizer": others["tokenizer"], "image_size": "[8, 8]"}
    cases = [
        (small, "vision: the data have questions or sources, and"),
        ({**small, "vision": others["tokenizer"]}, "encoder"),
        ({"data": f"{{folder: {long}}}"}, r"captions.jsonl:2 (1.png): a text of"),
        ({"data": f"{{folder: {both}, max_text: 4}}"}, "at most 4 (max_text) are allowed"),
        ({"data": f"{{folder: {both}, max_text: 61}}"}, "data.max_text: expected at most 60"),
        ({"data": f"{{folder: {both}, max_text: 0}}"}, "max_text: expected at least 1, got 0"),
        ({"data": f"{{folder: {both}, validation: {long}}}"}, r"captions.jsonl:2 (1.png): a text of"),
        ({"data": f"{{folder: {captions}, validation: {questions}}}"}, "as no example has a caption"),
        ({"data": f"{{folder: {cut}}}"}, "0.png is damaged"),
        ({"data": f"{{folder: {halves}}}"}, "captions.jsonl:1: question without answer"),
        ({"data": f"{{folder: {place}}}"}, f"no captions.jsonl in {place}"),
        ({"data": f"{{folder: {place / 'file'}}}"}, "no captions.jsonl in"),
        ({"data": f"{{shards: {place / 'none.tar'}}}"}, "no such file"),
        ({"data": f"{{shards: {place / 'file'}}}"}, "is no tar"),
        ({"samples": "{cfg_source: 2}"}, "samples.cfg_source: expected 1 for data without sources, got 2"),
        ({"samples": "{cfg_schedule: cos}"}, "samples.cfg_schedule: "),
        ({"samples": "{steps: 5}"}, "steps: expected between 1 and 4"),
        ({"samples": "{head_steps: 0}"}, "samples: head_steps: expected at least 1, got 0"),
        ({"recipe": f"{{{once}, batch_size: 3, micro_batch_size: 1}}"}, "micro_batch_size: expected at least 2"),
        (
            {"recipe": f"{{{once}, batch_size: 4}}", "data": f"{{folder: {both}, reading_share: 0.2}}"},
            "micro_batch_size: expected at least 5, to have pictures to draw and pictures to read in each with a "
            "reading_share of 0.2; got 4",
        ),
        ({"tokenizer": place / "file"}, "no image tokenizer in"),
        ({"image_size": "[8, 9]"}, "image_size: expected multiples of 4 pixels"),
        ({"model": "{config: {hidden_size: 8}}"}, "with its model_type"),
        (
            {"model": f"{{config: {json.dumps({**LLAMA, 'vocab_size': 9})}}}"},
            "more than the vocab_size of the backbone (9)",
        ),
        ({"model": "{}"}, "model: expected either backbone or config"),
        ({"model": f"{{backbone: {place / 'none'}}}"}, "no config.json in"),
        ({"model": f"{{backbone: {place / 'tokenizer'}}}"}, "holds no language model"),
        ({"model": f"{{config: {CONFIG}, vocabulary: 10}}"}, "size: expected at least 259"),
        ({"objective": "{head_repeats: 0}"}, "head_repeats: expected at least 1"),
        ({"tokenizer": None}, "tokenizer: Field required"),
        ({"data": f"{{folder: {both}, colour: 1}}"}, "data.colour: Unexpected keyword argument"),
        ({"out": place / "file"}, "is a file, expected a folder to write to"),
    ]
    for changes, message in cases:
        assert message in fails(capsys, "unifluid", "train", run_file(**changes)), changes
        assert not (place / "run").exists()


@pytest.mark.parametrize("module", ["transformers", "diffusers"])
def test_missing_extras_are_named(capsys, run_file, others, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    extra = {"transformers": "hf"}.get(module, module)
    wrong = fails(capsys, "unifluid", "train", run_file(**others))
    assert f"pip install 'uniflow-kernels[{extra}]'" in wrong


# precision


def test_bfloat16(capsys, run_file, place):
    """Under autocast parameters stay float32; in a model of 16 bits the statistics of the tokens do."""
    out, half = place / "run", place / "half"
    recipe = RECIPE.replace("steps: 4", "steps: 2")
    ok(capsys, "unifluid", "train", run_file(recipe=f"{{{recipe}}}"))
    ok(capsys, "unifluid", "train", run_file(recipe=f"{{{recipe}, precision: bfloat16}}"), "--out", half)
    assert losses(half) != losses(out)
    for step, (whole, *_) in losses(out).items():
        assert losses(half)[step][0] == pytest.approx(whole, rel=0.03)
    state = load_file(last(half) / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}

    generate = ["unifluid", "generate", "a red square", "--checkpoint", last(half), "--tokenizer", place / "tokenizer"]
    ask = ["unifluid", "ask", place / "data" / "0.png", "--question", "which colour?", "--checkpoint", last(half)]
    ask += ["--longest", 4]
    drawn = {}
    for dtype in ("float32", "bfloat16", "float16"):
        model = UniFluid.from_pretrained(last(half), dtype=getattr(torch, dtype))
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
        assert torch.equal(model.token_mean, state["token_mean"])
        assert torch.equal(model.token_std, state["token_std"])
        few = ["--count", 1, "--head-steps", 2, "--dtype", dtype, "--out", place / dtype]
        ok(capsys, *generate, *few)
        drawn[dtype] = np.asarray(Image.open(place / dtype / "sheet.png"), float)
        assert ok(capsys, *ask, "--vision", place / "tokenizer", "--dtype", dtype).count("\t") == 1
    assert not np.array_equal(drawn["bfloat16"], drawn["float32"])
    for dtype in ("bfloat16", "float16"):
        assert np.abs(drawn[dtype] - drawn["float32"]).mean() < 10


@pytest.mark.slow
def test_compiled(capsys, run_file, place, monkeypatch):
    # what Inductor would generate takes a minute and a half to compile here, and is not this project's
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    config = CONFIG.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1')
    model = f"{{config: {config}, head_width: 32, head_depth: 1, vocabulary: 300}}"
    recipe = "stages: [{steps: 1}], batch_size: 4"
    ok(capsys, "unifluid", "train", run_file(model=model, recipe=f"{{{recipe}}}"))
    counters.clear()
    ok(capsys, "unifluid", "train", run_file(model=model, recipe=f"{{{recipe}, compile: true}}"), "--out", place / "c")
    assert counters["stats"]["unique_graphs"] >= 1
    assert losses(place / "c")[1] == pytest.approx(losses(place / "run")[1], rel=1e-4)


def test_the_example_shows_every_key_and_its_default():
    path = Path(__file__).parents[3] / "examples" / "unifluid.yaml"
    run = read_run(path, UniFluidRun)
    text = path.read_text()
    for part in (run, run.model, run.objective, run.data, run.samples, run.recipe, run.recipe.stages[1]):
        for key in fields(part):
            (line,) = [line for line in text.splitlines() if re.match(rf"[\s#-]*{key.name}:", line)][-1:]
            if re.search(r"# default(;|$)", line):
                assert getattr(part, key.name) == key.default, line
