"""FlowHead.sample against the step-by-step form, in which nothing is shared."""

import copy
import pickle

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import randomize
from tests.live_bytes import LiveBytes
from tests.uniflow_kernels.test_flow_blocks import OPTIONS
from tests.uniflow_kernels.test_graphs import StandIn, stand_in
from uniflow_kernels import FlowHead, backend
from uniflow_kernels.modules import sampling
from uniflow_kernels.modules.flow_layers import FlowBlock
from uniflow_kernels.modules.sampling import Conditioned
from uniflow_kernels.solvers import SOLVERS, Plan, schedule_steps

__all__ = ["stand_in"]  # a fixture


def make_head(**options):
    return randomize(FlowHead(6, 32, 6, 20, 2, **options))


def step_by_step(head, noise, condition, steps, schedule="linear", solver="euler", cfg=1.0, null=None, scale=1000.0):
    """A time for every row, two full passes for guidance, the formulas of the solvers; all in the head's dtype."""

    def velocity(x, t):
        times = torch.full((len(x),), scale * t, device=x.device)
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


@torch.no_grad()
def test_a_head_that_changed_is_looked_at_again(graphs_on_cpu):
    """Without a hook in between it is looked at once; one on gradients, which nobody wants, changes nothing."""
    head, (noise, condition) = make_head(), inputs()
    asked, ask = [], head.why_not_captured
    head.why_not_captured = lambda: asked.append(1) or ask()
    head.res_blocks[0].register_full_backward_hook(lambda *_: None)
    for _ in range(3):
        head.sample(condition, 1, noise=noise)
    assert StandIn.captures == len(asked) == 1
    head.res_blocks[0].in_ln.eps = 1.0
    for _ in range(2):
        with pytest.warns(UserWarning, match="without a CUDA graph: a submodule was replaced"):
            changed = head.sample(condition, 1, noise=noise)
        assert torch.allclose(changed, step_by_step(head, noise, condition, 1), atol=1e-5)
    head.res_blocks[0].in_ln.eps = head.form.eps
    hook = head.res_blocks[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="without a CUDA graph: a submodule was replaced"):
        head.sample(condition, 1, noise=noise)
    hook.remove()
    for _ in range(2):
        head.sample(condition, 1, noise=noise)
    assert StandIn.captures == 2


# modulations of several steps at once


@pytest.fixture
def slabs(monkeypatch):
    """As few rows of modulations at a time as make every sampler here take several slabs, the last one not whole."""
    monkeypatch.setattr(sampling, "ROWS_AHEAD", 20)


@pytest.mark.parametrize(
    ("name", "variant"), [*(("eager", variant) for variant in OPTIONS), ("triton", "canonical"), ("triton", "SphereAR")]
)
@torch.no_grad()
def test_every_variant_in_slabs(within_twice, slabs, name, variant):
    """With two steps a slab if guided, four if not, and a null condition of one row or of all."""
    head = randomize(FlowHead(6, 32, 6, 20, 4, **OPTIONS[variant]))
    (noise, condition), null = inputs(), torch.randn(5, 20, generator=torch.Generator().manual_seed(3))
    guidances = (1.0, None), (2.0, null), (2.0, null[:1])
    for cfg, null_condition in guidances[2 * (name == "triton") :]:
        with backend(name):
            ours = head.sample(condition, 5, noise=noise, cfg=cfg, null_condition=null_condition)
        plain = step_by_step(head, noise, condition, 5, cfg=cfg, null=null_condition)
        doubles = (None if t is None else t.double() for t in (noise, condition, null_condition))
        noise64, condition64, null64 = doubles
        exact = step_by_step(copy.deepcopy(head).double(), noise64, condition64, 5, cfg=cfg, null=null64)
        within_twice(ours, plain, exact, floor=1e-5)


