import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from uniflow.cli.runs import costs_of
from uniflow.cli.train import _check_memory, _objective
from uniflow.training import Recipe, Stage
from uniflow.training import recipe as module
from uniflow.training.processes import Processes
from uniflow.training.recipe import Run, read_run

RUN = """
model: {preset: tiny, config: {image_size: 16}}
data: {folder: pictures}
recipe:
  stages: [{steps: 5, learning_rate: 1e-3, train: decoder}, {steps: 7}]
  ema_decay: 0.99
"""


def test_a_file_becomes_a_run(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    run = read_run(tmp_path / "run.yaml", Run)
    assert run.recipe == Recipe((Stage(5, "decoder", learning_rate=1e-3), Stage(7)), ema_decay=0.99)
    assert run.model.config == {"image_size": 16}
    assert str(run.data.folder) == "pictures"
    assert run.objective.distill_weight is None


def test_the_example_shows_every_key_and_its_default():
    path = Path(__file__).parents[3] / "examples" / "train.yaml"
    run = read_run(path, Run)
    text = path.read_text()
    for part in (run, run.model, run.objective, run.data, run.recipe, run.recipe.stages[1]):
        for key in fields(part):
            (line,) = [line for line in text.splitlines() if re.match(rf"[\s#-]*{key.name}:", line)][-1:]
            if re.search(r"# default(;|$)", line):
                assert getattr(part, key.name) == key.default, line


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ema_decay: 0.99", "ema_decey: 0.99", "recipe.ema_decey: Unexpected keyword argument"),
        ("steps: 7", "steps: many", "recipe.stages.1.steps: Input should be a valid integer.* got 'many'"),
        (
            "steps: 7",
            "steps: 7, final_learning_rate: 1",
            "final_learning_rate: expected at most the learning_rate",
        ),
        ("steps: 7", "steps: 0", "recipe.stages.1: steps: expected at least 1, got 0"),
        ("train: decoder", "train: head", "recipe.stages.0.train: Input should be 'all' or 'decoder', got 'head'"),
        ("ema_decay: 0.99", "ema_decay: 2", "recipe: ema_decay: expected a number between 0 and 1, got 2"),
        ("{folder: pictures}", "{}", "data: expected either folder or shards"),
        ("preset: tiny, ", "", "model: expected one of preset, checkpoint and encoder"),
        ("preset: tiny,", "checkpoint: x,", "model: config: changes a preset"),
        (RUN, "model: {preset: tiny}", "recipe: Field required"),
        (RUN, "- a list", "Input should be"),
        (RUN, "a: [", "run.yaml is no YAML"),
        (RUN, "", "Input should be"),
        (RUN, "recipe:\nmodel:\ndata:\n", "recipe: Input should be"),
        (RUN, "recipe: " + "[" * 9999, "nested more than 64 deep"),
        (RUN, "recipe: {batch_size: .inf}", "expected finite numbers, got inf"),
        (RUN, "recipe: {stages: [{steps: [&a [x, x], [[*a, *a]]]}]}", r"got .*\[\.\.\.\]"),
    ],
)
def test_errors_name_the_key(tmp_path, old, new, message):
    assert old in RUN
    (tmp_path / "run.yaml").write_text(RUN.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "run.yaml", Run)


