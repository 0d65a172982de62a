"""A run's folder, as the command keeps it: whose it is, what goes on in it, what is refused."""

import json
import os
import re
import sys

import pytest

from tests.conftest import smooth_picture
from tests.uniflow.test_cli import contents, fails, files, losses, ok, train_file  # noqa: F401
from tests.uniflow.training.test_lock import another_process
from uniflow.cli import run
from uniflow.training.lock import LOCK


@pytest.fixture
def run_file(train_file):  # noqa: F811
    """Write a configuration of a run that costs little; `stages` and other keys of the recipe may be others."""

    def write(stages="[{steps: 2}]", data=None, tensorboard="false", **recipe):
        recipe = {"batch_size": 2, "log_every": 1, **recipe}
        lines = "".join(f", {key}: {value}" for key, value in recipe.items())
        own = {"recipe": f"{{stages: {stages}{lines}}}", "tensorboard": tensorboard}
        return train_file(**own, **({"data": data} if data else {}))

    return write


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


def test_two_runs_are_not_let_into_one_folder(capsys, run_file, out):
    ok(capsys, "train", run_file())
    before = contents(out)
    with another_process(out) as process:
        for options in ([], ["--force"], ["--resume", "auto"]):
            wrong = fails(capsys, "train", run_file(), *options)
            assert f"{out} is in use by process {process.pid} on " in wrong
        assert contents(out) == {**before, LOCK: contents(out)[LOCK]}
    assert LOCK in files(out)  # it was killed
    rest = out / "checkpoints" / ".step-00000009.0a1b2c3d.tmp"
    rest.mkdir()
    ok(capsys, "train", run_file("[{steps: 3}]"), "--resume", "auto")
    assert list(losses(out)) == [1, 2, 3]
    assert LOCK not in files(out)
    assert not rest.exists()


def test_a_refused_run_leaves_no_folder(capsys, run_file, out, tmp_path):
    assert "no such folder" in fails(capsys, "train", run_file(data="{folder: none}"), "--out", out / "deep")
    assert not out.exists()


def test_a_folder_whose_name_is_no_utf8(capsys, run_file, out, tmp_path):
    odd = tmp_path / os.fsdecode(b"odd\xff")
    wrong = fails(capsys, "train", run_file(tensorboard="true"), "--out", odd)
    assert "TensorBoard writes to folders whose names are UTF-8; or say tensorboard: false" in wrong
    assert not odd.exists()
    ok(capsys, "train", run_file(), "--out", odd)
    assert list(losses(odd)) == [1, 2]


def test_another_run_is_not_gone_on_with_where_there_is_one(capsys, run_file, out, tmp_path):
    ok(capsys, "train", run_file())
    other = tmp_path / "other"
    ok(capsys, "train", run_file("[{steps: 3}]", seed=1), "--out", other)
    precious = [other / "checkpoints" / "model", other / "samples" / "mine.png"]
    for file in precious:  # not of a run
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    before = contents(other)
    start = out / "checkpoints" / "step-00000002"
    on = run_file("[{steps: 3}]")
    wrong = fails(capsys, "train", on, "--out", other, "--resume", start)
    assert f"{other}/checkpoints/step-00000003 is of another run than {start}; --force deletes it" in wrong
    assert contents(other) == before
    ok(capsys, "train", on, "--out", other, "--resume", start, "--force")
    assert list(losses(other)) == [3]
    assert all(file.read_text() == "x" for file in precious)


