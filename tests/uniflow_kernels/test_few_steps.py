"""Mean flow and self-distillation: where the mean velocity is known, against their definitions, and in chunks."""

import copy

import pytest
import torch
from torch import nn

from tests.conftest import derivative_error, randomize
from uniflow.flow import sample_intervals
from uniflow_kernels import FlowHead, mean_flow_loss, self_distillation_loss

LOSSES = [mean_flow_loss, self_distillation_loss]
SCALE = 1000.0


class Known(nn.Module):
    """The mean velocity to a condition in which all paths end: (c - x) / (1 - s), wherever a step ends."""

    def forward(self, x, t, c):
        return (c - x) / (1 - t[:, :1] / SCALE)


def batch(*rows, dtype=torch.float64, channels=4, z=6):
    torch.manual_seed(1)
    data, noise = torch.randn(2, *rows, channels, dtype=dtype)
    return torch.randn(*rows, z, dtype=dtype), data, sample_intervals(rows, 0.5).to(dtype), noise


def make(dtype=torch.float64, **options):
    return randomize(FlowHead(4, 8, 4, 6, 2, times=2, **options)).to(dtype)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_mean_velocity_itself_has_no_loss(loss):
    _, data, times, noise = batch(64, z=4)
    times = 0.9 * times
    assert loss(Known(), data, data, times, noise, power=0.0) < 1e-20
    late = lambda x, t, c: Known()(x, t, c) * (1 + (t[:, 1:] - t[:, :1]) / SCALE)  # noqa: E731 - right at equal times
    module = nn.Module()
    module.forward = late
    assert loss(module, data, data, times, noise, power=0.0) > 1e-3
    assert loss(module, data, data, times[:, :1].expand(-1, 2), noise, power=0.0) < 1e-20


def by_definition(loss, head, c, data, times, noise, cfg, null, power):
    begin, end = times[:, :1], times[:, 1:]
    x, velocity = torch.lerp(noise, data, begin), data - noise
    if cfg != 1:
        away = head(x, SCALE * begin.expand(-1, 2), null.expand_as(c)).detach()
        velocity = away + cfg * (velocity - away)
    if loss is mean_flow_loss:
        u, along = torch.func.jvp(
            lambda x, s: head(x, SCALE * torch.cat([s, end], 1), c), (x, begin), (velocity, torch.ones_like(begin))
        )
        error = u - (velocity + (end - begin) * along).detach()
    else:
        moved, slope = torch.func.jvp(
            lambda e: x + (e - begin) * head(x, SCALE * torch.cat([begin, e], 1), c), (end,), (torch.ones_like(end),)
        )
        target = head(moved.detach(), SCALE * end.expand(-1, 2), c).detach()
        error = slope - torch.where(begin == end, velocity, target)
    error = error.square().mean(1)
    return (error / (error.detach() + 1e-3) ** power).mean()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("cfg", "power"), [(1.0, 0.0), (2.5, 1.0)])
