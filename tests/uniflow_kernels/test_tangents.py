"""`FlowHead.jvp`, velocity and tangent in one pass, against torch.func.jvp of the head; and heads of two times."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from tests.conftest import randomize
from tests.live_bytes import LiveBytes
from uniflow_kernels import FlowHead

FORMS = {
    "the release's": {},
    "rms, swiglu, groups": {"norm": "rms", "mlp": "swiglu", "modulation_groups": 1, "hidden": 12},
    "scale first, no bias": {"modulation_order": "scale-shift-gate", "bias": False},
    "no last modulation": {"final_modulation": False},
    "two times": {"times": 2},
}


def make(dtype=torch.float64, rows=5, **options):
    torch.manual_seed(0)
    head = randomize(FlowHead(4, 8, 4, 6, 2, **options)).to(dtype)
    t = torch.rand(rows, 2) if options.get("times") == 2 else torch.rand(rows)
    x, dx = torch.randn(2, rows, 4, dtype=dtype)
    c, dc = torch.randn(2, rows, 6, dtype=dtype)
    return head, (x, t.double() if dtype == torch.float64 else t, c), (dx, torch.randn_like(t).to(t.dtype), dc)


def by_torch(head, values, directions):
    directions = tuple(torch.zeros_like(v) if d is None else d for v, d in zip(values, directions, strict=True))
    return torch.func.jvp(head, values, directions)


def gradients(head, made):
    loss = sum((part * torch.linspace(-1, 1, part.numel(), dtype=part.dtype).view_as(part)).sum() for part in made)
    return torch.autograd.grad(loss, list(head.parameters()), materialize_grads=True)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_derivative(form, rows):
    head, values, directions = make(rows=rows, **FORMS[form])
    directions = *(d.to(v.dtype) for d, v in zip(directions[:2], values[:2], strict=True)), directions[2]
    for along in (directions, (*directions[:2], None)):
        ours, exact = head.jvp(*values, *along), by_torch(head, values, along)
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradients(head, ours), gradients(head, exact), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ours[0], head(*values), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["the release's", "rms, swiglu, groups"])
def test_a_stopped_tangent_is_a_constant(form):
    head, values, directions = make(**FORMS[form])
    expected = head.jvp(*values, *directions)
    velocity, tangent = head.jvp(*values, *directions, stop_tangent=True)
    assert not tangent.requires_grad
    torch.testing.assert_close((velocity, tangent), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(head, [velocity]), gradients(head, [head(*values)]), rtol=1e-9, atol=1e-9)


def test_one_time_and_one_condition_for_all_rows():
    head, (x, _, c), (dx, _, dc) = make(times=2)
    t, dt = torch.tensor([0.2, 0.7], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    ours = head.jvp(x, t, c[:1], dx, dt, dc[:1])
    torch.testing.assert_close(ours, by_torch(head, (x, t, c[:1]), (dx, dt, dc[:1])), rtol=1e-9, atol=1e-9)
    one = make()[0]
    torch.testing.assert_close(
        one.jvp(x, 0.5, c, dx, 1.0), one.jvp(x, torch.full((5,), 0.5), c, dx, torch.ones(5)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["the release's", "rms, swiglu, groups"])
def test_precision(form, dtype, within_twice):
    """As near to float64 as torch.func.jvp in the same dtype, by the 2x rule."""
    head, values, directions = make(dtype, **FORMS[form])
    wide = [[v.double() for v in given] for given in (values, directions)]
    exact = by_torch(copy.deepcopy(head).double(), *map(tuple, wide))
    plain = by_torch(head, values, directions)
    for ours, theirs, reference in zip(head.jvp(*values, *directions), plain, exact, strict=True):
        assert ours.dtype == dtype
        within_twice(ours, theirs, reference)


def test_hooks_adapters_and_autocast_see_it():
    head, values, directions = make(torch.float32)
    expected, calls = head.jvp(*values, *directions), []
    hook = head.res_blocks[1].mlp[0].register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(head.jvp(*values, *directions), expected)
    hook.remove()
    assert calls == [1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head.jvp(*values, *directions)
    for ours, exact in zip(rounded, expected, strict=True):
        torch.testing.assert_close(ours.float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())
    head.res_blocks[0].mlp[0] = nn.Sequential(head.res_blocks[0].mlp[0])
    torch.testing.assert_close(head.jvp(*values, *directions), expected)


def test_it_compiles_whole():
    head, values, directions = make(torch.float32, times=2)
    compiled = torch.compile(head.jvp, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*values, *directions), head.jvp(*values, *directions))


def test_it_takes_less_memory_than_torch_func():
    head = randomize(FlowHead(16, 128, 16, 16, 4, times=2))
    x, dx, c = torch.randn(3, 64, 16)
    t, dt = torch.rand(2, 64, 2)

    def most(call):
        with LiveBytes() as live:
            kept = call()
        assert kept is not None
        return live.peak

    theirs = most(lambda: by_torch(head, (x, t, c), (dx, dt, None)))
    assert most(lambda: head.jvp(x, t, c, dx, dt)) < theirs
    assert most(lambda: head.jvp(x, t, c, dx, dt, stop_tangent=True)) < 0.8 * theirs


def test_two_times():
    head, (x, _, c), _ = make(torch.float32)
    two = head.for_intervals()
    assert "time_embed.1.mlp.2.weight" in two.state_dict()
    t = torch.rand(5, 1)
    torch.testing.assert_close(two(x, t.expand(-1, 2), c), head(x, t[:, 0], c))
    assert not torch.allclose(two(x, torch.cat([t, t + 400], 1), c), head(x, t[:, 0], c))
    assert two.for_intervals().times == 2
    new = FlowHead(4, 8, 4, 6, 2, times=2)
    new.load_state_dict(two.state_dict())
    torch.testing.assert_close(new(x, torch.tensor([0.1, 0.4]), c), two(x, torch.tensor([[0.1, 0.4]]).expand(5, 2), c))


@pytest.mark.parametrize("rows", [3, 300])  # with modulations made ahead, and without
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_samples_of_two_times(rows, cfg):
    """Each step goes where the head says that it ends."""
    head = randomize(FlowHead(4, 8, 4, 6, 2, times=2))
    noise, c = torch.randn(rows, 4), torch.randn(rows, 6)
    x, levels = noise, [0.0, 1 - 0.75**2, 1 - 0.5**2, 1 - 0.25**2, 1.0]
    with torch.no_grad():
        for begin, end in pairwise(levels):
            times = 1000 * torch.tensor([begin, end])
            velocity = head(x, times, c)
            if cfg != 1:
                velocity = torch.lerp(head(x, times, torch.zeros_like(c)), velocity, cfg)
            x = x + (end - begin) * velocity
        ours = head.sample(c, 4, noise=noise, schedule="pow_0.5", cfg=cfg)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "times: expected 1 or 2, got 3", lambda h, v, d: FlowHead(4, 8, 4, 6, 2, times=3)),
        (ValueError, r"t: expected shape \[2\] or \[5, 2\]", lambda h, v, d: h(v[0], v[1][:, 0], v[2])),
        (ValueError, "dx: expected shape", lambda h, v, d: h.jvp(*v, d[0][:1], d[1])),
        (ValueError, "dt: expected shape", lambda h, v, d: h.jvp(*v, d[0], d[1][:, :1])),
        (TypeError, "dc: expected torch.float32, got torch.float64", lambda h, v, d: h.jvp(*v, *d[:2], d[2].double())),
        (ValueError, "solver: expected euler", lambda h, v, d: h.sample(v[2], 2, solver="heun")),
    ],
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call(*make(torch.float32, times=2))


def test_eight_bits_have_no_derivative():
    head, values, directions = make(torch.float32, precision="fp8")
    with pytest.raises(ValueError, match="precision: fp8 has no derivatives"):
        head.jvp(*values, *directions)