class Products(TorchDispatchMode):
    """Counts the rows that each weight is multiplied with, product by product."""

    def __init__(self, **weights):
        super().__init__()
        self.names = {weight.data_ptr(): name for name, weight in weights.items()}
        self.rows = {name: [] for name in weights}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for given in arguments if "mm" in str(function) else ():
            if isinstance(given, torch.Tensor) and given.data_ptr() in self.names:
                self.rows[self.names[given.data_ptr()]].append(out.shape[0])
        return out


@pytest.mark.parametrize(("null_rows", "rows_of_a_step"), [(None, 5), (1, 6), (5, 10)])
@torch.no_grad()
def test_weights_of_modulations_are_read_once_a_slab(monkeypatch, null_rows, rows_of_a_step):
    head, (noise, condition) = make_head(), inputs()
    guidance = {} if null_rows is None else {"cfg": 2.0, "null_condition": torch.randn(null_rows, 20)}
    per_step = 5 if null_rows is None else 10
    blocks, last = head.res_blocks, head.final_layer.adaLN_modulation[1]
    weights = {"first": blocks[0].adaLN_modulation[1], "second": blocks[1].adaLN_modulation[1], "last": last}

    def products():
        with Products(up=blocks[0].mlp[0].weight, **{name: m.weight for name, m in weights.items()}) as counted:
            head.sample(condition, 7, noise=noise, **guidance)
        return counted.rows

    rows = products()
    assert rows.pop("up") == [per_step] * 7
    assert set(rows) == set(weights)
    assert all(counted == [7 * rows_of_a_step] for counted in rows.values())
    monkeypatch.setattr(sampling, "ROWS_AHEAD", 3 * per_step)
    assert products()["first"] == [3 * rows_of_a_step, 3 * rows_of_a_step, rows_of_a_step]
    monkeypatch.setattr(sampling, "ROWS_AHEAD", 2 * per_step - 1)  # not two steps: nothing to gain
    assert sum(products()["first"]) == 7 * (5 + (null_rows or 0))


@torch.no_grad()
def test_memory_does_not_grow_with_the_steps(monkeypatch):
    head, (noise, condition) = make_head(), inputs(rows=16)

    def peak(steps):
        head.sample(condition, steps, noise=noise, cfg=2.0)
        with LiveBytes() as live:
            head.sample(condition, steps, noise=noise, cfg=2.0)
        return live.peak

    # 8 steps a slab: of both blocks and the last norm; while one is made and put in order, itself once more
    slab, times = 256 * (3 * 2 + 2) * 32 * 4, 60 * (32 + 256) * 4 * 4
    assert slab < peak(8) < 2 * slab
    assert peak(60) < peak(8) + times
    monkeypatch.setattr(sampling, "ROWS_AHEAD", 0)
    assert peak(8) < slab / 2


