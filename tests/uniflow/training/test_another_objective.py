"""What is trained need be no UniFlow: a line through points, with inputs, losses and a checkpoint of its own kind."""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

import uniflow.objective
import uniflow.unifluid.objective
from tests.uniflow.training.conftest import Heard
from uniflow.checkpoint import CheckpointError, read_state, write_state
from uniflow.data import Sample, Samples
from uniflow.training import Recipe, Stage, Trainer
from uniflow.training.logs import Validation
from uniflow.training.processes import Processes, _show_total
from uniflow.training.state import gather
from uniflow_kernels.torch_private import tree_leaves

STAGES = (Stage(3, train="decoder", warmup_steps=0), Stage(4, encoder_learning_rate=1e-2, warmup_steps=0))


class Line(nn.Module):
    pretrained_parts = ("features.",)
    untrained_parts = ()
    kind = "line"

    def __init__(self):
        super().__init__()
        self.features = nn.Linear(2, 8)
        self.out = nn.Linear(8, 1)
        self.register_buffer("scale", torch.tensor(2.0))

    @property
    def device(self):
        return self.scale.device

    def layers(self):
        return [self.features]

    def save_config(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model_type": self.kind}))

    def save_pretrained(self, folder):
        write_state(self, folder)
        self.save_config(folder)

    def forward(self, x):
        return self.scale * self.out(self.features(x).tanh())[..., 0]


class Points(NamedTuple):
    x: Tensor  # [B, 2]
    y: Tensor  # [B]


@dataclass
class Losses:
    total: Tensor
    errors: Tensor

    def measured(self):
        return {"worst": self.errors.max(), "halves": self.errors.view(2, -1).mean(1)}


class Fit(nn.Module):
    """The squared error, weighed; it takes a named tuple and a dictionary."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student = Line()

    def forward(self, points, extra):
        errors = (self.student(points.x) - points.y).square()
        return Losses((errors * extra["weights"]).mean(), errors.detach())


class Plane(Samples):
    def __init__(self, broken=None):
        self.broken = broken

    def __getitem__(self, position):
        x = np.random.default_rng(position).random(2, np.float32)
        y = np.float32("nan" if position == self.broken else x.sum())
        return Sample((torch.from_numpy(x), torch.tensor(y)), f"point {position}", [])

    def collate(self, values):
        points = Points(*(torch.stack(parts) for parts in zip(*values, strict=True)))
        return points, {"weights": torch.ones(len(values))}


def train(*stages, samples=None, objective=None, **options):
    own = {name: options.pop(name) for name in ("out", "logs", "validator", "processes") if name in options}
    recipe = Recipe(stages or STAGES, batch_size=4, log_every=1, **options)
    return Trainer(objective or Fit(), samples or Plane(), recipe, **own)


def test_an_objective_without_a_teacher_cannot_have_one_in_fp8():
    with pytest.raises(ValueError, match="teacher_precision: a Fit has no teacher"):
        train(teacher_precision="fp8")


def test_it_is_trained_and_what_it_measures_is_logged_by_name():
    heard = Heard()
    losses = train(Stage(60, learning_rate=0.05), logs=[heard]).run()
    assert np.mean(losses[-10:]) < 0.05 * np.mean(losses[:5])
    first, last = heard.reports[0], heard.reports[-1]
    assert first.loss == pytest.approx(np.mean(first.measured["halves"]))
    assert len(first.measured["halves"]) == 2
    assert first.measured["worst"] > last.measured["worst"] > 0
    assert list(first.values())[4:8] == ["loss", "worst", "halves", "gradient_norm"]


def test_pretrained_parts_are_frozen_or_have_their_own_rate():
    trainer = train()
    start = {name: parameter.clone() for name, parameter in trainer.student.named_parameters()}
    trainer.optimizer.register_step_post_hook(
        lambda *_: [
            pytest.fail(f"{name} is frozen")
            for name, parameter in trainer.student.named_parameters()
            if name.startswith("features.") and not torch.equal(parameter, start[name])
        ]
    )
    trainer.run()
    assert not any(torch.equal(parameter, start[name]) for name, parameter in trainer.student.named_parameters())
    assert {group["peak"] for group in trainer.optimizer.param_groups} == {1e-3, 1e-2}


def test_it_goes_on_to_the_bit(tmp_path):
    whole = train(out=tmp_path, save_every=1, keep=9, ema_decay=0.9, micro_batch_size=2)
    losses = whole.run()
    folder = tmp_path / "checkpoints" / "step-00000002"
    assert json.loads((folder / "config.json").read_text()) == {"model_type": "line"}
    assert read_state(folder).keys() == read_state(folder / "ema").keys() == whole.student.state_dict().keys()
    again = train(ema_decay=0.9, micro_batch_size=2)
    again.resume(folder)
    assert again.run() == losses[2:]
    for name, parameter in whole.student.named_parameters():
        assert torch.equal(parameter, again.student.get_parameter(name))
    again.student.kind = "curve"
    with pytest.raises(CheckpointError, match=r"does not hold this model: its config.json has another model_type$"):
        again.resume(folder)


def test_parts_that_are_not_trained_stay_as_they_are():
    objective = Fit()
    objective.student.untrained_parts = ("out.",)
    trainer = train(Stage(2), objective=objective)
    start = {name: parameter.clone() for name, parameter in trainer.student.named_parameters()}
    trainer.run()
    kept = [name for name, parameter in trainer.student.named_parameters() if torch.equal(parameter, start[name])]
    assert kept == ["out.weight", "out.bias"]


def test_a_failure_keeps_the_inputs(tmp_path):
    trainer = train(samples=Plane(broken=6), out=tmp_path, micro_batch_size=2)
    with pytest.raises(FloatingPointError, match="at step 2, of the samples point 4, point 5, point 6, point 7"):
        trainer.run()
    batch = torch.load(tmp_path / "failure-00000002" / "batch-0.pt", weights_only=True)
    (points, extra) = batch["inputs"][1]  # of the second micro-batch
    assert points["y"].isnan().tolist() == [True, False]
    assert torch.equal(points["x"][1], Plane()[7].value[0])
    assert extra["weights"].tolist() == [1, 1]


def test_any_validator_will_do():
    class Counting:
        def score(self, student, step, processes):
            assert not student.training
            return Validation(step, {"points": 3.0})

    heard = Heard()
    train(Stage(4), logs=[heard], validator=Counting(), validate_every=2).run()
    assert heard.validations == [Validation(2, {"points": 3.0}), Validation(4, {"points": 3.0})]


def as_in_torch_2_11(state, output):
    for tensor in tree_leaves(output):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(state._pre_backward)
    return output


@pytest.fixture(params=["this torch", "2.11"])
def what_fsdp_finds(request, monkeypatch):
    """In 2.11 a dataclass hides the loss, and a root without its hook trains not, or fails."""
    if request.param == "2.11":
        monkeypatch.setattr(FSDPState, "_register_pre_backward_hook", as_in_torch_2_11)


@pytest.mark.usefixtures("what_fsdp_finds")
def test_shards_are_gathered_into_what_is_built_and_gone_on_with(tmp_path):
    options = {"ema_decay": 0.9, "save_every": 1, "keep": 9}
    alone = train(out=tmp_path / "alone", **options)
    losses = alone.run()
    longer = (STAGES[0], replace(STAGES[1], steps=6))
    again = train(*longer, **options)
    again.resume(tmp_path / "alone" / "checkpoints" / "step-00000007")
    losses += again.run()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        options |= {"parallel": "fsdp", "processes": Processes(0, 1, torch.distributed.group.WORLD)}
        assert train(out=tmp_path, **options).run() == pytest.approx(losses[:7], rel=1e-5)
        for step in (2, 3, 5, 7):  # in the first stage, between the two, in the second, after it
            again = train(*(longer if step == 7 else STAGES), **options)
            again.resume(tmp_path / "checkpoints" / f"step-{step:08}")
            assert again.run() == pytest.approx(losses[step : 9 if step == 7 else 7], rel=1e-5)
    finally:
        torch.distributed.destroy_process_group()
    for average, expected in ((False, alone.student.state_dict()), (True, alone.average.values)):
        found = gather(tmp_path / "checkpoints" / "step-00000007", average, lambda folder: Line())
        for name, tensor in expected.items():
            assert torch.allclose(found.state_dict()[name], tensor, atol=1e-6), name


@pytest.mark.parametrize(
    "losses",
    [
        uniflow.objective.Losses(*(torch.rand(()) for _ in range(5))),
        uniflow.unifluid.objective.UniFluidLosses(*(torch.rand(()) for _ in range(4))),
    ],
)
def test_fsdp_finds_the_losses_of_every_objective(losses):
    _show_total(nn.Module(), (), losses)
    assert any(leaf is losses.total for leaf in tree_leaves(losses))


# what is refused


def test_losses_that_fsdp_cannot_look_into_are_refused():
    losses = SimpleNamespace(total=torch.rand(()))
    with pytest.raises(TypeError, match=r"parallel: fsdp needs losses that are a dataclass with total, got .*Simple"):
        _show_total(nn.Module(), (), losses)


def test_a_student_that_lacks_something_is_refused_at_once():
    objective = nn.Module()
    with pytest.raises(TypeError, match=r"objective: expected a module whose `student` .*; the student is a NoneType"):
        train(objective=objective)
    objective.student = nn.Linear(2, 1)
    with pytest.raises(TypeError, match="is a Linear without device, layers, pretrained_parts, save_config, save_pre"):
        train(objective=objective)


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ([{"a": torch.zeros(2, 2)}], r"expected to measure scalars and vectors, got a \[2, 2\]"),
        ([{"step": torch.zeros(())}], "objective: measures step, which the log has a meaning of its own for"),
        ([{"a": torch.zeros(2)}, {"a": torch.zeros(3)}], r"expected to measure a \[2\] as before, got a \[3\]"),
        ([{"a": torch.zeros(2)}, {}], r"expected to measure a \[2\] as before, got nothing"),
    ],
)
def test_what_cannot_be_logged_is_refused(measured, message):
    given = iter(measured)

    class Fickle(Fit):
        def forward(self, points, extra):
            losses = super().forward(points, extra)
            losses.measured = lambda: next(given)
            return losses

    with pytest.raises(ValueError, match=message):
        train(objective=Fickle()).run()
