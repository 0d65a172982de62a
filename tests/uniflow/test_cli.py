"""The command as a person uses it: results, errors as one line with status 2, interrupts, a full disk."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.conftest import GOLDEN, smooth_picture
from uniflow import UniFlow
from uniflow.cli import run
from uniflow.cli.inputs import Named, load_checkpoint
from uniflow.pictures import center_crop, open_picture

CHECKPOINT = ["--checkpoint", str(GOLDEN)]


def ok(capsys, *arguments):
    status = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def fails(capsys, *arguments):
    """Status 2 and one line on stderr, which is returned."""
    status = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert status == 2
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("uniflow: ")
    return lines[0]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder):
    return {name: (folder / name).read_bytes() for name in files(folder)}


# what it does


def test_reconstruct_files_and_folders(capsys, picture_folder, tmp_path):
    out = tmp_path / "out"
    printed = ok(capsys, "reconstruct", picture_folder, picture_folder / "a.png", *CHECKPOINT, "--out", out)
    assert files(out) == ["a-2.png", "a.png", "b.png", "more/c.png"]
    assert all(Image.open(out / name).size == (56, 56) for name in files(out))
    assert "mean" in printed
    assert "images/s" in printed

    # the numbers printed are those of the pictures written
    original = np.asarray(center_crop(open_picture(picture_folder / "a.png"), 56), float)
    mse = np.square((np.asarray(Image.open(out / "a.png"), float) - original) / 255).mean()
    assert f"{-10 * np.log10(mse):.2f}" in next(line for line in printed.splitlines() if "a.png" in line)


def test_keep_size_rounds_to_the_patch(capsys, picture_folder, tmp_path):
    ok(capsys, "reconstruct", picture_folder, *CHECKPOINT, "--out", tmp_path / "out", "--keep-size")
    sizes = {name: Image.open(tmp_path / "out" / name).size for name in files(tmp_path / "out")}
    assert sizes == {"a.png": (42, 28), "b.png": (28, 56), "more/c.png": (42, 42)}


@pytest.mark.parametrize("keep", [[], ["--keep-size"]])
@pytest.mark.parametrize(
    "sampling",
    [
        [],
        ["--steps", 3, "--schedule", "pow_0.5", "--cfg", 1.5, "--cfg-interval", 0.1, 2],
        ["--steps", 2, "--schedule", "shifted_2", "--solver", "heun", "--temperature", 0.5],
        ["--precision", "fp8"],
    ],
)
def test_decode_writes_what_reconstruct_writes(capsys, picture_folder, tmp_path, keep, sampling):
    same = [*CHECKPOINT, "--batch-size", 2]
    ok(capsys, "reconstruct", picture_folder, *same, *keep, *sampling, "--seed", 5, "--out", tmp_path / "one")
    latents = tmp_path / "latents.safetensors"
    precision = sampling if "--precision" in sampling else []
    ok(capsys, "encode", picture_folder, *same, *keep, *precision, "--out", latents)
    ok(capsys, "decode", latents, *same, *sampling, "--seed", 5, "--out", tmp_path / "two")
    assert files(tmp_path / "one") == ["a.png", "b.png", "more/c.png"]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    ok(capsys, "decode", latents, *same, *sampling, "--seed", 6, "--out", tmp_path / "three")
    assert contents(tmp_path / "two") != contents(tmp_path / "three")


def test_the_seeds_noise_does_not_depend_on_the_batches(capsys, picture_folder, tmp_path):
    for size in (1, 3):
        ok(capsys, "reconstruct", picture_folder, *CHECKPOINT, "--out", tmp_path / str(size), "--batch-size", size)
    for name in files(tmp_path / "1"):
        one, three = (np.asarray(Image.open(tmp_path / str(size) / name), int) for size in (1, 3))
        assert np.abs(one - three).max() <= 1  # the order of sums may round differently


def test_the_options_reach_the_model(capsys, picture_folder, tmp_path):
    one = [picture_folder / "a.png", *CHECKPOINT]
    variants = {
        "1": [],
        "4": ["--steps", 4],
        "bf16": ["--dtype", "bfloat16"],
        "fp8": ["--precision", "fp8"],
        "heun": ["--steps", 4, "--solver", "heun"],
        "cold": ["--temperature", 0.5],
    }
    for name, options in variants.items():
        ok(capsys, "reconstruct", *one, *options, "--out", tmp_path / name)
    assert len({(tmp_path / name / "a.png").read_bytes() for name in variants}) == len(variants)


def test_what_float32_costs_is_said_on_a_gpu(capsys):
    """Unless float32 is asked for; here of models that only say where they are."""

    def said(device, stored, dtype="auto"):
        model = SimpleNamespace(device=torch.device(device), dtype=stored)
        load_checkpoint(lambda *_, **__: model, Named(GOLDEN), "cpu", dtype)
        return capsys.readouterr().err

    assert said("cuda", torch.float32).startswith(
        "uniflow: computes in float32, as the checkpoint is: --dtype bfloat16"
    )
    assert not said("cuda", torch.bfloat16)
    assert not said("cuda", torch.float32, "float32")
    assert not said("cpu", torch.float32)


def test_pictures_in_less_memory_are_the_same(capsys, picture_folder, tmp_path):
    for command, memory in (("reconstruct", "10MB"), ("reconstruct", "250KB"), ("decode", "200 kb")):
        source = picture_folder
        if command == "decode":
            source = tmp_path / "latents.safetensors"
            ok(capsys, "encode", picture_folder, *CHECKPOINT, "--out", source)
        out = tmp_path / memory
        ok(capsys, command, source, *CHECKPOINT, "--out", out, "--max-memory", memory, "--workers", 1)
    whole = tmp_path / "10MB"
    for name in files(whole):
        for memory in ("250KB", "200 kb"):
            a, b = (np.asarray(Image.open(folder / name), int) for folder in (whole, tmp_path / memory))
            assert np.abs(a - b).max() <= 1


def test_latents_in_less_memory_are_the_same(capsys, picture_folder, tmp_path, monkeypatch):
    encode, together = UniFlow.encode, []
    monkeypatch.setattr(UniFlow, "encode", lambda self, images: together.append(len(images)) or encode(self, images))
    encoded = {}
    for memory, batches in (("10MB", [3]), ("400KB", [2, 1]), ("200 kb", [1, 1, 1])):
        out = tmp_path / f"{memory}.safetensors"
        together.clear()
        ok(capsys, "encode", picture_folder, *CHECKPOINT, "--out", out, "--max-memory", memory, "--workers", 1)
        assert together == batches
        encoded[memory] = load_file(out)
    for fewer in ("400KB", "200 kb"):
        assert encoded["10MB"].keys() == encoded[fewer].keys()
        assert all(torch.allclose(encoded[fewer][name], x, atol=1e-5) for name, x in encoded["10MB"].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-memory", "lots"], "--max-memory: expected a number of bytes as in 2GB"),
        (["--max-memory", "1KB"], "--max-memory: encoding a picture of 56x56 needs at least"),
        (["--workers", 0], "Invalid value for '--workers'"),
    ],
)
def test_bad_input_to_encode(capsys, picture_folder, tmp_path, options, message):
    for pictures in (picture_folder, picture_folder / "a.png"):  # many, and one
        assert message in fails(
            capsys, "encode", pictures, *CHECKPOINT, "--out", tmp_path / "out.safetensors", *options
        )
    assert not (tmp_path / "out.safetensors").exists()


def test_force_overwrites(capsys, picture_folder, tmp_path):
    arguments = ["reconstruct", picture_folder, *CHECKPOINT, "--out", tmp_path / "out"]
    ok(capsys, *arguments)
    before = contents(tmp_path / "out")
    assert "exists; --force overwrites it" in fails(capsys, *arguments, "--seed", 1)
    assert contents(tmp_path / "out") == before
    ok(capsys, *arguments, "--seed", 1, "--force")
    assert contents(tmp_path / "out") != before


def test_evaluate(capsys, picture_folder):
    printed = ok(capsys, "evaluate", picture_folder, *CHECKPOINT)
    assert "rFID was not computed: it needs --features" in printed
    assert printed.splitlines()[1].startswith("3\t")
    assert "no such file" in fails(capsys, "evaluate", picture_folder, *CHECKPOINT, "--features", "none.pt")


def test_evaluate_is_the_mean_of_reconstruct(capsys, picture_folder, tmp_path):
    table = ok(capsys, "reconstruct", picture_folder, *CHECKPOINT, "--out", tmp_path / "out")
    db = next(line for line in table.splitlines() if line.startswith("mean")).split("\t")[4]
    assert db in ok(capsys, "evaluate", picture_folder, *CHECKPOINT)


@pytest.fixture
def train_file(picture_folder, tmp_path):
    """Write a configuration of a quick run; changes are lines that replace those of the same key."""

    def write(name="run.yaml", **changes):
        lines = {
            "model": "{preset: tiny, config: {image_size: 16, hidden_size: 48, vit_hidden_size: 48}}",
            "data": f"{{folder: {picture_folder}, validation: {picture_folder}}}",
            "out": tmp_path / "run",
            "tensorboard": "false",
            "recipe": "{stages: [{steps: 5}], batch_size: 4, log_every: 1, save_every: 2, validate_every: 2}",
            **changes,
        }
        path = tmp_path / name
        path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
        return path

    return write


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_train_writes_checkpoints_logs_and_samples(capsys, train_file, tmp_path):
    out, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000005"
    printed = ok(capsys, "train", train_file())
    assert f"trained at step 5, last loss {losses(out)[5]:.4f}; checkpoint in {checkpoint}" in printed
    assert list(losses(out)) == [1, 2, 3, 4, 5]
    assert len(list((out / "checkpoints").iterdir())) == 3
    assert {"samples/step-00000002.png", "samples/step-00000004.png"} <= set(files(out))
    model = UniFlow.from_pretrained(checkpoint)
    # the flow head starts at zero and has learned something
    assert model.flow_head.net.final_layer.linear.weight.abs().max() > 0

    assert "is no sharded checkpoint" in fails(capsys, "gather", checkpoint, "--out", tmp_path / "gathered")
    assert not (tmp_path / "gathered").exists()

    before = contents(out)
    assert "exists; --resume auto goes on from there, --force starts anew" in fails(capsys, "train", train_file())
    assert contents(out) == before
    ok(capsys, "train", train_file(), "--force")
    after = contents(out)
    weights = "checkpoints/step-00000005/model.safetensors"
    assert after[weights] == before[weights]  # the same seed

    # the encoder of a checkpoint teaches, be it the student's own or another
    recipe = "{stages: [{steps: 1}], log_every: 1, seed: 1}"
    for name, changes in {
        "own": {"model": f"{{checkpoint: {checkpoint}}}"},
        "other": {"objective": f"{{teacher: {checkpoint}, distill_weight: 2}}"},
    }.items():
        ok(capsys, "train", train_file(recipe=recipe, **changes), "--out", tmp_path / name)
        line = json.loads((tmp_path / name / "log.jsonl").read_text())
        assert len(line["alpha"]) == 2
        assert (max(line["alpha"]) > 0.1) == (name == "other")
        weight = 2 if name == "other" else 1
        assert line["loss"] == pytest.approx(line["flow"] + weight * line["distill"], rel=1e-5)


@pytest.mark.slow
def test_train_around_an_encoder_of_the_transformers_package(capsys, train_file, picture_folder, tmp_path):
    """Two stages, and a resume in the second, which gives the losses of the run that did not stop."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(tmp_path / "dinov2")
    capsys.readouterr()
    decoder, data = "{latent_ch: 8, global_blocks_depth: 1, num_decoder_layers: 1}", f"{{folder: {picture_folder}}}"
    config = train_file(
        model=f"{{encoder: {tmp_path}/dinov2, config: {decoder}}}",
        data=data,
        recipe="{stages: [{train: decoder, steps: 2}, {steps: 3}], batch_size: 4, log_every: 1, save_every: 2, "
        "ema_decay: 0.9}",
    )
    ok(capsys, "train", config)
    out = tmp_path / "run"
    complete = losses(out)
    older, newest = (out / "checkpoints" / f"step-0000000{step}" for step in (4, 5))
    trained = contents(newest)
    ok(capsys, "train", config, "--resume", older, "--force")
    assert losses(out) == complete
    assert contents(newest).keys() == trained.keys()
    for name in ("model.safetensors", "ema/model.safetensors", "config.json"):
        assert contents(newest)[name] == trained[name]
    student, start = UniFlow.from_pretrained(newest), UniFlow.from_encoder(tmp_path / "dinov2", latent_ch=8)
    assert student.config.encoder == start.config.encoder
    assert all((a != b).any() for a, b in zip(student.encoder.parameters(), start.encoder.parameters(), strict=True))
    shutil.rmtree(tmp_path / "dinov2")  # the checkpoint needs it no more, as student nor as teacher
    recipe = "{stages: [{steps: 1}], log_every: 1}"
    ok(
        capsys,
        "train",
        train_file(model=f"{{checkpoint: {newest}}}", data=data, recipe=recipe),
        "--out",
        tmp_path / "on",
    )
    assert len(json.loads((tmp_path / "on" / "log.jsonl").read_text())["alpha"]) == 2