@pytest.mark.parametrize(
    "options",
    [
        {"stages": ()},
        {"batch_size": 0},
        {"precision": "float16"},
        {"parallel": "tp"},
        {"compile": "whole"},
        {"max_gradient_norm": 0},
        {"max_gradient_norm": float("inf")},
        {"weight_decay": float("inf")},
        {"betas": (0.9, 1.0)},
        {"seed": 2**64},
        {"workers": 10**6},
        {"micro_batch_size": 2**40},
        {"keep": 0},
        {"teacher_precision": "fp4"},
    ],
)
def test_recipes_are_checked_without_a_file_too(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Recipe(**{"stages": (Stage(1),), **options})


def test_micro_batches_of_the_processes():
    recipe = Recipe((Stage(1),), batch_size=12, micro_batch_size=3)
    assert recipe.micro_batches(1) == (4, 3)
    assert recipe.micro_batches(2) == (2, 3)
    assert Recipe((Stage(1),), batch_size=12).micro_batches(3) == (1, 4)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of the 5 processes, got 12"):
        recipe.micro_batches(5)
    with pytest.raises(ValueError, match="micro_batch_size: expected a divisor"):
        recipe.micro_batches(3 * 2)


def test_what_auto_stands_for(monkeypatch):
    def chosen(recipe, device, before=None):
        made = recipe.on(device, before)
        return made.precision, made.compile

    left_open = Recipe((Stage(1),))
    assert (left_open.precision, left_open.compile) == ("auto", "auto")
    monkeypatch.setattr(module, "why_not_launched", lambda: None)
    assert chosen(left_open, "cpu") == ("float32", False)
    assert chosen(left_open, "cuda") == ("bfloat16", True)
    # a run goes on as it was
    assert chosen(left_open, "cuda", {"precision": "float32", "compile": False, "seed": 3}) == ("float32", False)
    assert chosen(left_open, "cpu", {"precision": "bfloat16", "compile": True}) == ("bfloat16", True)
    assert left_open.on("cuda", {"seed": 3}).seed == 0
    said = Recipe((Stage(1),), precision="float32", compile=False)
    assert said.on("cuda", {"precision": "bfloat16", "compile": True}) == said
    monkeypatch.setattr(module, "why_not_launched", lambda: "Triton is not installed")
    assert chosen(left_open, "cuda") == ("bfloat16", False)


def test_what_a_gpu_would_gain_is_said(monkeypatch):
    slow = Recipe((Stage(1),), precision="float32", compile=False)
    assert [part.split(" (")[0] for part in costs_of(slow).split(", ")] == [
        "precision: bfloat16",
        "compile: true",
        "workers: 4 or more",
    ]
    monkeypatch.setattr(module, "why_not_launched", lambda: None)
    assert costs_of(Recipe((Stage(1),), workers=4).on("cuda")) == ""


@pytest.mark.parametrize(("said", "layers", "blocks"), [("none", 0, 0), ("encoder", 1, 0), ("all", 1, 1)])
def test_what_is_recomputed(tmp_path, said, layers, blocks):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {{preset: tiny, latent_noise: 0.3, checkpointing: {said}}}\n"
        "data: {folder: pictures}\nrecipe: {stages: [{steps: 1}]}\n"
    )
    student = _objective(read_run(file, Run), torch.device("cpu")).student
    assert {layer.keeps for layer in student.layers()} == {"nothing" if layers else "everything"}
    assert student.flow_head.net.grad_checkpointing == blocks
    assert student.config.latent_noise == 0.3


def test_a_memory_is_fitted_to_the_micro_batch_before_anything_is_trained(tmp_path, capsys):
    file = tmp_path / "run.yaml"

    def check(said):
        file.write_text(
            f"model: {{preset: tiny, checkpointing: {said}}}\ndata: {{folder: pictures}}\n"
            "recipe: {batch_size: 6, micro_batch_size: 2, precision: float32, "
            "stages: [{steps: 1, train: decoder}, {steps: 1, image_size: 64}]}\n"
        )
        run = read_run(file, Run)
        student = _objective(run, torch.device("cpu")).student
        _check_memory(student, run, run.recipe, Processes())
        return student

    student = check("70%")
    assert student.activation_memory == 0.7
    assert not student.flow_head.net.grad_checkpointing
    planned = student.recomputation((2, 3, 64, 64))
    assert capsys.readouterr().err == f"uniflow: checkpointing: 70%, at 64 px: {planned}\n"
    assert planned.held < 0.7 * planned.whole
    with pytest.raises(ValueError, match=r"memory: expected at least .* got 5 KB"):
        check("5KB")
    with pytest.raises(ValueError, match=r"checkpointing: expected none, encoder or all, or .* a share .*, got 'half'"):
        check("half")