@torch.no_grad()
def test_guidance_of_some_steps(slabs, monkeypatch):
    head, (noise, condition) = make_head(), inputs()
    for null in (None, torch.randn(5, 20)):
        how = {"noise": noise, "cfg": 3.0, "cfg_interval": (0.3, 2.0), "null_condition": null, "solver": "heun"}
        guided = [Plan(9, cfg=3.0, cfg_interval=(0.3, 2.0)).guides_at(i / 9) for i in range(9)]
        assert 2 < sum(guided) < 7
        ours = head.sample(condition, 9, **how)
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "ROWS_AHEAD", 0)
            assert torch.allclose(ours, head.sample(condition, 9, **how), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_times_in_any_order_of_any_rows_with_and_without_gradients(slabs):
    """And of a head with twice the channels, as those that predict noise have."""
    head, times = randomize(FlowHead(6, 32, 12, 20, 2)), [float(t) for t in range(0, 90, 18)]
    x, condition, null = torch.randn(2, 2, 6), torch.randn(2, 2, 20), torch.randn(1, 20)
    conditioned = Conditioned(head, condition, times, null)
    assert conditioned.ahead is not None
    for t in (*times[::2], *times[::-1], 0.0):
        out, unguided = (head(x.view(4, 6), t, c.reshape(-1, 20)).view(2, 2, 12) for c in (condition, null))
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                alone, both = conditioned(x, t), conditioned.both(x, t)
            assert alone.requires_grad == gradients
            for ours, theirs in zip((alone, *both), (out, out, unguided), strict=True):
                assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    more = torch.randn(3, 2, 2, 6)
    assert torch.allclose(conditioned(more, 18.0)[1], conditioned(more[1], 18.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@pytest.mark.parametrize(
    "place",
    [
        *("input_proj", "res_blocks.0", "res_blocks.1.in_ln", "res_blocks.1.mlp", "res_blocks.0.mlp.0"),
        *("res_blocks.1.adaLN_modulation", "res_blocks.0.adaLN_modulation.0", "res_blocks.1.adaLN_modulation.1"),
        *("final_layer", "final_layer.norm_final", "final_layer.adaLN_modulation", "final_layer.linear"),
    ],
)
@torch.no_grad()
def test_a_hook_anywhere_counts_in_every_step(place, cfg):
    """And acts, guided or not: the modules run, each of them once a condition."""
    head, (noise, condition), calls = make_head(), inputs(), []
    plain = head.sample(condition, 4, noise=noise, cfg=cfg)
    head.get_submodule(place).register_forward_hook(lambda _, args, out: calls.append(place) or 1.5 * out)
    out = head.sample(condition, 4, noise=noise, cfg=cfg)
    assert len(calls) == (8 if cfg != 1.0 and place != "input_proj" else 4)
    assert torch.allclose(out, step_by_step(head, noise, condition, 4, cfg=cfg), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out, plain, rtol=1e-2)


@pytest.mark.parametrize("cfg", [1.0, 2.0])
@torch.no_grad()
def test_replaced_submodules_forwards_and_hooks_on_all_modules_count_in_every_step(cfg):
    noise, condition = inputs()
    plain = make_head().sample(condition, 4, noise=noise, cfg=cfg)

    def replace_an_mlp(head):
        head.res_blocks[1].mlp = torch.nn.Sequential(*head.res_blocks[1].mlp, torch.nn.Tanh())

    def replace_a_forward(head):
        block = head.res_blocks[0]
        block.forward = lambda x, *rest: 0.5 * type(block).forward(block, x, *rest)

    def hook_all(head):
        return register_module_forward_hook(lambda part, _, out: 2 * out if type(part) is FlowBlock else out)

    for change in (replace_an_mlp, replace_a_forward, hook_all):
        head = make_head()
        handle = change(head)
        try:
            out = head.sample(condition, 4, noise=noise, cfg=cfg)
            assert torch.allclose(out, step_by_step(head, noise, condition, 4, cfg=cfg), rtol=1e-4, atol=1e-4)
            assert not torch.allclose(out, plain, rtol=1e-2)
        finally:
            if handle is not None:
                handle.remove()


@torch.no_grad()
def test_autocast(within_twice):
    """Whose casts of the weights are made once, and again when a weight has changed."""
    head, (noise, condition) = make_head(), inputs()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            ours = head.sample(condition, 6, noise=noise, cfg=2.0)
            plain = step_by_step(head, noise, condition, 6, cfg=2.0)
        exact = step_by_step(copy.deepcopy(head).double(), noise.double(), condition.double(), 6, cfg=2.0)
        assert ours.dtype == torch.float32
        within_twice(ours, plain, exact)
        for parameter in head.res_blocks[0].parameters():
            parameter.mul_(1.5)


@torch.no_grad()
def test_mapped_over_noises_and_conditions():
    head, noise, condition = make_head(), torch.randn(3, 5, 6), torch.randn(3, 5, 20)
    mapped = torch.vmap(lambda n, c: head.sample(c, 4, noise=n, cfg=2.0))(noise, condition)
    assert torch.allclose(mapped, head.sample(condition, 4, noise=noise, cfg=2.0), rtol=1e-4, atol=1e-4)


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