def test_train_on_shards(capsys, train_file, picture_folder, tmp_path):
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            tar.add(picture_folder / "a.png", "a.png")
            tar.add(picture_folder / "b.jpg", "b.jpg")
    recipe = "{stages: [{steps: 1}], batch_size: 2}"
    for name, shards in (("braces", "{0..1}.tar"), ("stars", "*.tar")):
        config = train_file(data=f"{{shards: '{tmp_path}/{shards}'}}", recipe=recipe)
        ok(capsys, "train", config, "--out", tmp_path / name)
    state = "checkpoints/step-00000001/model.safetensors"
    assert (tmp_path / "braces" / state).read_bytes() == (tmp_path / "stars" / state).read_bytes()


def test_resume_names_a_damaged_checkpoint(capsys, train_file, tmp_path):
    out = tmp_path / "run"
    ok(capsys, "train", train_file())
    complete = losses(out)
    newest = out / "checkpoints" / "step-00000005"
    (newest / "optimizer.pt").write_bytes(b"")
    status = run(["train", str(train_file()), "--resume", "auto"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert f"{newest} is damaged: optimizer.pt is not as it was written; going on from" in captured.err
    assert "step-00000004" in captured.err
    assert losses(out) == complete

    # an older checkpoint, by name
    older = out / "checkpoints" / "step-00000002"
    assert "step-00000005 is newer than" in fails(capsys, "train", train_file(), "--resume", older)
    ok(capsys, "train", train_file(), "--resume", older, "--force")
    assert losses(out) == complete

    # a finished one; a folder without one
    ok(capsys, "train", train_file(), "--resume", newest, "--out", tmp_path / "other")
    assert "is no checkpoint of a training run" in fails(capsys, "train", train_file(), "--resume", tmp_path)
    for manifest in out.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    assert "is whole" in fails(capsys, "train", train_file(), "--resume", "auto")
    ok(capsys, "train", train_file(), "--resume", "auto", "--out", tmp_path / "new")  # nothing there yet
    assert losses(tmp_path / "new") == complete


def test_doctor(capsys):
    printed = ok(capsys, "doctor")
    assert torch.__version__ in printed
    assert "layerwise_distillation" in printed


@pytest.mark.slow
def test_demo_in_seconds(capsys, tmp_path):
    ok(capsys, "demo", "--out", tmp_path / "demo", "--seconds", 8)
    out = tmp_path / "demo"
    assert files(out) == [
        "checkpoint/config.json",
        "checkpoint/model.safetensors",
        "checkpoint/preprocessor_config.json",
        "loss.png",
        "metrics.json",
        "reconstruction.png",
    ]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["held_out"]["psnr_1_step"] > 10
    assert {"psnr_4_step", "ssim_1_step"} <= metrics["trained_on"].keys()
    assert all(min(Image.open(out / name).size) > 200 for name in ("loss.png", "reconstruction.png"))
    UniFlow.from_pretrained(out / "checkpoint")
    assert "exists; --force" in fails(capsys, "demo", "--out", out)


# bad input: one line, status 2, and nothing written


@pytest.fixture
def pictures(picture_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("hello")
    data = (picture_folder / "b.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "file").write_text("")
    shutil.copytree(GOLDEN, tmp_path / "other")
    state = load_file(GOLDEN / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in state.items() if "chal" not in name}, tmp_path / "other/model.safetensors"
    )
    shutil.copytree(GOLDEN, tmp_path / "garbled")
    (tmp_path / "garbled" / "config.json").write_text("{")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{p}/none.png", *CHECKPOINT], "no such file or folder: {p}/none.png"),
        (["{p}/text.png", *CHECKPOINT], "text.png is not a picture"),
        (["{p}/pictures", "{p}/truncated.jpg", *CHECKPOINT], "truncated.jpg is damaged"),
        (["{p}/empty", *CHECKPOINT], "no pictures in {p}/empty"),
        (["{p}/pictures", "--checkpoint", "{p}/none"], "no such checkpoint folder: {p}/none"),
        (["{p}/pictures", "--checkpoint", "{p}/empty"], "config.json"),
        (["{p}/pictures", "--checkpoint", "{p}/garbled"], "config.json is not JSON"),
        (
            ["{p}/pictures", "--checkpoint", "{p}/other"],
            "does not hold this model; keys missing (8): chal_proj.c_fc.weight",
        ),
        (["{p}/pictures", *CHECKPOINT, "--steps", "0"], "Invalid value for '--steps'"),
        (["{p}/pictures", *CHECKPOINT, "--schedule", "cosine"], "schedule: expected 'linear', or 'pow_'"),
        (["{p}/pictures", *CHECKPOINT, "--solver", "rk4"], "solver: expected one of euler, heun, midpoint"),
        (["{p}/pictures", *CHECKPOINT, "--cfg-interval", "2", "1"], "cfg_interval: expected"),
        (["{p}/pictures", *CHECKPOINT, "--max-memory", "lots"], "--max-memory: expected a number of bytes as in 2GB"),
        (["{p}/pictures", *CHECKPOINT, "--max-memory", "1e400GB"], "--max-memory: expected a number of bytes as in"),
        (["{p}/pictures", *CHECKPOINT, "--steps", "9" * 20], "Invalid value for '--steps'"),
        (["{p}/pictures", *CHECKPOINT, "--seed", str(2**64)], "Invalid value for '--seed'"),
        (["{p}/pictures", *CHECKPOINT, "--cfg", "nan"], "cfg: expected a finite number, got nan"),
        (["{p}/pictures", *CHECKPOINT, "--temperature", "inf"], "--temperature: expected a finite number, got inf"),
        (["{p}/pictures", *CHECKPOINT, "--max-memory", "1KB"], "MB, got 0.001 MB"),
        (["{p}/pictures", *CHECKPOINT, "--dtype", "int8"], "--dtype: expected auto, float32, bfloat16, float16"),
        (["{p}/pictures", *CHECKPOINT, "--precision", "fp4"], "precision: expected one of fp8, got 'fp4'"),
        (["{p}/pictures", *CHECKPOINT, "--device", "tpu"], "--device: expected auto, cpu, cuda"),
        (["{p}/pictures", *CHECKPOINT, "--bogus"], "No such option"),
        (["{p}/pictures"], "Missing option"),
    ],
)
def test_bad_input_to_reconstruct(capsys, pictures, arguments, message):
    out = pictures / "out"
    arguments = [argument.format(p=pictures) for argument in arguments]
    assert message.format(p=pictures) in fails(capsys, "reconstruct", *arguments, "--out", out)
    assert not out.exists()


def test_bad_outputs(capsys, pictures):
    for out in (pictures / "file", pictures / "file" / "below"):
        assert "is a file, expected a folder" in fails(
            capsys, "reconstruct", pictures / "pictures", *CHECKPOINT, "--out", out
        )
    (pictures / "empty").rename(pictures / "empty.safetensors")
    assert "is a folder, expected a file" in fails(
        capsys, "encode", pictures / "pictures", *CHECKPOINT, "--out", pictures / "empty.safetensors"
    )
    assert files(pictures / "empty.safetensors") == []


def test_bad_latents(capsys, pictures, tmp_path):
    latents, out = tmp_path / "latents.safetensors", tmp_path / "out"
    assert "no such file" in fails(capsys, "decode", latents, *CHECKPOINT, "--out", out)
    ok(capsys, "encode", pictures / "pictures", *CHECKPOINT, "--out", latents)
    assert "exists; --force" in fails(capsys, "encode", pictures / "pictures", *CHECKPOINT, "--out", latents)

    model = UniFlow.from_pretrained(GOLDEN)
    with torch.no_grad():
        model.chal_proj.c_proj.bias.add_(1)
    model.save_pretrained(tmp_path / "trained")
    wrong = fails(capsys, "decode", latents, "--checkpoint", tmp_path / "trained", "--out", out)
    assert "same shape with other weights" in wrong
    assert "holds no UniFlow latents" in fails(
        capsys, "decode", GOLDEN / "model.safetensors", *CHECKPOINT, "--out", out
    )
    latents.write_bytes(latents.read_bytes()[:-20])
    assert "is damaged" in fails(capsys, "decode", latents, *CHECKPOINT, "--out", out)
    assert not out.exists()


def test_bad_training_input(capsys, pictures, train_file, tmp_path):
    out = tmp_path / "run"
    assert "no such file: " in fails(capsys, "train", pictures / "none.yaml")
    cases = [
        ({"data": "{folder: none}"}, "no such folder: none"),
        ({"data": f"{{folder: {pictures / 'empty'}}}"}, "no pictures in"),
        ({"data": "{shards: none-*.tar}"}, "no such file: none-*.tar"),
        ({"model": "{preset: huge}"}, "expected one of tiny, small, base, got 'huge'"),
        ({"model": "{preset: tiny, config: {image_size: 17}}"}, "image_size: expected a multiple of patch_size"),
        ({"model": "{preset: tiny, config: {colour: 1}}"}, "colour"),
        ({"model": "{checkpoint: none}"}, "no such checkpoint folder: none"),
        ({"recipe": "{stages: []}"}, "recipe: stages: expected at least one"),
        ({"recipe": "{stages: [{steps: 1}], batch_size: 3, micro_batch_size: 2}"}, "micro_batch_size: expected a div"),
        ({"recipe": "{stages: [{steps: 1}], parallel: fsdp}"}, "parallel: fsdp needs torchrun"),
        ({"objective": "{t_distribution: normal}"}, "t_distribution: expected one of"),
        ({"extra": "1"}, "extra: Unexpected keyword argument"),
        ({"out": "null"}, "out: expected a folder here or as --out"),
    ]
    for changes, message in cases:
        assert message in fails(capsys, "train", train_file(**changes))
    bad = pictures / "pictures" / "bad.png"
    bad.write_text("x")
    assert "bad.png is not a picture" in fails(capsys, "train", train_file())  # one to validate on
    assert not out.exists()
    assert "is no checkpoint of a training run" in fails(capsys, "gather", pictures / "other", "--out", out)
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys, pictures):
    assert "cuda is not available here" in fails(
        capsys, "reconstruct", pictures / "pictures", *CHECKPOINT, "--out", pictures / "out", "--device", "cuda"
    )


