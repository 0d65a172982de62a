"""How much the losses allocate on a CPU, by what the allocator reports: little beside the results that they return."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from uniflow_kernels import (
    FlowHead,
    backend,
    flow_matching_loss,
    interpolate,
    layerwise_distillation,
    patchify,
    velocity_loss,
)
from uniflow_kernels.ops import pieces


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """As pieces are beside large inputs."""
    monkeypatch.setattr(pieces, "CPU_CHUNK", 1 << 12)
    with backend("auto"):
        yield


def peak(call):
    """Most bytes that a call holds at a time, its results included, in its second run: what is made once is there."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = call()
    del results
    held = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def test_a_peak_is_what_is_held_at_a_time():
    x = torch.randn(1000)
    for call, held in ((lambda: x + 1, 1), (lambda: (x * 2) * (x * 3), 3), (lambda: (x * 2).sum() + 0, 1)):
        assert peak(call) == pytest.approx(held * x.nbytes, abs=64)  # and a few numbers


@pytest.fixture
def flow():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 112, 112, generator=generator)
    noise, velocity = (torch.randn(4, 64, 588, generator=generator) for _ in range(2))
    return images, noise, velocity.requires_grad_()


def test_velocity_loss(flow):
    """The gradient is half of what the plain form holds, and all that ours holds but for a value a token."""
    images, noise, velocity = flow
    ours = peak(lambda: gradients(velocity_loss(velocity, images, 14, noise), velocity))
    plain = peak(lambda: gradients(F.mse_loss(velocity, patchify(images, 14) - noise), velocity))
    assert plain >= 2 * velocity.nbytes
    assert ours <= velocity.nbytes + 8 * velocity.shape[0] * velocity.shape[1]
    with torch.no_grad():
        assert peak(lambda: velocity_loss(velocity, images, 14, noise)) < velocity.nbytes / 10


@pytest.mark.parametrize("weighted", [False, True])
def test_velocity_loss_in_float16(flow, weighted):
    """The gradient stays in float16, whatever it is multiplied by; a piece at a time is in float32."""
    images, noise, velocity = flow
    small, weights = velocity.detach().repeat(4, 1, 1).half().requires_grad_(), torch.rand(16, 64) if weighted else None
    images, noise = images.repeat(4, 1, 1, 1), noise.repeat(4, 1, 1)
    held = peak(lambda: gradients(2 * velocity_loss(small, images, 14, noise, weights=weights), small))
    assert held <= 1.5 * small.nbytes


def test_velocity_loss_of_half_precision(flow):
    images, noise, velocity = (x.detach().bfloat16() for x in flow)
    velocity.requires_grad_()
    ours = peak(lambda: gradients(velocity_loss(velocity, images, 14, noise), velocity))
    target = lambda: patchify(images, 14).float() - noise.float()  # noqa: E731
    plain = peak(lambda: gradients(F.mse_loss(velocity.float(), target()), velocity))
    assert ours <= plain / 4


def test_interpolate(flow):
    images, noise, _ = flow
    t = torch.rand(4, 64)
    ours = peak(lambda: interpolate(images, t, 14, noise))
    plain = peak(lambda: t[..., None] * patchify(images, 14) + (1 - t[..., None]) * noise)
    assert ours <= plain / 2
    assert ours <= noise.nbytes + 8 * t.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distillation(dtype):
    student, teacher = ([torch.randn(4, 65, 128).to(dtype) for _ in range(6)] for _ in range(2))
    for s in student:
        s.requires_grad_()

    def plain():
        pairs = zip(student, teacher, strict=True)
        alpha = torch.stack([1 - F.cosine_similarity(s.float(), t.float(), dim=-1).mean() for s, t in pairs])
        return gradients((torch.softmax(2 * alpha.detach(), 0) * alpha).sum(), *student)

    ours = peak(lambda: gradients(layerwise_distillation(student, teacher)[0], *student))
    results = sum(s.nbytes for s in student)
    assert ours <= 1.05 * results + 20 * pieces.CPU_CHUNK * (dtype != torch.float32)
    assert ours - results <= (peak(plain) - results) / 2


def test_gradients_of_chunks():
    """Those of a chunk beside their sum, which autograd takes over: one in the end, two on the way."""
    head = FlowHead(12, 256, 12, 256, 2)
    held = sum(parameter.nbytes for parameter in head.parameters())
    images, noise = torch.randn(4, 3, 8, 8), torch.randn(4, 16, 12)
    condition, t = torch.randn(4, 16, 256), torch.rand(4, 16)

    def step():
        flow_matching_loss(head, condition, images, t, 2, noise, chunk_tokens=16).backward()
        head.zero_grad()

    assert peak(step) < 2.1 * held
    loss = flow_matching_loss(head, condition, images, t, 2, noise, chunk_tokens=16)
    summed = [gradient.data_ptr() for gradient in loss.grad_fn.saved_tensors[1:]]  # behind the number of tokens
    loss.backward()
    assert [parameter.grad.data_ptr() for parameter in head.parameters()] == summed
