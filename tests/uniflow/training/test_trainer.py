import functools
import math
import multiprocessing
import os
import re
import signal
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.conftest import smooth_picture
from tests.uniflow.evaluation.conftest import colours  # noqa: F401
from tests.uniflow.training.conftest import Heard, small_crops, small_objective
from uniflow import EncoderTeacher, UniFlow
from uniflow.data import PictureList, RandomCrops, Sample
from uniflow.evaluation import FeatureNetwork
from uniflow.evaluation.similarity import psnr, ssim
from uniflow.evaluation.validation import ReconstructionValidator
from uniflow.normalization import normalize, to_uint8
from uniflow.pictures import PictureError, center_crop, open_picture, to_tensor
from uniflow.training import Stage
from uniflow.training.optimization import set_learning_rates
from uniflow.training.processes import Processes, ProcessLostError
from uniflow_kernels import seeded_noise
from uniflow_kernels.modules.fp8_linear import Fp8Linear


def parameters(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.student.named_parameters()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def in_encoder(name):
    return name.startswith(("embeddings.", "encoder."))


# the loop


def test_training_reduces_the_loss(make):
    trainer = make(steps=40, log_every=100)
    losses = trainer.run()
    assert len(losses) == 40
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])
    assert not trainer.objective.training
    assert trainer.finished


def test_a_teacher_in_fp8(make):
    """The student learns from nearly the same, and what is saved is its own; a run without a teacher is refused."""
    trainer = make(steps=3, teacher_precision="fp8", precision="bfloat16")
    assert trainer.run() == pytest.approx(make(steps=3, precision="bfloat16").run(), rel=0.01)
    teacher = trainer.objective.teacher
    assert teacher.dtype == torch.bfloat16
    assert [type(layer.mlp.fc1) for layer in teacher.encoder.layers] == [Fp8Linear]
    assert not any(type(part) is Fp8Linear for part in trainer.student.modules())
    with pytest.raises(ValueError, match="teacher_precision: expected an EncoderTeacher to teach, got none"):
        make(objective=small_objective(distill_weight=0.0), teacher_precision="fp8")


def test_the_seed_decides(make):
    one, two, other = (make(steps=3, seed=seed).run() for seed in (1, 1, 2))
    assert one == two != other


def test_what_is_drawn_elsewhere_changes_nothing(make):
    torch.manual_seed(1)
    trainer = make(steps=3)
    torch.manual_seed(2)
    assert trainer.run() == make(steps=3).run()


def test_a_stage_ends_when_its_seconds_are_spent(make):
    trainer = make(Stage(10**6, seconds=0.5), Stage(2))
    assert 3 < len(trainer.run()) < 10**4
    assert trainer.finished


def test_stop_finishes_the_step_and_saves(make, tmp_path):
    trainer = make(steps=50, out=tmp_path)
    trainer.optimizer.register_step_post_hook(lambda *_: trainer.stop() if trainer.progress.step == 3 else None)
    assert len(trainer.run()) == 3
    assert not trainer.finished
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()


