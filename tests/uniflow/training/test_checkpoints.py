import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.uniflow.training.conftest import Heard, make_trainer, small_objective
from uniflow import CheckpointError, UniFlow, UniFlowConfig, UniFlowObjective
from uniflow.training import Recipe, Stage
from uniflow.training.changes import differences, place_in, settings_of
from uniflow.training.checkpoints import (
    check,
    newest_first,
    newest_whole,
    random_states,
    replacing_folder,
    rests,
    set_random_states,
)
from uniflow.training.logs import JsonLines
from uniflow.training.processes import Processes
from uniflow.training.state import Progress

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


def test_a_run_in_float32_goes_on_in_it_where_a_new_one_would_not(make, tmp_path, monkeypatch):
    """As on CUDA, where a recipe that leaves precision and compilation open means bfloat16 and compiled layers."""
    stages = Stage(4, warmup_steps=0)
    make(stages, out=tmp_path, save_every=2, precision="float32", compile=False).run()
    whole = make(stages, precision="float32").run()
    on = Recipe.on
    monkeypatch.setattr(Recipe, "on", lambda recipe, _, before=None: on(recipe, "cuda", before))
    trainer = make(stages, out=tmp_path)
    assert trainer.recipe.precision == "bfloat16"
    assert trainer.resume(tmp_path / "checkpoints" / "step-00000002") == "recipe.save_every (1000, was 2)"
    assert trainer.run() == whole[2:]
    settings = json.loads((tmp_path / "checkpoints" / "step-00000004" / "run.json").read_text())
    assert (settings["recipe"]["precision"], settings["recipe"]["compile"]) == ("float32", False)


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


def test_old_checkpoints_go_by_count_of_steps(make, tmp_path):
    other = tmp_path / "checkpoints" / "step-by-step"  # not one of ours
    other.mkdir(parents=True)
    trainer = make(steps=3, out=tmp_path, save_every=1, keep=2)
    trainer.progress.step = 99_999_998
    trainer.run()
    assert names(tmp_path) == ["step-100000001", "step-100000000"]
    assert other.exists()


def test_each_write_has_a_name_of_its_own_until_it_is_whole(tmp_path):
    with (
        replacing_folder(tmp_path / "step-00000001", Processes()) as one,
        replacing_folder(tmp_path / "step-00000001", Processes()) as other,
    ):
        assert one != other
        (one / "file").write_text("one")
        (other / "file").write_text("other")
        assert set(rests(tmp_path)) == {one, other}
    assert (tmp_path / "step-00000001" / "file").read_text() == "one"  # written last
    check(tmp_path / "step-00000001")
    assert rests(tmp_path) == []


def test_a_finished_run_has_nothing_left_to_do(make, tmp_path):
    make(steps=2, out=tmp_path).run()
    again = make(steps=2, out=tmp_path)
    again.resume(tmp_path / "checkpoints" / "step-00000002")
    assert again.finished
    assert again.run() == []


# going on with another recipe


def test_a_finished_run_goes_on_with_a_larger_budget(make, tmp_path):
    make(Stage(4, warmup_steps=2), out=tmp_path, ema_decay=0.9).run()
    heard = Heard()
    recipe = {"ema_decay": 0.9, "weight_decay": 0.3, "logs": [heard]}
    again = make(Stage(6, learning_rate=7e-4, warmup_steps=0), **recipe)
    changed = again.resume(tmp_path / "checkpoints" / "step-00000004")
    assert changed == (
        "recipe.stages.0.steps (6, was 4), recipe.stages.0.learning_rate (0.0007, was 0.001), "
        "recipe.stages.0.warmup_steps (0, was 2), recipe.weight_decay (0.3, was 0.01)"
    )
    assert len(again.run()) == 2
    # in its own place of the new schedule, with the moments that it had
    rates = [7e-4 * 0.5 * (1 + np.cos(np.pi * step / 6)) for step in (5, 6)]
    assert [report.learning_rate for report in heard.reports] == pytest.approx(rates)
    assert {group["weight_decay"] for group in again.optimizer.param_groups} == {0.3, 0.0}
    assert {state["step"].item() for state in again.optimizer.state.values()} == {6}
    assert (again.progress.step, again.progress.samples, again.progress.stage) == (6, 24, 1)