def test_help_of_every_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    commands = ["demo", "train", "gather", "reconstruct", "encode", "decode", "generate", "evaluate"]
    commands += ["show", "export", "doctor"]
    unifluid = [["unifluid", command] for command in ("train", "generate", "ask")]
    for command in [[], ["unifluid"], *([command] for command in commands), *unifluid]:
        said = ok(capsys, *command, "--help")
        assert "Show this message and exit." in " ".join(said.replace("│", " ").split())
        assert f"uniflow {' '.join(command)}".strip() in said
        assert max(map(len, said.splitlines())) <= 80
        assert "[0<=x<=9223372036854" not in said  # which left the texts a third of the width


def test_missing_extras_are_named(capsys, monkeypatch):
    for module in ("uniflow.cli.app", "typer"):
        monkeypatch.delitem(sys.modules, module, raising=False)

    class NoTyper:
        def find_spec(self, name, path=None, target=None):
            if name == "typer":
                raise ModuleNotFoundError("No module named 'typer'", name="typer")

    monkeypatch.setattr(sys, "meta_path", [NoTyper(), *sys.meta_path])
    assert "the command needs typer: pip install 'uniflow-kernels[cli]'" in fails(capsys, "doctor")


def test_an_extra_that_is_missing_later_is_named(capsys, monkeypatch, picture_folder, tmp_path):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    for module in ("uniflow.evaluation.similarity", "uniflow.evaluation.scores"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    wrong = fails(capsys, "reconstruct", picture_folder, *CHECKPOINT, "--out", tmp_path / "out")
    assert "the command needs torchmetrics: pip install 'uniflow-kernels[cli]'" in wrong


# as processes: a full disk, an interrupt


def limit_file_size():
    # writing past the limit fails as it would on a full disk; Python would keep half of a module that it compiles
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.parametrize("command", ["encode", "train", "reconstruct"])
def test_a_full_disk_leaves_nothing(forked, tmp_path, command):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    for i in range(40):
        noise = np.random.default_rng(i).integers(0, 256, (224, 224, 3), dtype=np.uint8)
        (Image.fromarray(noise) if command == "reconstruct" else smooth_picture((60, 60), i)).save(
            pictures / f"{i}.png"
        )
        if command == "reconstruct":
            break
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{preset: tiny}}\ndata: {{folder: {pictures}}}\ntensorboard: false\nrecipe: {{stages: [{{steps: 1}}]}}"
    )
    arguments = {
        "encode": ["encode", pictures, *CHECKPOINT, "--out", out / "latents.safetensors"],
        "train": ["train", config, "--out", out],
        "reconstruct": ["reconstruct", pictures, *CHECKPOINT, "--keep-size", "--out", out],
    }[command]
    status, said = forked(limit_file_size, *arguments)
    assert status == 2, said
    assert "Traceback" not in said
    assert said.strip().splitlines()[-1].startswith("uniflow: ")
    assert "File too large" in said
    assert not out.exists() or set(files(out)) <= {"log.jsonl"}