def test_a_step_is_adamw_on_the_mean_gradient(make):
    trainer = make(Stage(2, learning_rate=1e-3, warmup_steps=0), max_gradient_norm=0.1, weight_decay=0.1)
    stop_after(trainer, 1)
    student = small_objective().student
    decays, others = ([p for p in student.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    objective = small_objective()
    objective.student = student
    torch.manual_seed(trainer_seed(trainer, step=1))
    images = torch.stack([trainer.samples[position].value for position in range(4)])
    losses = objective.train()(normalize(images))
    losses.total.backward()
    nn.utils.clip_grad_norm_(student.parameters(), 0.1)
    torch.optim.AdamW(groups, lr=0.5e-3, betas=(0.9, 0.95)).step()  # the middle of the cosine
    assert trainer.run() == [losses.total.item()]
    for name, parameter in student.named_parameters():
        assert torch.allclose(parameter, trainer.student.get_parameter(name), atol=1e-6), name


def test_the_cosine_ends_at_the_final_learning_rate():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "peak": peak} for peak in (1e-3, 1e-4)]
    optimizer = torch.optim.AdamW(groups)
    stage = Stage(10, warmup_steps=4, final_learning_rate=2e-4)
    for step, spent, factor in ((2, 0.0, 0.5), (4, 0.0, 1.0), (9, 0.5, 0.6), (10, 1.0, 0.2), (11, 1.5, 0.2)):
        assert set_learning_rates(optimizer, stage, step, spent) == pytest.approx(factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([factor * 1e-3, factor * 1e-4])


def trainer_seed(trainer, step, number=0):
    trainer.progress.step = step
    seed = trainer._seed(number)
    trainer.progress.step = 0
    return seed


def stop_after(trainer, steps):
    trainer.optimizer.register_step_post_hook(lambda *_: trainer.stop() if trainer.progress.step == steps else None)


@dataclass
class Total:
    total: torch.Tensor

    def measured(self):
        return {}


class WithoutChance(nn.Module):
    """An objective whose loss depends on nothing but student and images."""

    def __init__(self):
        super().__init__()
        self.student = small_objective().student

    def forward(self, images):
        images = normalize(images)
        states = self.student.hidden_states(images)
        condition = self.student.condition(self.student.latents(states[-1]))
        rows = torch.zeros(*condition.shape[:2], 48)
        velocity = self.student.velocity(rows, torch.full((len(images),), 0.5), condition)
        total = (condition.mean() - 1).square() + (velocity - images.mean((1, 2, 3))[:, None, None]).square().mean()
        return Total(total)


def test_micro_batches_add_up_to_the_batch(make):
    class Linear(WithoutChance):
        def forward(self, images):
            losses = super().forward(images)
            losses.total = self.student.encode(normalize(images)).square().mean()  # a mean over the images
            return losses

    whole, parts = make(objective=Linear(), steps=4), make(objective=Linear(), steps=4, micro_batch_size=1)
    assert parts.micro_batches == 4
    assert parts.run() == pytest.approx(whole.run(), rel=1e-5)
    for name, parameter in whole.student.named_parameters():
        assert torch.allclose(parameter, parts.student.get_parameter(name), atol=1e-5), name


def test_the_moving_average(make):
    trainer = make(steps=4, ema_decay=0.7)
    expected = parameters(trainer)

    def follow(*_):
        for name, parameter in parameters(trainer).items():
            expected[name].lerp_(parameter, 0.3)

    trainer.optimizer.register_step_post_hook(follow)
    trainer.run()
    assert all(torch.allclose(trainer.average.values[name], expected[name], atol=1e-6) for name in expected)
    own = parameters(trainer)
    with trainer.average.in_model():
        assert not changed(parameters(trainer), trainer.average.values)
    assert not changed(parameters(trainer), own)


def test_autocast_and_its_dtypes(make):
    seen = []

    class Looking(WithoutChance):
        def forward(self, images):
            seen.append((images.dtype, self.student.encode(normalize(images)).dtype))
            return super().forward(images)

    trainer = make(steps=1, objective=Looking(), precision="bfloat16")
    trainer.run()
    assert seen == [(torch.uint8, torch.bfloat16)]
    assert {p.dtype for p in trainer.student.parameters()} == {torch.float32}


def test_layers_are_compiled_once_for_all_that_are_alike(make, monkeypatch, picture_folder):
    """Whatever their number and their drop path; the scores are computed without."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))

    def run(layers, **options):
        torch._dynamo.reset()
        counters.clear()
        validator = ReconstructionValidator(sorted(picture_folder.glob("*.png")), batch_size=1)
        objective = small_objective(layers=layers, drop_path=0.2)
        losses = make(steps=2, objective=objective, validator=validator, validate_every=1, **options).run()
        return losses, counters["stats"]["unique_graphs"]

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        losses, graphs = run(9, compile=True)
    assert graphs == run(3, compile=True)[1] > 0
    assert losses == run(9, compile=False)[0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_teacher_is_in_the_runs_precision(make, precision):
    objective = small_objective()
    given = objective.teacher
    make(steps=1, objective=objective, precision=precision).run()
    assert objective.teacher.dtype == getattr(torch, precision)
    assert given.dtype == torch.float32  # whoever else has it finds it as it was
    assert all(parameter.requires_grad is False for parameter in objective.teacher.parameters())


def test_a_teacher_of_a_precision_of_its_own_stays_in_it(make):
    own = small_objective()
    own.teacher = EncoderTeacher.copy_of(own.student, torch.float16)
    make(steps=1, objective=own, precision="bfloat16").run()
    assert own.teacher.dtype == torch.float16


def test_the_recipe_must_fit(make):
    with pytest.raises(ValueError, match="micro_batch_size: expected a divisor of a process's share"):
        make(micro_batch_size=3)
    with pytest.raises(ValueError, match="parallel: fsdp needs torchrun"):
        make(parallel="fsdp")


# stages, groups and rates


def test_stages_train_the_decoder_then_all(make):
    trainer = make(Stage(4, train="decoder", warmup_steps=0), Stage(2, warmup_steps=0))
    start = parameters(trainer)
    seen = []
    trainer.optimizer.register_step_post_hook(lambda *_: seen.append(parameters(trainer)))
    heard = Heard()
    trainer.logs.append(heard)
    trainer.run()
    assert len(seen) == 4  # the second stage has an optimizer of its own
    decoder = {name for name in start if not in_encoder(name)}
    assert changed(start, seen[-1]) == decoder
    assert all(parameter.requires_grad for parameter in trainer.student.parameters())
    assert any(in_encoder(name) for name in changed(seen[-1], parameters(trainer)))
    assert [report.stage for report in heard.reports] == [0, 0, 0, 0, 1, 1]
    assert [report.encoder_learning_rate is None for report in heard.reports] == [True] * 4 + [False] * 2


def test_the_encoder_has_its_own_rate_and_norms_and_biases_no_decay(make):
    trainer = make(Stage(3, learning_rate=0.0, encoder_learning_rate=1e-2), weight_decay=0.5)
    names = {parameter: name for name, parameter in trainer.student.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.5 if parameter.ndim > 1 else 0.0)
            assert group["peak"] == (1e-2 if in_encoder(names[parameter]) else 0.0)
    start = parameters(trainer)
    trainer.run()
    assert changed(start, parameters(trainer))
    assert all(map(in_encoder, changed(start, parameters(trainer))))


def test_warmup_and_cosine(make):
    heard = Heard()
    make(Stage(8, learning_rate=1e-3, encoder_learning_rate=1e-4, warmup_steps=4), logs=[heard]).run()
    expected = [min(1, n / 4) * 0.5 * (1 + math.cos(math.pi * n / 8)) for n in range(1, 9)]
    assert [report.learning_rate for report in heard.reports] == pytest.approx([1e-3 * x for x in expected])
    assert [report.encoder_learning_rate for report in heard.reports] == pytest.approx([1e-4 * x for x in expected])


# what is reported


def test_reports(make):
    heard = Heard()
    losses = make(steps=7, log_every=3, logs=[heard]).run()
    assert [report.step for report in heard.reports] == [3, 6, 7]
    assert [report.loss for report in heard.reports] == [losses[2], losses[5], losses[6]]
    for report in heard.reports:
        assert list(report.measured) == ["flow", "distill", "alpha", "weights"]
        assert report.loss == pytest.approx(report.measured["flow"] + 0.5 * report.measured["distill"], rel=1e-5)
        assert len(report.measured["alpha"]) == 1
        assert report.measured["weights"] == pytest.approx([1.0])
        assert report.images_per_second > 0
        assert report.gradient_norm > 0
        assert report.memory > 10**7
        assert report.mfu is None
    assert heard.reports[-1].spent == 1
    assert heard.reports[-1].seconds_left == 0


def test_skipped_pictures_are_counted_and_named(make, tmp_path):
    (tmp_path / "bad.png").write_text("no picture")
    good = dict(zip(small_crops(3).pictures.names, small_crops(3).pictures.pictures, strict=True))
    crops = RandomCrops(PictureList({**good, "bad.png": tmp_path / "bad.png"}), 16)
    heard = Heard()
    trainer = make(steps=3, crops=crops, logs=[heard])
    trainer.run()
    assert trainer.progress.skipped == heard.reports[-1].skipped == 3  # once in an epoch of four
    assert [names for _, names in heard.skips] == [["bad.png"]] * 3


def test_validation_scores_center_crops(make, picture_folder):
    files = sorted(path for path in picture_folder.rglob("*") if path.is_file())
    heard = Heard()
    trainer = make(steps=4, validate_every=4, ema_decay=0.9, validator=ReconstructionValidator(files, 2), logs=[heard])
    assert trainer.run() == make(steps=4, ema_decay=0.9).run()  # training does not notice
    (validation,) = heard.validations
    originals = torch.stack([to_tensor(center_crop(open_picture(file), 16)) for file in files])
    noise = torch.stack([seeded_noise(16, 48, i) for i in range(3)])
    with trainer.average.in_model(), torch.no_grad():
        results = to_uint8(trainer.student(normalize(originals), noise=noise))
    assert validation.step == 4
    assert validation.scores["psnr"] == pytest.approx(psnr(results, originals).mean().item(), abs=1e-2)
    assert validation.scores["ssim"] == pytest.approx(ssim(results, originals).mean().item(), abs=1e-2)
    assert validation.samples.shape == (3, 32, 32)  # the first batch: two pictures above two
    assert torch.equal(validation.samples[:, :16, 16:], originals[1])


def test_processes_share_the_pictures_to_validate_on(picture_folder, colours):  # noqa: F811
    files = sorted(path for path in picture_folder.rglob("*") if path.is_file())
    student = small_objective().student

    class Together(Processes):
        """The first, last of all, is given what the other one gave."""

        def to_first(self, value):
            given[self.rank].append(value)
            return [given[rank][len(given[0]) - 1] for rank in (0, 1)] if self.first else []

        def from_first(self, make):
            return make()

    given = [], []
    network = FeatureNetwork(colours, torch.device("cpu"))
    for rank in (1, 0):  # the second has one picture less
        together = ReconstructionValidator(files, 1, network).score(student, 1, Together(rank, 2))
    assert len(given[0]) == len(given[1]) == 2
    alone = ReconstructionValidator(files, 1, network).score(student, 1, Processes())
    assert alone.scores == together.scores
    assert alone.scores["rfid"] > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_ends_the_run_in_its_own_words(make, tmp_path, workers):
    for number in range(2):
        smooth_picture((20, 20), number).save(tmp_path / f"{number}.png")
    crops = RandomCrops(PictureList({path.name: path for path in tmp_path.iterdir()}), 16)
    trainer = make(steps=100, crops=crops, workers=workers)
    trainer.optimizer.register_step_post_hook(lambda *_: [path.unlink() for path in tmp_path.iterdir()])
    with pytest.raises(PictureError) as caught:
        trainer.run()
    assert re.fullmatch("none of the 2 pictures can be read; the last: .*png", str(caught.value))
    assert ["in __getitem__" in note for note in getattr(caught.value, "__notes__", [])] == [True] * workers


def test_a_reader_that_is_killed_ends_the_run_with_a_message(make):
    def kill(*_):
        for reader in multiprocessing.active_children():
            os.kill(reader.pid, signal.SIGKILL)

    trainer = make(steps=1000, workers=1)
    trainer.optimizer.register_step_post_hook(kill)
    with pytest.raises(ProcessLostError, match=r"a process that reads samples was killed; .* --resume auto"):
        trainer.run()
    assert trainer.progress.step < 100


# losses that are not finite


class Poisoned(RandomCrops):
    """Good crops, but one is white; the objective below cannot stand white pictures."""

    def __init__(self, at):
        super().__init__(small_crops().pictures, 16)
        self.at = at

    def __getitem__(self, position):
        sample = super().__getitem__(position)
        return Sample(torch.full_like(sample.value, 255), "white.png", []) if position == self.at else sample


class AfraidOfWhite(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.inner, self.value = small_objective(), value

    @property
    def student(self):
        return self.inner.student

    def forward(self, images):
        losses = self.inner(images)
        white = (images == 255).flatten(1).all(1).any()
        return replace(losses, total=losses.total * torch.where(white, self.value, 1.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_does_harm(make, tmp_path, value):
    trainer = make(objective=AfraidOfWhite(value), crops=Poisoned(9), out=tmp_path, ema_decay=0.9, save_every=1)
    with pytest.raises(FloatingPointError) as raised:
        trainer.run()
    assert f"the loss is {value} at step 3" in str(raised.value)
    assert "white.png" in str(raised.value)
    assert "a lower learning rate may help" in str(raised.value)
    good = make(objective=AfraidOfWhite(value), out=tmp_path / "good", ema_decay=0.9)
    stop_after(good, 2)
    good.run()
    folder = tmp_path / "failure-00000003"
    assert not changed(parameters(good), dict(UniFlow.from_pretrained(folder).named_parameters()))
    batch = torch.load(folder / "batch-0.pt", weights_only=True)
    assert batch["names"][1] == "white.png"
    ((images,),) = batch["inputs"]  # of the only micro-batch
    assert (images[1] == 255).all()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]

    # the step can be made again
    objective = AfraidOfWhite(value).train()
    objective.student.load_state_dict(UniFlow.from_pretrained(folder).state_dict())
    torch.manual_seed(batch["seeds"][0])
    assert not math.isfinite(objective(images).total.item())


def test_steps_made_before_the_host_notices_change_nothing(make, monkeypatch):
    from uniflow.training import trainer as module

    # as on a GPU whose numbers come late
    monkeypatch.setattr(module.Arriving, "here", lambda self: False)
    trainer = make(objective=AfraidOfWhite(math.nan), crops=Poisoned(9), steps=6, ema_decay=0.9)
    with pytest.raises(FloatingPointError, match="at step 3"):
        trainer.run()
    assert trainer.progress.step == 6
    good = make(objective=AfraidOfWhite(math.nan), ema_decay=0.9, steps=6)
    stop_after(good, 2)
    good.run()
    assert not changed(parameters(good), parameters(trainer))


def test_a_gradient_that_is_not_finite_stops_too(make):
    class Broken(WithoutChance):
        def forward(self, images):
            losses = super().forward(images)
            # sqrt has an infinite slope at 0
            losses.total = losses.total + (self.student.chal_proj.c_fc.bias.sum() * 0).sqrt()
            return losses

    with pytest.raises(FloatingPointError, match="the gradient's norm is nan at step 1, of the samples "):
        make(objective=Broken()).run()
