"""`uniflow generate`: the same pictures by any number of processes, stopped anywhere; sheets; what is refused."""

import json
import os
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import randomize
from tests.uniflow.generation.conftest import tiny
from tests.uniflow.test_cli import contents, fails, files, ok
from tests.uniflow.training.two import both
from uniflow import UniFlow
from uniflow.cli import generate, run
from uniflow.generation import draw_latents, picture_seeds
from uniflow.latents import fingerprint, meaning
from uniflow.normalization import to_uint8
from uniflow_kernels.solvers import Plan


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny(names=["ant", "bee", "cat"], tokenizer=meaning(tokenizer), fingerprint=fingerprint(tokenizer))


@pytest.fixture(scope="module")
def options(model, tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator")
    model.save_pretrained(folder)
    return ["--checkpoint", folder, "--tokenizer", tokenizer_folder, "--steps", 2, "--batch-size", 3, "--cfg", 1.5]


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_a_folder_has_what_the_model_draws(capsys, options, model, tokenizer, tmp_path):
    said = ok(capsys, "generate", *options, "--count", 7, "--out", tmp_path / "a", "--seed", 5, "--decoder-steps", 3)
    assert said == f"7 pictures in {tmp_path / 'a'}\n"
    assert files(tmp_path / "a") == [*(f"{number:06}.png" for number in range(7)), "generation.json"]
    seeds, of_decoder = picture_seeds(5, range(7))
    latents = draw_latents(model, seeds, torch.arange(7) % 3, Plan(2, cfg=1.5))
    expected = to_uint8(tokenizer.decode(latents, steps=3, seed=of_decoder)).permute(0, 2, 3, 1).numpy()
    for number in range(7):
        found = pixels(tmp_path / "a" / f"{number:06}.png")
        assert np.abs(found.astype(int) - expected[number]).max() <= 1  # in other batches sums are rounded otherwise
    assert len({found.tobytes() for found in expected}) == 7


def test_by_two_processes_killed_in_between_it_is_the_same(capsys, options, tmp_path, monkeypatch):
    ok(capsys, "generate", *options, "--count", 8, "--out", tmp_path / "alone")
    expected = contents(tmp_path / "alone")
    out = tmp_path / "two"
    command = list(map(str, ["generate", *options, "--count", 8, "--out", out, "--device", "cpu", "--workers", 1]))

    def until(number):
        """Draw in this process, which ends without a word before the picture of that number is there."""
        save = generate.save_picture

        def killed(picture, path):
            if path.name == f"{number:06}.png":
                path.with_name(f".{path.stem}.1-00000000.tmp.png").write_bytes(b"half")
                os._exit(9)
            save(picture, path)

        monkeypatch.setattr(generate, "save_picture", killed)
        return run(command)

    assert 9 in [status for _, status in both(partial(until, 4), tmp_path)]
    assert 0 < len(list(out.glob("0*.png"))) < 8
    assert [status for _, status in both(partial(run, command), tmp_path)] == [0, 0]
    assert contents(out) == expected
    assert files(out) == files(tmp_path / "alone")
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    (out / "000004.png").unlink()
    assert "8 pictures in" in ok(capsys, "generate", *options, "--count", 8, "--out", out)
    assert contents(out) == expected
    again = {path for path, was in before.items() if path.stat().st_mtime_ns != was}
    assert again == {out / "000004.png"}
    ok(capsys, "generate", *options, "--count", 9, "--out", out)  # more of the same
    assert {**expected, "000008.png": contents(out)["000008.png"]} == contents(out)


def test_a_sheet_has_the_folders_pictures(capsys, options, tmp_path):
    ok(capsys, "generate", *options, "--count", 12, "--out", tmp_path / "all", "--classes", "cat, 0")
    said = ok(capsys, "generate", *options, "--count", 6, "--out", tmp_path / "deep" / "x.png", "--classes", "2,ant")
    assert said.startswith("12 pictures of 2 rows written to")
    sheet = pixels(tmp_path / "deep" / "x.png").reshape(2, 8, 6, 8, 3)
    for number in range(12):
        tile = sheet[number % 2, :, number // 2]
        assert np.abs(tile.astype(int) - pixels(tmp_path / "all" / f"{number:06}.png")).max() <= 1
    assert "exists; --force" in fails(capsys, "generate", *options, "--out", tmp_path / "deep" / "x.png")


def test_another_job_is_refused_by_what_differs(capsys, options, tmp_path):
    out = tmp_path / "out"
    ok(capsys, "generate", *options, "--count", 2, "--out", out)
    there = contents(out)

    def refused(*others):
        wrong = fails(capsys, "generate", *options, "--count", 2, "--out", out, *others)
        assert contents(out) == there
        return wrong

    assert "another steps; --force deletes them" in refused("--steps", 3)
    assert "another classes, seed" in refused("--classes", "bee", "--seed", 1)
    assert "another cfg_interval" in refused("--cfg-interval", 0.1, 5)
    assert "another dtype" in refused("--dtype", "bfloat16")
    assert "holds 1 pictures beside the first 1" in refused("--count", 1)
    (out / "generation.json").unlink()
    there = contents(out)
    assert "exists, but no generation.json" in refused()
    ok(capsys, "generate", *options, "--count", 1, "--out", out, "--force")
    assert files(out) == ["000000.png", "generation.json"]
    assert json.loads((out / "generation.json").read_text())["steps"] == 2


def test_what_cannot_be_is_refused_before_anything_is_written(capsys, options, tokenizer, tmp_path):
    def refused(*others):
        wrong = fails(capsys, "generate", *options, "--out", tmp_path / "out", *others)
        assert not (tmp_path / "out").exists()
        return wrong

    assert "--classes: expected numbers from 0 to 2 or a name, got 'dog'" in refused("--classes", "cat,dog")
    assert "schedule: expected 'linear'" in refused("--schedule", "quadratic")
    assert "solver: expected one of" in refused("--solver", "rk4")
    assert "--temperature: expected a finite number" in refused("--temperature", "inf")
    other = randomize(UniFlow(tokenizer.config), seed=1)
    other.save_pretrained(tmp_path / "other")
    wrong = refused("--tokenizer", tmp_path / "other")
    assert "the generator is of the latents of another tokenizer: one of the same shape with other weights" in wrong
    assert "expected a JSON object with model_type 'uniflow_generator'" in refused("--checkpoint", tmp_path / "other")
    tiny(classes=None).save_pretrained(tmp_path / "bare")
    bare = ("--checkpoint", tmp_path / "bare")
    assert "--cfg: expected 1, as the generator has no classes" in refused(*bare)
    assert "--classes: the generator has none" in refused(*bare, "--cfg", 1, "--classes", 1)
    assert "or a folder, got" in fails(capsys, "generate", *options, "--out", tmp_path / "x.jpg")
    ok(capsys, "generate", *options, *bare, "--cfg", 1, "--count", 2, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation.json").read_text())["classes"] is None