# each sends the signal to its own process at one exact moment, however slow the machine is
WHILE_IMPORTING = """
import importlib.abc, signal, sys
from uniflow.cli import main

class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "uniflow.training":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
main()
"""


def test_an_interrupt_while_importing_ends_with_130(train_file, tmp_path):
    command = [sys.executable, "-c", WHILE_IMPORTING, "train", str(train_file())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def in_the_third_step(end):
    steps = itertools.count(1)
    return lambda: register_optimizer_step_post_hook(lambda *_: next(steps) == 3 and signal.raise_signal(end))


def test_an_interrupt_in_training_ends_with_130(forked, train_file, picture_folder):
    config = train_file(data=f"{{folder: {picture_folder}}}")
    status, said = forked(in_the_third_step(signal.SIGINT), "train", config)
    assert status == 130, said
    assert "Traceback" not in said


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM], ids=lambda end: end.name)
def test_a_killed_run_goes_on_as_if_it_had_not_been(forked, capsys, train_file, picture_folder, tmp_path, end):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    config = train_file(data=f"{{folder: {picture_folder}}}")
    status, said = forked(in_the_third_step(end), "train", config, "--out", killed)
    assert status == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 0}[end], said
    # killed, the checkpoint before the third step is the last; ended, the third step is saved
    saved = sorted(path.name for path in (killed / "checkpoints").iterdir())
    assert saved[-1] == {signal.SIGKILL: "step-00000002", signal.SIGTERM: "step-00000003"}[end]
    ok(capsys, "train", config, "--out", killed, "--resume", "auto")
    ok(capsys, "train", config, "--out", whole)
    assert losses(killed) == losses(whole)
    weights = "checkpoints/step-00000005/model.safetensors"
    assert (killed / weights).read_bytes() == (whole / weights).read_bytes()


def test_importing_takes_no_time_and_needs_no_triton():
    program = """
import sys, time
sys.modules["triton"] = None
start = time.perf_counter()
import uniflow, uniflow_kernels
print(time.perf_counter() - start, "torch" in sys.modules)
uniflow.UniFlow, uniflow_kernels.FlowHead
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, imported_torch = done.stdout.split()
    assert float(seconds) < 3
    assert imported_torch == "False"


def test_no_temporary_file_survives_a_failing_block(tmp_path):
    from uniflow.atomic import replacing

    path = tmp_path / "x.txt"
    path.write_text("old")

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == ["x.txt"]
    assert path.read_text() == "old"
