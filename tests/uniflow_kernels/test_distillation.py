import math

import pytest
import torch

from uniflow_kernels import layerwise_distillation


def layers(count=4, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def formula(student, teacher, beta, detach):
    """The paper's sums, written out in float64."""
    alphas = []
    for s, t in zip(student, teacher, strict=True):
        cosine = (s.double() * t.double()).sum(-1) / (s.double().norm(dim=-1) * t.double().norm(dim=-1))
        alphas.append(1 - cosine.mean())
    deep = [(layer / len(alphas)) * torch.exp(beta * alpha) for layer, alpha in enumerate(alphas, start=1)]
    weights = torch.stack(deep) / sum(deep)
    weights = weights.detach() if detach else weights
    return (weights * torch.stack(alphas)).sum(), torch.stack(alphas), weights


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("beta", [0.0, 2.0, 7.5])
def test_value_and_gradient(detach, beta):
    student, teacher = layers(seed=0), layers(seed=1)
    for s in student:
        s.requires_grad_()
    loss, alpha, weights = layerwise_distillation(student, teacher, beta, detach)
    expected = formula(student, teacher, beta, detach)
    for ours, exact in zip((loss, alpha, weights), expected, strict=True):
        assert torch.allclose(ours.double(), exact, rtol=1e-5)
    ours = torch.autograd.grad(loss, student)
    exact = torch.autograd.grad(expected[0], student)
    for mine, theirs in zip(ours, exact, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-7)
    assert not alpha.requires_grad
    assert not weights.requires_grad


def test_whether_weights_are_differentiated_matters():
    student, teacher = [s.requires_grad_() for s in layers(seed=0)], layers(seed=1)
    gradients = [
        torch.autograd.grad(layerwise_distillation(student, teacher, detach_weights=d)[0], student[0])[0]
        for d in (True, False)
    ]
    assert not torch.allclose(*gradients, rtol=1e-3)


def test_deeper_and_worse_aligned_layers_weigh_more():
    teacher = layers(3)
    _, alpha, weights = layerwise_distillation(teacher, teacher)
    assert alpha.abs().max() < 1e-6
    assert torch.allclose(weights, torch.tensor([1 / 6, 2 / 6, 3 / 6]), atol=1e-5)
    _, alpha, weights = layerwise_distillation([-teacher[0], teacher[1], teacher[2]], teacher)
    assert math.isclose(alpha[0], 2, abs_tol=1e-5)
    assert weights[0] > weights[2] > weights[1]


def test_stacked_and_half_precision_inputs_and_large_beta():
    student, teacher = layers(dtype=torch.bfloat16, seed=0), layers(dtype=torch.bfloat16, seed=1)
    listed = layerwise_distillation(student, teacher)
    stacked = layerwise_distillation(torch.stack(student), torch.stack(teacher))
    for a, b in zip(listed, stacked, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    assert all(torch.isfinite(value).all() for value in layerwise_distillation(student, teacher, beta=1000.0))


def test_a_class_token_is_left_out_by_a_view():
    student, teacher = layers(seed=0), layers(seed=1)
    views = layerwise_distillation([s[:, 1:] for s in student], [t[:, 1:] for t in teacher])
    copies = layerwise_distillation([s[:, 1:].clone() for s in student], [t[:, 1:].clone() for t in teacher])
    assert torch.equal(views[0], copies[0])


def test_zero_tokens_have_finite_gradients():
    student, teacher = layers(2), layers(2, seed=1)
    student[0] = torch.zeros_like(student[0]).requires_grad_()
    loss, alpha, _ = layerwise_distillation(student, teacher)
    assert alpha[0] == 1
    assert torch.isfinite(torch.autograd.grad(loss, student[0])[0]).all()


def test_the_teacher_gets_no_gradient():
    student, teacher = [s.requires_grad_() for s in layers(seed=0)], [t.requires_grad_() for t in layers(seed=1)]
    layerwise_distillation(student, teacher)[0].backward()
    assert all(s.grad is not None for s in student)
    assert all(t.grad is None for t in teacher)


def test_wrong_inputs():
    with pytest.raises(ValueError, match="as many layers in both, at least one, got 4 and 3"):
        layerwise_distillation(layers(4), layers(3))
    with pytest.raises(ValueError, match="at least one, got 0 and 0"):
        layerwise_distillation([], [])
    wrong = layers(4)
    wrong[2] = wrong[2][:, 1:]
    with pytest.raises(ValueError, match=r"teacher: layer 3 has shape \(2, 4, 8\), expected the student's \(2, 5, 8\)"):
        layerwise_distillation(layers(4), wrong)