def test_a_finished_run_goes_on_with_another_stage_as_if_it_had_always_had_it(make, tmp_path):
    make(STAGES[0], out=tmp_path).run()
    again = make(*STAGES)
    again.resume(tmp_path / "checkpoints" / "step-00000003")
    assert again.run() == make(*STAGES).run()[3:]


@pytest.mark.parametrize(
    ("was", "now", "place", "begun"),
    [
        ((1, 2), (Stage(5), Stage(9)), (1, 2), True),
        ((1, 2), (Stage(5), Stage(7), Stage(3)), (1, 2), True),
        ((1, 2), (Stage(5), Stage(2), Stage(3)), (2, 0), False),  # it has made what it has now
        ((1, 2), (Stage(5), Stage(2)), (2, 2), True),
        ((1, 2), (Stage(5), Stage(7, seconds=31.0)), (1, 2), True),
        ((1, 0), (Stage(5), Stage(9, "decoder")), (1, 0), False),  # not begun, it can be any
        ((1, 0), (Stage(5),), (1, 0), False),
        ((2, 7), (Stage(5), Stage(7)), (2, 7), True),
        ((2, 7), (Stage(5), Stage(8)), (1, 7), True),
        ((2, 7), (Stage(5), Stage(7), Stage(3)), (2, 0), False),
        ((1, 2), (Stage(6), Stage(7)), r"stages.0.steps \(6, was 5\): that stage is over", None),
        ((1, 0), (Stage(6), Stage(7)), r"stages.0.steps \(6, was 5\): that stage is over", None),
        ((2, 7), (Stage(5, learning_rate=1.0), Stage(8)), "stages.0.learning_rate .* that stage is over", None),
        ((1, 2), (Stage(5), Stage(7, "decoder")), "stages.1.train .'decoder', was 'all'.: that stage has begun", None),
        ((1, 2), (Stage(5),), r"stages.1 \(none, was .*: that stage has begun", None),
        ((2, 7), (Stage(5),), r"stages.1 \(none, was .*: that stage has begun", None),
        ((1, 2), (Stage(5), Stage(1)), r"stages.1.steps \(1, was 7\): that stage has made 2 steps", None),
        (
            (1, 2),
            (Stage(5), Stage(7, seconds=29)),
            r"stages.1.seconds \(29, was none\): that stage has taken 30 s",
            None,
        ),
    ],
)
def test_where_a_changed_recipe_goes_on(was, now, place, begun):
    stage, step = was
    progress = Progress(step=20, stage=stage, stage_step=step, stage_seconds=30.0 if step else 0.0)
    recipe = Recipe(now)
    differing = differences(settings_of(Recipe((Stage(5), Stage(7))), {}), settings_of(recipe, {}))
    if begun is None:
        with pytest.raises(CheckpointError, match=f"x cannot go on with another recipe.{place}"):
            place_in(recipe, differing, progress, 2, Path("x"))
    else:
        found, with_optimizer = place_in(recipe, differing, progress, 2, Path("x"))
        assert (found.stage, found.stage_step, with_optimizer) == (*place, begun)
        assert found.stage_seconds == (30.0 if found.stage_step else 0.0)


def test_a_stage_that_ended_by_the_clock_goes_on_with_more_time(make, tmp_path):
    make(Stage(10**6, seconds=0.01), out=tmp_path).run()
    (checkpoint,) = newest_first(tmp_path / "checkpoints")
    for seconds, finished in ((0.01, True), (600, False)):
        again = make(Stage(10**6, seconds=seconds))
        again.resume(checkpoint)
        assert again.finished == finished
    assert 0.01 <= again.progress.stage_seconds < 60


def test_averages_that_were_not_kept_cannot_go_on(make, tmp_path):
    make(steps=1, out=tmp_path).run()
    with pytest.raises(CheckpointError, match=r"another recipe.ema_decay \(0.9, was none\): it has no moving average"):
        make(steps=2, ema_decay=0.9).resume(tmp_path / "checkpoints" / "step-00000001")


def test_what_else_the_run_is_made_with_is_compared(make, tmp_path):
    make(steps=1, out=tmp_path, settings={"data": {"folder": Path("here"), "flip": True}}).run()
    again = make(steps=1, settings={"data": {"folder": Path("there")}})
    changed = again.resume(tmp_path / "checkpoints" / "step-00000001")
    assert changed == "data.folder ('there', was 'here'), data.flip (none, was True)"


# damage


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


class Command:
    def __reduce__(self):
        return os.system, ("touch executed",)


