"""`uniflow train` of a generator: what it learns, resuming to the bit, two processes, and what is refused."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from tests.uniflow.generation.conftest import write_set
from tests.uniflow.test_cli import fails, losses, ok
from tests.uniflow.training.two import both
from uniflow.cli import run
from uniflow.generation import FlowTransformer, draw_latents, picture_seeds
from uniflow.latent_set import LatentSet
from uniflow_kernels.solvers import Plan

MODEL = "{preset: S, config: {width: 32, depth: 2, heads: 2, head_width: 32, head_depth: 1}}"


@pytest.fixture
def file(latents, tmp_path):
    """Write a configuration; keys of the recipe and of the run may be others."""

    def write(stages="[{steps: 4}]", recipe="", name="run.yaml", **own):
        values = {"latents": latents, "model": MODEL, "tensorboard": "false", **own}
        values["recipe"] = f"{{stages: {stages}, ema_decay: 0.9, log_every: 1{recipe}}}"
        path = tmp_path / name
        path.write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
        return path

    return write


def checkpoint(out, step):
    return out / "checkpoints" / f"step-{step:08}"


def test_it_learns_the_classes(capsys, file, latents, tmp_path):
    """Only here: latents, labels, statistics and drawing belong together, from the command to what is drawn."""
    out = tmp_path / "out"
    stages = "[{steps: 150, learning_rate: 0.01, warmup_steps: 10}]"
    ok(capsys, "train", file(stages, ", batch_size: 16", data="{flip: false}"), "--out", out)
    found = list(losses(out).values())
    assert sum(found[-10:]) < 0.5 * sum(found[:10])
    model = FlowTransformer.from_pretrained(checkpoint(out, 150) / "ema")
    assert model.config.names == ["ant", "bee", "cat"]
    drawn = draw_latents(model, picture_seeds(0, range(9))[0], torch.arange(9) % 3, Plan(10, cfg=1.5))
    centers = torch.arange(9.0) % 3
    spread = torch.tensor([0.5, 1, 2, 4, 8, 16])
    away = ((drawn / spread).mean((1, 2)) - centers).abs()
    assert away.max() < 0.35, away
    assert LatentSet(latents).manifest.fingerprint == model.config.fingerprint


def test_resuming_is_to_the_bit(capsys, file, tokenizer_folder, latents, tmp_path):
    """And what a validation draws and scores changes nothing of it."""
    seen = {
        "data": f"{{validation: {latents}}}",
        "samples": f"{{tokenizer: {tokenizer_folder}, classes: 2, columns: 3, steps: 2}}",
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    three, two = (f"[{{steps: {steps}, final_learning_rate: 0.001}}]" for steps in (3, 2))
    ok(capsys, "train", file(three, ", validate_every: 2", **seen), "--out", whole)
    ok(capsys, "train", file(two, name="first.yaml"), "--out", parts)
    ok(capsys, "train", file(three, name="then.yaml"), "--out", parts, "--resume", "auto")
    third = [load_file(checkpoint(out, 3) / "ema" / "model.safetensors") for out in (whole, parts)]
    assert all(torch.equal(value, third[1][name]) for name, value in third[0].items())
    assert list((whole / "samples").iterdir())
    assert '"validation"' in (whole / "log.jsonl").read_text()


@pytest.mark.slow
def test_two_processes_train_the_same_and_shards_are_gathered(capsys, file, tmp_path):
    """Only here: FSDP's hooks around blocks that hand on a stream, and `gather` of a generator."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    ok(capsys, "train", file(recipe=", batch_size: 8, micro_batch_size: 4"), "--out", alone)
    shared = file(recipe=", batch_size: 8, micro_batch_size: 4, parallel: fsdp", name="two.yaml")
    command = ["train", str(shared), "--out", str(together), "--device", "cpu"]
    assert [status for _, status in both(partial(run, command), tmp_path)] == [0, 0]
    assert list(losses(together).values()) == pytest.approx(list(losses(alone).values()), rel=1e-4)
    ok(capsys, "gather", checkpoint(together, 4), "--out", tmp_path / "gathered", "--ema")
    gathered = FlowTransformer.from_pretrained(tmp_path / "gathered")
    expected = FlowTransformer.from_pretrained(checkpoint(alone, 4) / "ema")
    assert gathered.config == expected.config
    for name, value in expected.state_dict().items():
        assert torch.allclose(gathered.state_dict()[name], value, atol=1e-5), name


def test_without_labels_and_from_a_checkpoint(capsys, file, tokenizer, tmp_path):
    bare = write_set(tmp_path / "bare", tokenizer, labels=False, flips=False)
    ok(capsys, "train", file("[{steps: 1}]", latents=bare), "--out", tmp_path / "first")
    start = checkpoint(tmp_path / "first", 1)
    assert FlowTransformer.from_pretrained(start).config.classes is None
    ok(
        capsys,
        "train",
        file("[{steps: 1}]", latents=bare, model=f"{{checkpoint: {start}}}"),
        "--out",
        tmp_path / "then",
    )
    wrong = fails(capsys, "train", file("[{steps: 1}]", model=f"{{checkpoint: {start}}}"), "--out", tmp_path / "x")
    assert "has no classes" in wrong
    unlabelled = file("[{steps: 1}]", model=f"{{checkpoint: {start}}}", data="{labels: false}")
    ok(capsys, "train", unlabelled, "--out", tmp_path / "x")


def test_what_cannot_be_is_refused(capsys, file, latents, tokenizer, tmp_path):
    def refused(**own):
        return fails(capsys, "train", file(**own), "--out", tmp_path / "out")

    assert "no such folder of latents: nowhere" in refused(latents="nowhere")
    assert "preset: expected one of S, B, L, XL, got 'H'" in refused(model="{preset: H}")
    assert "expected either preset or checkpoint" in refused(model="{noise_shift: 2}")
    assert "model.config: " in refused(model="{preset: S, config: {size: 3}}")
    assert "config: grid cannot be said here" in refused(model="{preset: S, config: {grid: [2, 2]}}")
    assert "heads: expected a divisor" in refused(model="{preset: S, config: {width: 32, heads: 3}}")
    assert "the generator has 2 classes" in refused(model="{preset: S, config: {classes: 2}}")
    assert "noise_shift: " in refused(model="{preset: S, noise_shift: 0}")
    assert "no.yaml" in fails(capsys, "train", tmp_path / "no.yaml", "--out", tmp_path / "out")
    bare = write_set(tmp_path / "bare", tokenizer, labels=False, flips=False)
    assert "labels: " in refused(latents=bare, data="{labels: true}")
    assert "flip: " in refused(latents=bare, data="{flip: true}")
    assert not (tmp_path / "out").exists()
