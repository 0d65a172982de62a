import json
import random
import shutil

import numpy as np
import pytest
import torch

from tests.uniflow.training.conftest import Heard, small_objective
from uniflow import CheckpointError, UniFlow, UniFlowConfig, UniFlowObjective
from uniflow.training import Stage
from uniflow.training.checkpoints import check, newest_first, newest_whole, random_states, set_random_states
from uniflow.training.logs import JsonLines

STAGES = (Stage(3, train="decoder", warmup_steps=2), Stage(4, encoder_learning_rate=1e-4, warmup_steps=2))


def names(folder):
    return [path.name for path in newest_first(folder / "checkpoints")]


@pytest.mark.parametrize("options", [{}, {"workers": 2, "micro_batch_size": 2, "precision": "bfloat16"}])
def test_a_resumed_run_is_the_one_that_never_stopped(make, tmp_path, options):
    options = {"ema_decay": 0.9, **options}
    whole = make(*STAGES, out=tmp_path, save_every=1, keep=9, **options)
    losses = whole.run()
    assert len(losses) == 7
    for step in (1, 3, 5):  # in the first stage, between the two, in the second
        again = make(*STAGES, objective=small_objective(seed=5), **options)
        # its teacher is that of the configuration, its student that of the checkpoint
        again.objective.teacher = whole.objective.teacher
        again.resume(tmp_path / "checkpoints" / f"step-{step:08}")
        assert again.run() == losses[step:]
        for name, parameter in whole.student.named_parameters():
            assert torch.equal(parameter, again.student.get_parameter(name))
            assert torch.equal(whole.average.values[name], again.average.values[name])
        assert again.progress.samples == whole.progress.samples == 28


def test_the_files_of_a_checkpoint(make, tmp_path):
    trainer = make(*STAGES, out=tmp_path, ema_decay=0.9, save_every=5)
    trainer.run()
    assert names(tmp_path) == ["step-00000007", "step-00000005"]
    folder = tmp_path / "checkpoints" / "step-00000007"
    model, average = UniFlow.from_pretrained(folder), UniFlow.from_pretrained(folder / "ema")
    for name, parameter in trainer.student.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
        assert torch.equal(trainer.average.values[name], average.get_parameter(name))
    progress = json.loads((folder / "progress.json").read_text())
    assert (progress["step"], progress["samples"], progress["stage"]) == (7, 28, 2)
    check(folder)


def test_old_checkpoints_go_by_count_and_rests_of_killed_runs_too(make, tmp_path):
    rest = tmp_path / "checkpoints" / ".step-00000002.tmp"
    rest.mkdir(parents=True)
    (rest / "model.safetensors").write_text("half")
    make(steps=6, out=tmp_path, save_every=1, keep=2).run()
    assert names(tmp_path) == ["step-00000006", "step-00000005"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_finished_run_has_nothing_left_to_do(make, tmp_path):
    make(steps=2, out=tmp_path).run()
    again = make(steps=2, out=tmp_path)
    again.resume(tmp_path / "checkpoints" / "step-00000002")
    assert again.finished
    assert again.run() == []


def test_the_recipe_of_a_resumed_run_is_its_own(make, tmp_path):
    make(steps=2, out=tmp_path).run()
    heard = Heard()
    again = make(Stage(2), Stage(4, learning_rate=7e-4, warmup_steps=0), logs=[heard], weight_decay=0.3)
    (tmp_path / "checkpoints/step-00000002/progress.json").write_text(json.dumps({"step": 2, "stage": 1}))
    again.resume(tmp_path / "checkpoints" / "step-00000002")
    again.run()
    assert {group["weight_decay"] for group in again.optimizer.param_groups} == {0.3, 0.0}
    assert heard.reports[0].learning_rate == pytest.approx(7e-4 * 0.5 * (1 + np.cos(np.pi / 4)))


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(make, tmp_path, damage):
    make(steps=2, out=tmp_path, save_every=1).run()
    folder = tmp_path / "checkpoints" / "step-00000002"
    assert newest_whole(tmp_path / "checkpoints") == (folder, [])
    file = folder / ("manifest.json" if damage == "no manifest" else "optimizer.pt")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data[:-10] if damage == "truncated" else data)
    if damage in ("missing", "no manifest"):
        file.unlink()
    whole, wrong = newest_whole(tmp_path / "checkpoints")
    assert whole == tmp_path / "checkpoints" / "step-00000001"
    assert len(wrong) == 1
    assert "step-00000002" in wrong[0]
    assert file.name in wrong[0]


def test_a_write_that_fails_leaves_the_checkpoints_as_they_were(make, tmp_path, monkeypatch):
    from uniflow.training import state

    trainer = make(steps=3, out=tmp_path, save_every=1)
    write = state.write_tensors

    def fail(path, values):
        if trainer.progress.step == 3:
            raise OSError("the disk is full")
        write(path, values)

    monkeypatch.setattr(state, "write_tensors", fail)
    with pytest.raises(OSError, match="the disk is full"):
        trainer.run()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    assert newest_whole(tmp_path / "checkpoints")[1] == []


def test_a_checkpoint_of_another_model_is_refused(make, tmp_path):
    make(steps=1, out=tmp_path).run()
    other = UniFlowObjective(UniFlow(UniFlowConfig.preset("tiny", image_size=16)), distill_weight=0.0)
    with pytest.raises(CheckpointError, match="step-00000001 does not hold this model"):
        make(steps=1, objective=other).resume(tmp_path / "checkpoints" / "step-00000001")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is no checkpoint of a training run"):
        make(steps=1).resume(tmp_path / "empty")
    (tmp_path / "checkpoints" / "step-00000001" / "shards").mkdir()
    with pytest.raises(CheckpointError, match="written with parallel: fsdp"):
        make(steps=1).resume(tmp_path / "checkpoints" / "step-00000001")


def test_random_states_go_on_as_they_were():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    draw()
    states = random_states()
    drawn = draw()
    assert draw() != drawn
    set_random_states(states)
    assert draw() == drawn


def test_the_log_of_a_resumed_run_has_every_step_once(make, tmp_path):
    out, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    out.mkdir()
    make(steps=5, out=out, save_every=3, logs=[JsonLines(log, 0)]).run()
    complete = log.read_text()
    assert [json.loads(line)["step"] for line in complete.splitlines()] == [1, 2, 3, 4, 5]
    log.write_text(complete[:-30])  # killed while it wrote
    shutil.rmtree(out / "checkpoints" / "step-00000005")
    again = make(steps=5, out=out, logs=[JsonLines(log, 3)])
    again.resume(out / "checkpoints" / "step-00000003")
    again.run()
    for old, new in zip(complete.splitlines(), log.read_text().splitlines(), strict=True):
        assert json.loads(old)["loss"] == json.loads(new)["loss"]
