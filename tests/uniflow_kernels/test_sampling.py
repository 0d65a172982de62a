"""FlowHead.sample against the step-by-step form, in which nothing is shared."""

import copy
import pickle

import pytest
import torch

from tests.conftest import randomize
from tests.uniflow_kernels.test_graphs import StandIn, stand_in
from uniflow_kernels import FlowHead
from uniflow_kernels.modules import sampling
from uniflow_kernels.solvers import SOLVERS, Plan, schedule_steps

__all__ = ["stand_in"]  # a fixture


def make_head(**options):
    return randomize(FlowHead(6, 32, 6, 20, 2, **options))


def step_by_step(head, noise, condition, steps, schedule="linear", solver="euler", cfg=1.0, null=None, scale=1000.0):
    """A time for every row, two full passes for guidance, the formulas of the solvers; all in the head's dtype."""

    def velocity(x, t):
        times = torch.full((len(x),), scale * t)
        v = head(x, times, condition)
        if cfg != 1.0:
            unguided = head(x, times, torch.zeros_like(condition) if null is None else null.expand_as(condition))
            v = unguided + cfg * (v - unguided)
        return v

    x = noise.to(condition.dtype)
    for t, dt in schedule_steps(steps, schedule):
        v = velocity(x, t)
        if solver == "heun":
            v = (v + velocity(x + dt * v, t + dt)) / 2
        if solver == "midpoint":
            v = velocity(x + dt / 2 * v, t + dt / 2)
        x = x + dt * v
    return x


def inputs(dtype=torch.float32, rows=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 20, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("schedule", "cfg"), [("linear", 1.0), ("shifted_3", 2.0)])
@torch.no_grad()
def test_same_as_step_by_step(within_twice, dtype, solver, schedule, cfg):
    head = make_head().to(dtype)
    noise, condition = inputs(dtype)
    noise = noise.to(dtype).float()
    how = {"schedule": schedule, "solver": solver, "cfg": cfg}
    ours = head.sample(condition, 7, noise=noise, **how)
    assert ours.dtype == dtype
    plain = step_by_step(head, noise, condition, 7, **how)
    exact = step_by_step(head.double(), noise.double(), condition.double(), 7, **how)
    within_twice(ours, plain, exact, floor=1e-5)


@pytest.mark.parametrize("null_rows", [1, 5])
@torch.no_grad()
def test_null_condition_interval_temperature_and_time_scale(null_rows):
    head = make_head()
    (noise, condition), null = inputs(), torch.randn(null_rows, 20)
    out = head.sample(condition, 4, noise=noise, cfg=3.0, null_condition=null, temperature=0.5, time_scale=1.0)
    expected = step_by_step(head, 0.5 * noise, condition, 4, cfg=3.0, null=null, scale=1.0)
    assert torch.allclose(out, expected, atol=1e-4)
    never = head.sample(condition, 4, noise=noise, cfg=3.0, cfg_interval=(0.0, 0.01))
    assert torch.equal(never, head.sample(condition, 4, noise=noise))


def test_any_leading_dimensions_and_no_rows():
    head, condition = make_head(), torch.randn(2, 3, 20)
    noise = torch.randn(2, 3, 6)
    out = head.sample(condition, 2, noise=noise)
    assert torch.allclose(
        out.flatten(0, 1), head.sample(condition.flatten(0, 1), 2, noise=noise.flatten(0, 1)), atol=1e-5
    )
    assert head.sample(condition[:0], 2).shape == (0, 3, 6)


def test_noise_is_drawn_from_the_generator():
    head, (_, condition) = make_head(), inputs()
    one, two, other = (head.sample(condition, 2, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    noise = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(head.sample(condition, 2, noise=noise), one)


def test_times_and_condition_are_embedded_once():
    head, (noise, condition) = make_head(), inputs()
    calls = []
    for module in (head.time_embed, head.cond_embed):
        module.register_forward_pre_hook(lambda module, args: calls.append((type(module).__name__, args[0].shape)))
    head.sample(condition, 9, noise=noise, solver="heun")
    times = len(Plan(9, solver="heun").times())
    assert times < 12  # a step ends where the next one begins, but for a rounding here and there
    assert calls == [("Linear", (5, 20)), ("TimestepEmbedding", (times,))]


def test_gradients_reach_weights_condition_and_noise():
    head, (noise, condition) = make_head().double(), (x.double().requires_grad_() for x in inputs())
    sampled = head.sample(condition, 3, noise=noise, solver="midpoint", cfg=2.0)
    plain = step_by_step(head, noise, condition, 3, solver="midpoint", cfg=2.0)
    wanted = [noise, condition, *head.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(out.sum(), wanted) for out in (sampled, plain)), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_compiles_whole():
    head, (noise, condition) = make_head(), inputs()
    compiled = torch.compile(head.sample, fullgraph=True, backend="eager")
    out = compiled(condition, 2, noise=noise, cfg=2.0)
    assert torch.allclose(out, head.sample(condition, 2, noise=noise, cfg=2.0), atol=1e-5)


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    monkeypatch.setattr(sampling, "why_not_graph", lambda device, read: None)
    monkeypatch.setattr(sampling, "_GRAPHS", type(sampling._GRAPHS)())


@torch.no_grad()
def test_replays_equal_the_first_call_and_see_new_weights(graphs_on_cpu):
    head, (noise, condition) = make_head(), inputs()
    first, *others = (head.sample(condition, 4, noise=noise, cfg=2.0) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)
    assert StandIn.captures == 1
    assert torch.equal(
        head.sample(2 * condition, 4, noise=noise, cfg=2.0), make_head().sample(2 * condition, 4, noise=noise, cfg=2.0)
    )
    head.final_layer.linear.weight.mul_(3)
    assert not torch.allclose(head.sample(condition, 4, noise=noise, cfg=2.0), first)
    head.sample(condition, 5, noise=noise)
    assert len(sampling._GRAPHS[head]) == 1


@torch.no_grad()
def test_heads_with_graphs_are_copied_and_pickled(graphs_on_cpu):
    head, (noise, condition) = make_head(), inputs()
    for _ in range(3):
        expected = head.sample(condition, 4, noise=noise)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other.sample(condition, 4, noise=noise), expected)


@torch.no_grad()
def test_hooks_keep_their_calls_and_a_warning_says_so(graphs_on_cpu):
    head, (noise, condition) = make_head(), inputs()
    calls = []
    head.res_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        with pytest.warns(UserWarning, match="without a CUDA graph: a submodule was replaced, wrapped or given a hook"):
            head.sample(condition, 4, noise=noise)
    assert len(calls) == 12
    assert StandIn.captures == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, c: h.sample(c[:, :7], 2), r"condition: expected shape \[..., 20\], got \(5, 7\)"),
        (lambda h, c: h.sample(c, 0), "steps: expected at least 1"),
        (lambda h, c: h.sample(c, 2, solver="rk4"), "solver: expected one of"),
        (lambda h, c: h.sample(c, 2, schedule="cosine"), "schedule: expected"),
        (lambda h, c: h.sample(c, 2, noise=torch.zeros(4, 6)), r"noise: expected shape \(5, 6\), got \(4, 6\)"),
        (lambda h, c: h.sample(c, 2, cfg=2.0, null_condition=c[:2]), r"null_condition: expected shape \(1, 20\) or"),
        (lambda h, c: FlowHead(6, 32, 12, 20, 1).sample(c, 2), "out_channels: a velocity has those of x, 6, not 12"),
    ],
)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(make_head(), torch.randn(5, 20))