def test_a_finished_run_is_extended(capsys, run_file, out):
    ok(capsys, "train", run_file(keep=9))
    assert run(["train", str(run_file(keep=9)), "--resume", "auto"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("nothing was left to train at step 2")
    assert said.err == ""  # no bar of what does not begin
    longer = run_file("[{steps: 3}, {steps: 1}]", keep=9)
    printed = ok(capsys, "train", longer, "--resume", "auto")
    assert "trained at step 4" in printed
    assert list(losses(out)) == [1, 2, 3, 4]
    before = contents(out)
    wrong = fails(capsys, "train", run_file(keep=9), "--resume", "auto")
    assert "step-00000004 cannot go on with another recipe.stages.0.steps (2, was 3): that stage is over" in wrong
    wrong = fails(capsys, "train", run_file("[{steps: 3}]"), "--resume", "auto")
    assert "cannot go on with another recipe.stages.1 (none, was {" in wrong
    assert contents(out) == before


def test_what_changed_is_said(capsys, run_file, out):
    ok(capsys, "train", run_file())
    config = run_file("[{steps: 3}]", batch_size=4)
    config.write_text(config.read_text().replace("model:", "objective: {flow_weight: 2.0}\nmodel:"))
    assert run(["train", str(config), "--resume", "auto"]) == 0
    said = f"uniflow: goes on from {out}/checkpoints/step-00000002 with another "
    said += "recipe.stages.0.steps (3, was 2), recipe.batch_size (4, was 2), objective.flow_weight (2.0, was 1.0)\n"
    assert said in capsys.readouterr().err
    progress = json.loads((out / "checkpoints" / "step-00000003" / "progress.json").read_text())
    assert progress["samples"] == 2 + 2 + 4


def test_a_run_stays_in_the_precision_that_it_has(capsys, run_file, out):
    ok(capsys, "train", run_file(precision="bfloat16"))
    assert run(["train", str(run_file("[{steps: 3}]")), "--resume", "auto"]) == 0  # which says nothing of precision
    assert "with another recipe.stages.0.steps (3, was 2)\n" in capsys.readouterr().err
    settings = [json.loads(path.read_text()) for path in sorted(out.glob("checkpoints/step-*/run.json"))]
    assert [its["recipe"]["precision"] for its in settings] == ["bfloat16", "bfloat16"]


def test_skipped_pictures_are_said(capfd, run_file, out, tmp_path):
    folder = tmp_path / "some"
    folder.mkdir()
    for number in range(3):
        smooth_picture((20, 20), number).save(folder / f"{number}.png")
    for number in range(25):
        (folder / os.fsdecode(b"\x1b[31m%d\xff.png" % number)).write_text("x")
    config = run_file("[{steps: 20}]", data=f"{{folder: {folder}}}", tensorboard="true")
    status = run(["train", str(config)])
    printed = capfd.readouterr()
    assert status == 0, printed.err
    said = re.findall(r"^uniflow: skips (.*) \(step \d+\), which cannot be read$", printed.err, re.MULTILINE)
    assert len(said) == len(set(said)) == 21
    assert re.fullmatch(r".*/some/\\x1b\[31m\d+\\udcff.png", said[0])
    assert said[-1] == "more pictures; the log names them"
    skipped = json.loads((out / "checkpoints" / "step-00000020" / "progress.json").read_text())["skipped"]
    assert f", {skipped} unreadable pictures skipped; checkpoint in" in printed.out
    assert "\x1b[31m" not in printed.out + printed.err


WANDB = '''
"""Stands for the package: writes what it is told to a file."""
import json, os
from pathlib import Path

class Error(Exception):
    pass

class Settings(dict):
    pass

class Image:
    def __init__(self, pixels):
        self.shape = list(pixels.shape)

class Run:
    def __init__(self, id):
        self.id = id
    def write(self, **values):
        with open(os.environ["WANDB_SAID"], "a") as file:
            file.write(json.dumps({"id": self.id, **values}, default=lambda value: value.shape) + "\\n")
    def define_metric(self, name, step_metric):
        self.write(defined=[name, step_metric])
    def log(self, values):
        self.write(logged=values)
    def finish(self):
        self.write(finished=True)

def init(project, name, dir, id, resume, config, settings):
    if project == "refused":
        raise Error("No API key configured")
    run = Run(id)
    run.write(begun=[project, name, str(dir), resume, config["recipe"]["batch_size"]])
    return run
'''


def test_weights_and_biases(capsys, train_file, out, tmp_path, monkeypatch):  # noqa: F811
    recipe = "{{stages: [{{steps: {}}}], batch_size: 2, log_every: 1, validate_every: 2}}"
    config = train_file(recipe=recipe.format(2), wandb="mine")
    assert "needs wandb: pip install 'uniflow-kernels[wandb]'" in fails(capsys, "train", config)
    assert "wandb: expected the name of a project" in fails(capsys, "train", train_file(wandb="' '"))
    assert not out.exists()

    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("WANDB_SAID", str(tmp_path / "said"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    ok(capsys, "train", train_file(recipe=recipe.format(2), wandb="mine"))
    ok(capsys, "train", train_file(recipe=recipe.format(3), wandb="mine"), "--resume", "auto")
    said = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert len({line["id"] for line in said}) == 1  # it goes on with the same run there
    assert [line["begun"] for line in said if "begun" in line] == [["mine", "run", str(out), "allow", 2]] * 2
    logged = [line["logged"] for line in said if "logged" in line]
    assert {line["step"]: line["train/loss"] for line in logged if "train/loss" in line} == losses(out)
    (scores,) = [line for line in logged if "validation/psnr" in line]
    assert scores["step"] == 2
    assert scores["validation/samples"][-1] == 3  # [H, W, 3]
    assert [line for line in said if "finished" in line or "defined" in line] == [
        {"id": said[0]["id"], **line} for line in ({"defined": ["*", "step"]}, {"finished": True}) * 2
    ]
    ok(capsys, "train", train_file(recipe=recipe.format(2), wandb="mine"), "--force")
    assert json.loads((tmp_path / "said").read_text().splitlines()[-1])["id"] != said[0]["id"]
    refused = fails(capsys, "train", train_file(recipe=recipe.format(2), wandb="refused"), "--force")
    assert refused == "uniflow: wandb: No API key configured"


def test_a_loss_of_zero_has_no_sign(capsys, train_file, out):  # noqa: F811
    """One just below zero, as rounding makes it, is shown as zero."""
    recipe = "{stages: [{steps: 1}], log_every: 1}"
    config = train_file(recipe=recipe, objective="{flow_weight: -1.0e-9, distill_weight: 0}")
    assert run(["train", str(config)]) == 0
    printed = capsys.readouterr()
    assert -1e-7 < losses(out)[1] < 0
    assert ", last loss 0.0000;" in printed.out
    assert "loss 0.000 " in printed.err
