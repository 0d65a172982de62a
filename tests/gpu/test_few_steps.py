"""Heads of two times on a GPU: samples as one CUDA graph, velocity and tangent, and losses that wait for nothing."""

import copy

import pytest
import torch

from tests.conftest import randomize
from tests.uniflow_kernels.test_dual_rows import against_definition
from tests.uniflow_kernels.test_tangents import FORMS
from uniflow.flow import sample_intervals
from uniflow_kernels import FlowHead, mean_flow_loss, self_distillation_loss
from uniflow_kernels.modules import sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("exact_float32"),
]


def make(dtype=torch.float32, rows=40, width=256):
    head = randomize(FlowHead(16, width, 16, width, 3, times=2)).to("cuda", dtype)
    data, noise = torch.randn(2, rows, 16, device="cuda")
    times = sample_intervals((rows,), 0.5, device=torch.device("cuda"))
    return head, torch.randn(rows, width, device="cuda").to(dtype), data, times, noise


@torch.no_grad()
def test_samples_are_replayed():
    head, condition, _, _, noise = make(torch.bfloat16)
    first, *others = (head.sample(condition, 2, noise=noise, cfg=1.5) for _ in range(4))
    assert len(sampling._GRAPHS[head]) == 1
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(first, sampling.follow(head, noise, condition, sampling.Plan(2, cfg=1.5)).taken().bfloat16())


@pytest.mark.parametrize("rows", [2, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_velocity_and_tangent(within_twice, dtype, rows):
    head, c, data, times, noise = make(dtype, rows)
    given = data.to(dtype), 1000 * times, c
    along = noise.to(dtype), torch.tensor([1000.0, 0.0], device="cuda").repeat(rows, 1)

    def by_torch(head, given, along):
        return torch.func.jvp(lambda x, t: head(x, t, given[2]), tuple(given[:2]), along)

    exact = by_torch(copy.deepcopy(head).double(), [g.double() for g in given], tuple(d.double() for d in along))
    plain = by_torch(head, given, along)
    for ours, theirs, reference in zip(head.jvp(*given, *along), plain, exact, strict=True):
        within_twice(ours, theirs, reference, floor=1e-5)


@pytest.mark.parametrize("stop_tangent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_kernels_of_values_with_tangents(within_twice, form, dtype, stop_tangent):
    floor = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for rows, width in ((5, 24), (300, 1024)):
        against_definition(within_twice, form, dtype, rows, width, stop_tangent, floor, device="cuda")


@pytest.mark.parametrize("loss", [mean_flow_loss, self_distillation_loss])
def test_losses_in_chunks_wait_for_nothing(loss):
    head, c, data, times, noise = make()
    leaves, mask = [c.requires_grad_(), *head.parameters()], torch.rand(40, device="cuda") < 0.8

    def made(chunk_rows):
        value = loss(head, c, data, times, noise, cfg=2.0, mask=mask, chunk_rows=chunk_rows)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    whole = made(None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = made(16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for found, expected in zip(ours, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
