import copy

import pytest
import torch

from uniflow import UniFlowObjective
from uniflow_kernels import layerwise_distillation, patchify


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    images, noise = (torch.randn(*shape, generator=generator) for shape in ((2, 3, 16, 16), (2, 16, 48)))
    return images, torch.rand(2, 16, generator=generator), noise


def perturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("per_image", [False, True])
def test_both_losses_against_their_formulas(tiny, per_image):
    student = tiny()
    teacher = copy.deepcopy(student)
    objective = UniFlowObjective(student, beta=3.0, flow_weight=0.7, distill_weight=0.4)
    perturb(student)
    images, t, noise = batch()
    t = t[:, 0] if per_image else t
    losses = objective(images, t, noise)

    s = t.view(2, -1, 1)
    patches = patchify(images, 4)
    condition = student.condition(student.encode(images))
    velocity = student.velocity(s * patches + (1 - s) * noise, t, condition)
    flow = (velocity - (patches - noise)).square().mean()
    states = [[h[:, 1:] for h in model.hidden_states(images)[1:]] for model in (student, teacher)]
    distill, alpha, weights = layerwise_distillation(*states, beta=3.0)

    assert torch.allclose(losses.flow, flow, rtol=1e-5)
    assert torch.allclose(losses.distill, distill, rtol=1e-5)
    assert torch.allclose(losses.total, 0.7 * flow + 0.4 * distill, rtol=1e-5)
    assert torch.allclose(losses.alpha, alpha, atol=1e-6)
    assert torch.allclose(losses.weights, weights, atol=1e-6)
    assert losses.alpha.shape == losses.weights.shape == (2,)
    assert losses.distill > 0


def test_the_teacher_is_the_encoder_as_it_was(tiny):
    student = tiny()
    objective = UniFlowObjective(student)
    images, t, noise = batch()
    assert objective(images, t, noise).distill.abs() < 1e-6
    before = objective.teacher(images)
    perturb(student)
    assert all(torch.equal(a, b) for a, b in zip(before, objective.teacher(images), strict=True))
    assert objective(images, t, noise).distill > 1e-4


def test_the_teacher_stays_frozen_and_in_evaluation_mode(tiny):
    objective = UniFlowObjective(tiny(drop_path_rate=0.5)).train()
    assert objective.student.encoder.training
    assert not objective.teacher.encoder.training
    assert not any(p.requires_grad for p in objective.teacher.parameters())
    objective(*batch()).total.backward()
    assert all(p.grad is not None for p in objective.student.parameters())
    assert all(p.grad is None for p in objective.teacher.parameters())


def test_any_teacher_module_will_do(tiny):
    class Constant(torch.nn.Module):
        def forward(self, images):
            return [torch.ones(len(images), 17, 64)] * 3

    losses = UniFlowObjective(tiny(), teacher=Constant())(*batch())
    assert losses.distill > 0.1


def test_without_distillation_there_is_no_teacher(tiny):
    objective = UniFlowObjective(tiny(), distill_weight=0.0)
    assert objective.teacher is None
    losses = objective(*batch())
    assert losses.distill == 0
    assert losses.alpha.shape == losses.weights.shape == (0,)
    assert torch.equal(losses.total.detach(), losses.flow)


def test_t_and_noise_are_drawn_when_not_given(tiny):
    objective = UniFlowObjective(tiny(), t_per="image", t_distribution="uniform")
    images, _, _ = batch()
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(objective(images).total.item())
    assert values[0] == values[1] != values[2]


def test_pictures_of_any_size(tiny):
    assert torch.isfinite(UniFlowObjective(tiny())(torch.randn(2, 3, 8, 24)).total)


def test_bad_options(tiny):
    with pytest.raises(ValueError, match="t_per: expected 'token' or 'image', got 'batch'"):
        UniFlowObjective(tiny(), t_per="batch")
    with pytest.raises(ValueError, match="t_distribution: expected one of"):
        UniFlowObjective(tiny(), t_distribution="normal")


def test_compiles_whole(tiny):
    objective = UniFlowObjective(tiny())
    compiled = torch.compile(objective, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(*batch()).total, objective(*batch()).total, rtol=1e-5)
