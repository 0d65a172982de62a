import pytest
import torch
from torch import nn

from benchmarks import reference
from benchmarks.cases import CASES
from benchmarks.check import Checker
from uniflow_kernels import FlowHead


def wrong_findings(case, form=None):
    problem = case.check_problem("cpu", case.cpu[0].values)
    return [f for f in Checker(problem).findings(form or problem.ours) if not f.right]


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


def test_the_plain_form_is_right(make_case):
    assert wrong_findings(make_case()) == []


def one_wrong_element(layer, x):
    out = layer(x)
    return torch.cat([out[:-1], out[-1:] * 1.001])


@pytest.mark.parametrize(
    ("form", "named"),
    [
        (one_wrong_element, "output 0"),
        (lambda layer, x: layer(x) * float("nan"), "output 0"),
        (lambda layer, x: layer(x).double(), "output 0"),
        (lambda layer, x: layer(x)[:-1], "output 0"),
        (lambda layer, x: layer(WrongGradient.apply(x)), "gradient of input 1"),
        (lambda layer, x: torch.nn.functional.linear(x, layer.weight, layer.bias.detach()), "gradient of bias"),
        (lambda layer, x: layer(x).detach(), "gradient of weight"),
    ],
    ids=["wrong row", "NaN", "wrong dtype", "wrong shape", "wrong gradient", "missing gradient", "no gradient"],
)
def test_a_planted_fault_is_found_and_named(make_case, form, named):
    if form is one_wrong_element or named.startswith("output"):
        assert named in [finding.tensor for finding in wrong_findings(make_case(), form)]
    else:
        wrong = [finding.tensor for finding in wrong_findings(make_case(), form)]
        assert named in wrong
        assert "output 0" not in wrong


def test_half_precision_is_held_to_the_plain_forms_error_in_half_precision(make_case):
    case = make_case()
    problem = case.check_problem("cpu", {"tokens": 64})
    layer, x = problem.inputs
    problem.inputs[0].to(torch.bfloat16)
    half = x.detach().to(torch.bfloat16).requires_grad_()
    problem = type(problem)(**{**vars(problem), "inputs": (layer, half)})

    def coarser(layer, x):  # rounds to 4 bits on the way
        return layer(x.to(torch.float8_e4m3fn).to(torch.bfloat16))

    checker = Checker(problem)
    assert all(finding.right for finding in checker.findings(problem.ours))
    assert not checker.findings(coarser)[0].right


def test_the_reference_is_no_dead_branch():
    """Every parameter of the head changes the plain form's output; a randomised module has none that is zero."""
    problem = CASES["flow_head"].check_problem("cpu", CASES["flow_head"].cpu[0].values)
    head, x, t, c = problem.inputs
    assert isinstance(head, FlowHead)
    out = reference.flow_head(head, x, t, c)
    gradients = torch.autograd.grad(out.square().sum(), list(head.parameters()))
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert all(parameter.abs().max() > 0 for parameter in head.parameters())


def test_attention_of_the_reference_is_attention():
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(reference.attention(q, k, v), nn.functional.scaled_dot_product_attention(q, k, v))