def test_numbers_and_gradients(loss, cfg, power):
    head, (c, data, times, noise) = make(), batch(12)
    null = torch.randn(1, 6, dtype=torch.float64)
    leaves = [c.requires_grad_(), *head.parameters()]
    ours = loss(head, c, data, times, noise, cfg=cfg, null_condition=null, power=power)
    exact = by_definition(loss, head, c, data, times, noise, cfg, null, power)
    torch.testing.assert_close(ours, exact.float())
    for found, expected in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(exact, leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    each = torch.full((12,), cfg, dtype=torch.float64)
    assert torch.equal(loss(head, c, data, times, noise, cfg=each, null_condition=null, power=power), ours)


def test_gradients_of_self_distillation_go_through_the_tangent():
    """Against finite differences, with the target held: not through `torch.func` as above."""
    head, (c, data, times, noise) = make(), batch(6)
    frozen, begin, end = copy.deepcopy(head), times[:, :1], times[:, 1:]
    x = torch.lerp(noise, data, begin)
    u = frozen(x, SCALE * times, c).detach()
    target = frozen(x + (end - begin) * u, SCALE * end.expand(-1, 2), c).detach()
    target = torch.where(begin == end, data - noise, target)
    dt = SCALE * torch.tensor([0.0, 1.0], dtype=torch.float64).expand_as(times)

    def error():
        u, along = head.jvp(x, SCALE * times, c, None, dt)
        return (u + (end - begin) * along - target).square().mean()

    leaves = list(head.parameters())
    ours = torch.autograd.grad(self_distillation_loss(head, c, data, times, noise), leaves)
    for found, expected in zip(ours, torch.autograd.grad(error(), leaves), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert derivative_error(error, leaves) < 1e-6


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("autocast", [False, True])
def test_chunks_are_the_whole(loss, autocast):
    head, (c, data, times, noise) = make(torch.float32), batch(3, 7, dtype=torch.float32)
    mask, cfg = torch.rand(3, 7) < 0.8, torch.where(torch.rand(3, 7) < 0.5, 1.0, 2.0)
    leaves = [c.requires_grad_(), *head.parameters()]

    def made(chunk_rows):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(head, c, data, times, noise, cfg=cfg, mask=mask, chunk_rows=chunk_rows)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    for ours, whole in zip(made(4), made(None), strict=True):
        assert ours.dtype == whole.dtype
        tolerance = 0.05 if autocast else 1e-5
        torch.testing.assert_close(ours, whole, rtol=tolerance, atol=tolerance * whole.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(loss(head, c, data, times, noise, chunk_rows=4), loss(head, c, data, times, noise))
    # rows that do not count may hold anything
    noise[~mask] = torch.nan
    assert made(4)[0].isfinite()


@pytest.mark.parametrize("loss", LOSSES)
def test_other_heads(loss):
    """A module of two times that is no FlowHead, by torch.func."""
    head, (c, data, times, noise) = make(torch.float32), batch(8, dtype=torch.float32)
    expected = loss(head, c, data, times, noise)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = head

        def forward(self, x, t, c):
            return self.inside(x, t, c)

    torch.testing.assert_close(loss(Wrapped(), c, data, times, noise), expected)
    torch.testing.assert_close(loss(Wrapped(), c, data, times, noise, chunk_rows=3), expected)


def test_it_compiles_whole():
    head, given = randomize(FlowHead(4, 8, 4, 6, 1, times=2)), batch(8, dtype=torch.float32)
    compiled = torch.compile(lambda *given: mean_flow_loss(head, *given), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), mean_flow_loss(head, *given))


def test_intervals():
    torch.manual_seed(0)
    times = sample_intervals((4000,), 0.75)
    begin, end = times.unbind(-1)
    assert times.shape == (4000, 2)
    assert (begin <= end).all()
    assert times.min() >= 0
    assert times.max() <= 1
    assert (begin == end).float().mean() == pytest.approx(0.75, abs=0.03)
    with pytest.raises(ValueError, match=r"share_equal: expected a number in \[0, 1\], got 2"):
        sample_intervals((1,), 2)


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (TypeError, "data: expected a floating point dtype", {"data": torch.ones(6, 4, dtype=torch.int64)}),
        (ValueError, r"condition: expected shape \(6, 'Z'\)", {"condition": torch.ones(5, 6)}),
        (ValueError, r"noise: expected the shape of data, \(6, 4\)", {"noise": torch.ones(6, 3)}),
        (ValueError, r"times: expected shape \(2,\) or \(6, 2\)", {"times": torch.ones(6)}),
        (ValueError, r"mask: expected shape \(6,\)", {"mask": torch.ones(5, dtype=torch.bool)}),
        (ValueError, r"cfg: expected shape \(6,\)", {"cfg": torch.ones(5)}),
        (ValueError, r"null_condition: expected shape \(1, 6\)", {"null_condition": torch.ones(6)}),
        (ValueError, "chunk_rows: expected at least 1", {"chunk_rows": 0}),
        (ValueError, "head: expected one of two times", {"head": FlowHead(4, 8, 4, 6, 2)}),
    ],
)
def test_errors(error, match, change):
    c, data, times, noise = batch(6, dtype=torch.float32)
    given = {"head": make(torch.float32), "condition": c, "data": data, "times": times, "noise": noise, **change}
    with pytest.raises(error, match=match):
        mean_flow_loss(**given)
