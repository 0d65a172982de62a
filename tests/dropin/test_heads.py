"""Each project's head, before and after `patch`: numbers, gradients, and what its callers touch."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.conftest import derivative_error, randomize
from tests.dropin.stand_ins import PROJECTS, inside, only_ours
from uniflow_kernels import PatchReport, backend, patch, unpatch

EVERY = pytest.mark.parametrize("name", list(PROJECTS))
DISTINCT = list({project.make: name for name, project in PROJECTS.items()}.values())


def make(name, dtype=torch.float32):
    project = PROJECTS[name]
    return randomize(project.make()).to(dtype), project.inputs, project.kwargs


def outputs_and_gradients(head, inputs, kwargs, dtype):
    """The output, and the gradients of floating inputs and parameters, by name."""

    def converted(value):
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    args = [converted(value).detach().requires_grad_(value.is_floating_point()) for value in inputs]
    out = head(*args, **{name: converted(value) for name, value in kwargs.items()})
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    leaves = {f"input {i}": value for i, value in enumerate(args) if value.requires_grad}
    leaves |= dict(head.named_parameters())
    found = torch.autograd.grad((out * weight).sum(), list(leaves.values()), allow_unused=True)
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


@EVERY
def test_is_found_where_it_lies_and_nothing_else_changes(name):
    project = PROJECTS[name]
    head = randomize(project.make())
    model = inside(project.path, head)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modules, seed = dict(model.named_modules()), torch.get_rng_state()
    report = patch(model)
    assert list(report.patched) == [project.path]
    assert report.left_alone == {}
    assert isinstance(report, PatchReport)
    assert torch.equal(torch.get_rng_state(), seed)
    assert dict(model.named_modules()) == modules
    assert all(module.training for module in modules.values())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.load_state_dict(state)
    unpatch(model)
    assert all("forward" not in vars(module) for module in model.modules())


@EVERY
@pytest.mark.usefixtures("served")
def test_numbers_and_gradients(name, within_twice, monkeypatch):
    head, inputs, kwargs = make(name)
    exact = outputs_and_gradients(copy.deepcopy(head).double(), inputs, kwargs, torch.float64)
    before = outputs_and_gradients(head, inputs, kwargs, torch.float32)
    patch(head, strict=True)
    only_ours(head, monkeypatch)
    for training in (False, True):
        after = outputs_and_gradients(head.train(training), inputs, kwargs, torch.float32)
        compare(after, before, exact, within_twice, floor=1e-6)


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.usefixtures("served")
def test_half_precision(name):
    """All gradients together: the largest error of five rows is a matter of luck."""
    head, inputs, kwargs = make(name, torch.bfloat16)
    exact = outputs_and_gradients(copy.deepcopy(head).double(), inputs, kwargs, torch.float64)
    before = outputs_and_gradients(head, inputs, kwargs, torch.bfloat16)
    patch(head)
    after = outputs_and_gradients(head, inputs, kwargs, torch.bfloat16)

    def error(found):
        apart = [(found[n].double() - e).flatten() / e.abs().max() for n, e in exact.items() if e is not None]
        return torch.cat(apart).square().mean().sqrt()

    assert after["out"].dtype == before["out"].dtype
    assert error(after) <= 2 * error(before)


@pytest.mark.parametrize(
    "name", ["MAR", "FAR", "DeCo (RMS)", "NextStep-1", "Ming-UniVision", "VibeVoice", "SphereAR", "pixel DeCo"]
)
def test_numbers_and_gradients_of_the_kernels(name, within_twice, monkeypatch):
    head, inputs, kwargs = make(name)
    exact = outputs_and_gradients(copy.deepcopy(head).double(), inputs, kwargs, torch.float64)
    before = outputs_and_gradients(head, inputs, kwargs, torch.float32)
    report = patch(head)
    assert "Triton where it can serve" in report.patched[""]
    only_ours(head, monkeypatch)
    with backend("triton"):
        after = outputs_and_gradients(head, inputs, kwargs, torch.float32)
    compare(after, before, exact, within_twice, floor=2e-6)


def compare(after, before, exact, within_twice, floor):
    assert list(after) == list(exact)
    for name, value in exact.items():
        assert (value is None) == (after[name] is None) == (before[name] is None), name
        if value is not None:
            within_twice(after[name], before[name], value, floor=floor)


@pytest.mark.parametrize("name", DISTINCT)
def test_gradients_of_forward_mode_derivatives(name):
    """Right in the patched head, also where torch's layer norm makes them wrong in the original."""
    head, inputs, kwargs = make(name, torch.float64)
    patch(head, strict=True)
    kwargs = {key: value.double() for key, value in kwargs.items()}
    given = [value.double() if value.is_floating_point() else value for value in inputs]
    places = [i for i, value in enumerate(given) if value.ndim > 1 and value.shape[1] > 1]  # times are float32 inside

    for i in places:
        given[i].requires_grad_()
    tangents = tuple(torch.cos(given[i].detach()) for i in places)

    def loss():
        def run(*floating):
            arguments = list(given)
            for i, value in zip(places, floating, strict=True):
                arguments[i] = value
            return head(*arguments, **kwargs)

        tangent = torch.func.jvp(run, tuple(given[i] for i in places), tangents)[1]
        return (tangent * torch.linspace(-1, 1, tangent.numel(), dtype=tangent.dtype).view_as(tangent)).sum()

    assert derivative_error(loss, [*(given[i] for i in places), *head.parameters()]) < 1e-6