def saved(change):
    def forge(path):
        values = torch.load(path, weights_only=True)
        torch.save(change(values) or values, path)

    return forge


def of_optimizer(moment, value):
    def change(values):
        values["state"]["chal_proj.c_fc.bias"][moment] = value

    return saved(change)


def progress(**changes):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def text(content):
    return lambda path: path.write_text(content)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The last checkpoint of a run."""
    folder = tmp_path_factory.mktemp("whole")
    make_trainer(steps=2, out=folder, ema_decay=0.9).run()
    return folder / "checkpoints" / "step-00000002"


@pytest.mark.parametrize(
    ("file", "forge", "message"),
    [
        ("progress.json", progress(step="2"), r"progress.json: step: expected a number from 0, got '2'"),
        ("progress.json", progress(stage=None), "stage: expected a number from 0, got None"),
        ("progress.json", progress(samples=-4), "samples: expected a number from 0, got -4"),
        ("progress.json", progress(stage_step=True), "stage_step: expected a number from 0, got True"),
        ("progress.json", progress(skipped=2**63), "skipped: expected a number from 0, got 9223372036854775808"),
        ("progress.json", progress(stage_seconds=1e300), "stage_seconds: expected a number from 0, got 1e"),
        ("progress.json", progress(stage_seconds=float("nan")), "expected finite numbers, got nan"),
        ("progress.json", progress(stage=2), r"run.json: recipe.stages: expected at least 2, got \[{"),
        ("progress.json", text("[]"), "progress.json .*expected a JSON object"),
        ("progress.json", text("[" * 10**5), "progress.json: lists and mappings are nested"),
        ("progress.json", pipe, "no file progress.json"),
        ("run.json", text('{"recipe": {"stages": null}}'), "run.json: recipe.stages: expected at least 1, got None"),
        ("run.json", text('{"recipe": null}'), "run.json: recipe.stages: expected at least 1, got None"),
        ("optimizer.pt", saved(lambda _: Command()), r"optimizer.pt .* more than tensors: it asks for \w+\.system,"),
        ("optimizer.pt", saved(lambda _: [1]), "optimizer.pt: expected a dictionary, got a list"),
        ("optimizer.pt", saved(lambda _: {"state": [1]}), r"another optimizer's state: expected [a-z].*\.step \[\]"),
        ("optimizer.pt", of_optimizer("exp_avg", torch.zeros(3)), r"expected chal_proj.c_fc.bias.exp_avg \[48\]"),
        ("optimizer.pt", of_optimizer("exp_avg", None), r"expected chal_proj.c_fc.bias.exp_avg \[48\]"),
        ("optimizer.pt", of_optimizer("exp_avg", torch.zeros(48).to_sparse()), r"expected chal_proj.c_fc.bias.exp_avg"),
        ("optimizer.pt", of_optimizer("step", torch.tensor(1)), r"expected chal_proj.c_fc.bias.step \[\]"),
        ("optimizer.pt", of_optimizer("more", torch.zeros(1)), "expected no chal_proj.c_fc.bias.more"),
        ("optimizer.pt", text("x"), "optimizer.pt is damaged"),
        ("optimizer.pt", pipe, "no file optimizer.pt"),
        ("random-0.pt", saved(lambda _: {"python": 1}), "random-0.pt holds no states of random generators"),
        ("random-0.pt", saved(lambda values: {**values, "torch": torch.zeros(3)}), "random-0.pt holds no states"),
        ("ema/model.safetensors", lambda path: save_file({}, path), "ema does not hold the averages of this model"),
        ("config.json", text("[]"), "config.json .*expected a JSON object"),
        ("config.json", pipe, "no file config.json"),
    ],
)
def test_what_is_forged_is_refused_with_its_name(tmp_path, monkeypatch, whole, file, forge, message):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(whole, tmp_path / "copy")
    forge(folder / file)
    with pytest.raises(CheckpointError, match=message) as caught:
        make_trainer(steps=3, ema_decay=0.9).resume(folder)
    assert len(str(caught.value)) < 600
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("forge", [text("[]"), text('{"config.json": 1}'), text('{"../x": "y"}'), pipe])
def test_a_forged_manifest(tmp_path, whole, forge):
    folder = shutil.copytree(whole, tmp_path / "copy")
    forge(folder / "manifest.json")
    with pytest.raises(CheckpointError, match=r"manifest.json|config.json is not as it was written|x is missing"):
        check(folder)


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
