"""What `patch` leaves as it is, whom it leaves alone, and how it is undone."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import sys
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from tests.conftest import randomize
from tests.dropin.stand_ins import (
    COND,
    PROJECTS,
    TARGET,
    WIDTH,
    Canonical,
    DeCoNet,
    FlowBlock,
    JvpLayerNorm,
    Last,
    UniFlowNet,
    VibeVoiceHead,
    canonical_inputs,
    inside,
    rows,
)
from uniflow_kernels import FlowHead, backend, patch, patched, unpatch
from uniflow_kernels.dropin import probe

INPUTS = PROJECTS["MAR"].inputs


@pytest.fixture
def head():
    return randomize(Canonical())


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- look-alikes


class ScaledFirst(FlowBlock):
    """The gate lies first."""

    def forward(self, x, y):
        gate, shift, scale = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class NormLast(FlowBlock):
    """The norm comes after the MLP."""

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * (self.in_ln(self.mlp(x)) * (1 + scale) + shift)


class FurtherTerm(FlowBlock):
    def forward(self, x, y):
        return super().forward(x, y) + 0.01 * y


class Temperature(FlowBlock):
    """As in EAR: another formula in eval mode."""

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        shift = shift if self.training else 0.7 * shift
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class Gelu(FlowBlock):
    def make_mlp(self, width, hidden):
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class UnknownNorm(FlowBlock):
    make_norm = nn.BatchNorm1d


class OtherCondition(Canonical):
    def forward(self, x, t, c):
        return self.run(x, self.time_embed(t) * self.cond_embed(c))


class UsesPosition(DeCoNet):
    def forward(self, x, t, c, pos=None):
        return super().forward(x, t, c if pos is None else c + pos)


def with_blocks(kind):
    return type("LooksAlike", (Canonical,), {"make_block": kind})


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (with_blocks(ScaledFirst), "something else"),
        (with_blocks(NormLast), "something else"),
        (with_blocks(FurtherTerm), "something else"),
        (with_blocks(Temperature), "something else"),
        (with_blocks(Gelu), "activation"),
        (with_blocks(UnknownNorm), "neither a layer norm nor an rms norm"),
        (OtherCondition, "something else"),
    ],
    ids=["order", "norm after", "a term", "eval only", "GELU", "batch norm", "condition"],
)
@pytest.mark.parametrize("fresh", [True, False], ids=["zero gates", "random"])
def test_a_look_alike_is_left_alone(make, why, fresh):
    head = make()
    if fresh:  # as such heads are initialised: their output is zero whatever they compute
        for layer in (*(block.adaLN_modulation[1] for block in head.res_blocks), head.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    state = {name: value.clone() for name, value in head.state_dict().items()}
    report = patch(head)
    assert report.patched == {}
    assert why in report.left_alone[""]
    assert "forward" not in vars(head)
    assert all(torch.equal(value, state[name]) for name, value in head.state_dict().items())


def test_shapes_that_are_none_of_the_family():
    head = Canonical()
    head.res_blocks[1].adaLN_modulation[1] = nn.Linear(WIDTH, 2 * WIDTH)
    assert "modulation" in patch(head).left_alone[""]
    head = Canonical()
    head.cond_embed = nn.Linear(COND, WIDTH + 1)
    assert "cond_embed" in patch(head).left_alone[""]
    head = Canonical()
    del head.res_blocks[0].in_ln
    assert "no norm" in patch(head).left_alone[""]
    assert patch(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))).left_alone == {}


def test_an_argument_that_changes_the_result_keeps_the_own_forward():
    head = randomize(UsesPosition())
    inputs, pos = canonical_inputs(torch.rand(5)), rows(5, COND, seed=7)
    before = head(*inputs), head(*inputs, pos)
    patch(head, strict=True)
    close(head(*inputs), before[0])
    assert torch.equal(head(*inputs, pos), before[1])


class Cached(Canonical):
    """An argument whose value selects another path; `looks` is how it looks at it."""

    looks = staticmethod(lambda mode: mode == "cached")

    def forward(self, x, t, c, mode):
        y = self.time_embed(t) + self.cond_embed(c)
        return self.run(x, 1.2 * y if self.looks(mode) else y)


class CachedIfAsked(Cached):
    def forward(self, x, t, c, mode="plain"):
        return super().forward(x, t, c, mode)


LOOKS = {
    "comparison": (lambda mode: mode == "cached", "cached"),
    "order": (lambda mode: not isinstance(mode, str) and mode < 3, 2),
    "truth": (lambda mode: not mode, 0),
    "hash": (lambda mode: {"cached": True}.get(mode, False), "cached"),
    "arithmetic": (lambda mode: mode != "plain" and (mode + 1) % 2 == 0, 3),
    "formatting": (lambda mode: f"{mode}" == "cached", "cached"),
    "printing": (lambda mode: "cached" in repr(mode), "cached"),
    "attribute": (lambda mode: hasattr(mode, "startswith") and mode.startswith("c"), "cached"),
    "class": (lambda mode: isinstance(mode, int), 5),
    "length": (lambda mode: len(mode) == 6, "cached"),
    "call": (lambda mode: mode is not None and not isinstance(mode, str) and mode(), lambda: True),
    "identity": (lambda mode: mode is True, True),
}


@pytest.mark.parametrize("how", LOOKS)
def test_an_argument_whose_value_is_looked_at_is_not_unused(how):
    looks, value = LOOKS[how]
    required = randomize(type("Own", (Cached,), {"looks": staticmethod(looks)})())
    assert "its forward looks at mode" in patch(required).left_alone[""]
    optional = randomize(type("Own", (CachedIfAsked,), {"looks": staticmethod(looks)})())
    before = optional(*INPUTS), optional(*INPUTS, value)
    assert not torch.allclose(*before)
    patch(optional, strict=True)
    close(optional(*INPUTS), before[0])
    assert torch.equal(optional(*INPUTS, value), before[1])
    assert torch.equal(optional(*INPUTS, mode=value), before[1])


def test_none_stands_for_a_default_only_where_it_is_the_default():
    class OffByNone(Canonical):
        def forward(self, x, t, c, scale=1.0):
            y = self.time_embed(t) + self.cond_embed(c)
            return self.run(x, 0 * y if scale is None else scale * y)

    head = randomize(OffByNone())
    expected = head(*INPUTS, None)
    patch(head, strict=True)
    assert torch.equal(head(*INPUTS, None), expected)


def test_meta_and_foreign_parameters():
    assert "meta" in patch(Canonical().to("meta")).left_alone[""]
    head = Canonical()
    head.cond_embed.weight = nn.Parameter(torch.zeros(WIDTH, COND, dtype=torch.int8), requires_grad=False)
    assert "quantizing" in patch(head).left_alone[""]


# ------------------------------------------------------------------------------------------- what callers rely on


def test_two_heads_of_different_kinds(head):
    model = nn.ModuleDict({"a": head, "b": VibeVoiceHead(), "c": FlowHead(4, 8, 4, 4, 1), "d": with_blocks(Gelu)()})
    report = patch(model)
    assert set(report.patched) == {"a", "b"}
    assert set(report.left_alone) == {"c", "d"}
    assert "own already" in report.left_alone["c"]
    assert "silu" in report.patched["a"]
    assert "swiglu" in report.patched["b"]
    assert "d: left alone: " in str(report)


def test_twice_is_once_and_unpatch_restores(head):
    before = dict(vars(head))
    first = patch(head)
    forward = head.forward
    assert patch(head) == first
    assert head.forward is forward
    unpatch(head)
    unpatch(head)
    assert vars(head) == before


def test_context(head):
    with patched(head) as report:
        assert "forward" in vars(head)
        assert list(report.patched) == [""]
    assert "forward" not in vars(head)
    patch(head)
    with patched(head):
        pass
    assert "forward" in vars(head)
    with pytest.raises(RuntimeError, match="mine"), patched(UniFlowNet()) as report:
        raise RuntimeError("mine")


def test_only_and_strict(head):
    model = nn.ModuleDict({"a": head, "b": UniFlowNet()})
    assert list(patch(model, only="b").patched) == ["b"]
    assert list(patch(model, only=["a*"]).patched) == ["a"]
    with pytest.raises(ValueError, match="only: no module of the model is called 'z'"):
        patch(model, only="z")
    with pytest.raises(ValueError, match="nothing to patch"):
        patch(nn.Linear(2, 2), strict=True)
    with pytest.raises(ValueError, match="activation is not SiLU"):
        patch(with_blocks(Gelu)(), strict=True)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        patch("model")


def test_copies_and_pickles(head):
    patch(head)
    expected = head(*INPUTS)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), copy.deepcopy(inside("a.b", head)).a.b):
        assert other.forward is not head.forward
        assert torch.equal(other(*INPUTS), expected)
        with torch.no_grad():
            other.input_proj.weight.zero_()  # it runs on its own weights
        assert not torch.equal(other(*INPUTS), expected)
    assert torch.equal(head(*INPUTS), expected)


def test_a_deleted_model_is_freed_at_once(head):
    patch(head)
    gc.disable()
    try:
        there, forward = weakref.ref(head), head.forward
        model = [head]
        del head
        assert there() is not None
        model.clear()
    finally:
        gc.enable()
    if there() is None:  # pytest holds fixtures
        with pytest.raises(ReferenceError, match="deleted"):
            forward(*INPUTS)


def test_what_callers_touch(head):
    before = head.forward_with_cfg(*INPUTS_FOR_GUIDANCE, 2.0)
    signature = inspect.signature(head.forward)
    patch(head)
    close(head.forward_with_cfg(*INPUTS_FOR_GUIDANCE, 2.0), before)
    assert inspect.signature(head.forward) == signature
    assert head.input_proj.weight.dtype == torch.float32
    nn.init.zeros_(head.final_layer.adaLN_modulation[-1].weight)
    nn.init.zeros_(head.final_layer.linear.weight)
    nn.init.zeros_(head.final_layer.linear.bias)
    assert not head(*INPUTS).any()
    with pytest.raises(TypeError, match="argument"):
        head(*INPUTS, 1, 2)
    close(head(x=INPUTS[0], c=INPUTS[2], t=INPUTS[1]), head(*INPUTS))


INPUTS_FOR_GUIDANCE = (rows(6, TARGET), torch.arange(6), rows(6, COND, seed=3))


@pytest.mark.parametrize("name", ["MAR", "SphereAR"])
def test_checkpointing_flag(name):
    project = PROJECTS[name]
    head = randomize(project.make())
    patch(head)
    gradients = []
    for recomputes in (False, True):
        head.grad_checkpointing = recomputes
        out = head(*(value.clone().requires_grad_(value.is_floating_point()) for value in project.inputs))
        gradients.append(torch.autograd.grad(out.square().sum(), list(head.parameters())))
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_checkpointing_computes_blocks_again(head):
    patch(head)
    block, calls = head.res_blocks[0], []
    for part in (block.mlp, block.adaLN_modulation[1]):
        part.register_forward_hook(lambda part, *_: calls.append(type(part)))
    for head.grad_checkpointing in (False, True):
        calls.clear()
        head(*INPUTS).sum().backward()
        assert sorted(map(calls.count, set(calls))) == [1 + head.grad_checkpointing] * 2


@pytest.mark.parametrize(
    ("times", "rows_embedded"),
    [
        (lambda c: (torch.full((70,), 3), c), [1, 70]),
        (lambda c: (torch.tensor(3.0).expand(70), c[:1].expand(70, -1)), [1, 1]),
        (lambda c: (torch.arange(70), c), [70, 70]),
        (lambda c: (torch.arange(70), c[:1].expand(70, -1)), [70, 70]),
    ],
    ids=["numbers", "strides", "neither", "condition alone"],
)
def test_what_rows_share_is_embedded_once(head, times, rows_embedded):
    x, _, c = canonical_inputs(torch.rand(70))
    t, c = times(c)
    expected = head(x, t, c)
    patch(head)
    embedded = []
    for part in (head.time_embed, head.cond_embed):
        part.register_forward_hook(lambda *args: embedded.append(len(args[2])))
    close(head(x, t, c), expected)
    assert embedded == rows_embedded


def test_gradient_of_a_shared_time_and_condition(head):
    x, _, c = canonical_inputs(torch.rand(8))
    found = []
    for patch_it in (False, True):
        t, condition = torch.tensor(3.0, requires_grad=True), c[:1].clone().requires_grad_()
        if patch_it:
            patch(head)
        head(x, t.expand(8), condition.expand(8, -1)).square().sum().backward()
        found.append((t.grad, condition.grad))
    for ours, theirs in zip(*reversed(found), strict=True):
        close(ours, theirs)


def test_autocast(head):
    expected = [head(*INPUTS)]
    with torch.autocast("cpu", torch.bfloat16):
        expected.append(head(*INPUTS))
        patch(head)
        ours = head(*INPUTS)
    assert ours.dtype == expected[1].dtype == torch.bfloat16
    assert (ours - expected[0]).abs().max() <= 2 * (expected[1] - expected[0]).abs().max()


def test_compiles_whole(head):
    patch(head)
    inputs = canonical_inputs(torch.rand(5))
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    close(compiled(*inputs), head(*inputs))
    close(torch.compile(inside("a", head), fullgraph=True, backend="eager").a(*inputs), head(*inputs))


def test_a_forward_that_is_compiled_by_a_decorator():
    """As SphereAR and NextStep-1 have it: nothing is compiled to look at it."""

    def compiles(graph, inputs):
        raise AssertionError("it was compiled")

    class Compiled(FlowBlock):
        @torch.compile(backend=compiles)
        def forward(self, x, y):
            return super().forward(x, y)

    class CompiledToo(Canonical):
        make_block = Compiled

        @torch.compile(backend=compiles)
        def forward(self, x, t, c):
            return super().forward(x, t, c)

    head = randomize(CompiledToo())
    plain = Canonical()
    plain.load_state_dict(head.state_dict())
    patch(head, strict=True)
    close(head(*INPUTS), plain(*INPUTS))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_does_not_depend_on_what_rows_share(head):
    x, _, c = canonical_inputs(torch.rand(70))
    patch(head)
    with torch.no_grad():
        traced = torch.jit.trace(head, (x, torch.full((70,), 3.0), c))
        close(traced(x, torch.arange(70.0), c), head(x, torch.arange(70.0), c))


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", ["DDP", "FSDP2", "FSDP2 of every block"])
def test_data_parallel(head, wrap):
    x, t, c = INPUTS
    expected = head(x, t, c)
    gradient = torch.autograd.grad(expected.square().sum(), head.input_proj.weight)[0]
    patch(head, strict=True)
    if wrap == "DDP":
        model = nn.parallel.DistributedDataParallel(head)
    else:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for block in head.res_blocks if "block" in wrap else ():
            fully_shard(block, mesh=mesh)
        model = fully_shard(head, mesh=mesh)
    out = model(x, t, c)
    close(out, expected)
    out.square().sum().backward()
    found = head.input_proj.weight.grad
    close(found.full_tensor() if hasattr(found, "full_tensor") else found, gradient)


def test_wrappers(head):
    """FSDP2 changes a module's class, functional_call its parameters."""
    expected = head(*INPUTS)
    patch(head)
    doubled = {name: 2 * value for name, value in head.named_parameters()}
    ours = torch.func.functional_call(head, doubled, INPUTS)
    unpatch(head)
    close(ours, torch.func.functional_call(head, doubled, INPUTS))
    patch(head)
    head.__class__ = type("FSDPCanonical", (Canonical,), {})
    close(head(*INPUTS), expected)
    block = head.res_blocks[0]
    block.__class__ = type("FSDPFlowBlock", (FlowBlock,), {"forward": lambda self, x, y: x})
    unwrapped = head(*INPUTS)
    unpatch(head)
    assert torch.equal(unwrapped, head(*INPUTS))


# ------------------------------------------------------------------------------- other threads, and what all share


def state_of_the_process():
    """What other threads would see change."""
    return (
        torch.get_float32_matmul_precision(),
        torch.get_rng_state().sum().item(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        list(warnings.filters),
        nn.modules.module._has_any_global_hook(),
        is_in_torch_dispatch_mode(),
    )


def seen_by_another_thread():
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(state_of_the_process).result()


@pytest.mark.parametrize("make", [Canonical, lambda: inside("layer", NaiveAttention())], ids=["head", "attention"])
def test_patching_only_reads_the_model_and_sets_nothing(make):
    model, before, seen = randomize(make()), seen_by_another_thread(), []
    state = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}

    class Watches(nn.Linear):
        def forward(self, x):
            assert seen_by_another_thread() == before
            assert all(part.training for part in model.modules())
            for name, tensor in model.state_dict(keep_vars=True).items():
                assert tensor is state[name][0]
                assert torch.equal(tensor, state[name][1])
            seen.append(self)
            return super().forward(x)

    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.__class__ = Watches
    patch(model, strict=True)
    assert seen
    assert set(seen).isdisjoint(model.modules())


def test_threads():
    """Two that patch one model; one that patches and unpatches while another runs the head."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            for seed in range(5):
                head, start, done = randomize(Canonical(depth=4), seed), threading.Barrier(2), threading.Event()
                state, expected = {name: value.clone() for name, value in head.state_dict().items()}, head(*INPUTS)

                def patches(head=head, start=start):
                    start.wait()
                    return patch(head)

                def runs(head=head, start=start, done=done):
                    start.wait()
                    found = [head(*INPUTS)]
                    while not done.is_set():
                        found.append(head(*INPUTS))
                    return found

                one, two = (pool.submit(patches) for _ in range(2))
                assert list(one.result().patched) == list(two.result().patched) == [""]
                running = pool.submit(runs)
                start.wait()
                for _ in range(2):
                    unpatch(head)
                    patch(head)
                done.set()
                for found in running.result():
                    close(found, expected)
                for name, value in head.state_dict(keep_vars=True).items():
                    assert isinstance(value, nn.Parameter)
                    assert torch.equal(value, state[name])
    finally:
        sys.setswitchinterval(interval)


def test_what_a_forward_changes_is_not_changed_by_looking_at_it():
    class Remembers(Canonical):
        def __init__(self):
            super().__init__()
            self.calls, self.log, self.latest = 0, [], {"x": []}
            self.last = torch.zeros(())
            self.register_buffer("total", torch.zeros(()))
            self.model = [self, nn.Linear(2, 2)]
            self.embed, self.project = self.both, functools.partial(self.input_proj)

        def both(self, t, c):
            return self.time_embed(t) + self.cond_embed(c)

        def forward(self, x, t, c):
            assert self.model[0] is self
            assert self.latest["x"] is not self.log
            self.calls += 1
            self.log.append(x)
            self.latest["x"].append(x)
            self.last.add_(1)
            self.total += 1
            y, x = self.embed(t, c), self.project(x)
            for block in self.res_blocks:
                x = block(x, y)
            return self.final_layer(x, y)

    head = randomize(Remembers())
    patch(head, strict=True)
    assert (head.calls, head.log, head.latest, head.last.item(), head.total.item()) == (0, [], {"x": []}, 0, 0)


def test_a_forward_that_draws_random_numbers_is_left_alone():
    class Draws(FlowBlock):
        def forward(self, x, y):
            torch.rand(1)
            return super().forward(x, y)

    head, seed = with_blocks(Draws)(), torch.get_rng_state()
    assert "it draws random numbers" in patch(head).left_alone[""]
    assert torch.equal(torch.get_rng_state(), seed)


def test_a_probe_holds_one_block_of_memory():
    head = Canonical(depth=5)
    with probe.Probe(head) as probed:
        matrices = [p for p in probed.module.parameters() if p.ndim > 1]
        assert len(matrices) == len([p for p in head.parameters() if p.ndim > 1])
        assert len({p.untyped_storage().data_ptr() for p in matrices}) == 1
        assert matrices[0].untyped_storage().nbytes() < 2 * 4 * max(map(torch.numel, matrices))


def test_where_products_are_rounded(head):
    """As by TF32: a switch that all threads share, and that is therefore left where it is."""

    class Rounds(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in (F.linear, torch.Tensor.matmul) and out.dtype == torch.float32:
                self.calls += 1
                out *= 1 + 1e-3 * (-1) ** self.calls
            return out

    with Rounds():
        patch(head, strict=True)


# ------------------------------------------------------------------------------------------------------------- hooks


def inner(head):
    block = head.res_blocks[1]
    return [block, block.adaLN_modulation, block.adaLN_modulation[0], block.in_ln, block.mlp[1], head.final_layer]


@pytest.mark.parametrize("which", range(6))
def test_a_hook_inside_fires(head, which):
    patch(head)
    calls = []
    part = inner(head)[which]
    handle = part.register_forward_hook(lambda *_: calls.append(1))
    head(*INPUTS)
    assert calls == [1]
    handle.remove()
    part.forward = lambda *args: calls.append(2) or type(part).forward(part, *args)
    head(*INPUTS)
    assert calls == [1, 2]


def test_a_hook_that_is_there_already(head):
    calls = []
    head.res_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    assert "res_blocks.0: a hook inside must fire" in patch(head).left_alone[""]
    assert calls == []
    other = randomize(Canonical())
    other.register_forward_hook(lambda *_: calls.append(1))
    patch(other, strict=True)
    assert calls == []
    other(*INPUTS)
    assert calls == [1]
    mended = Canonical()
    mended.forward = lambda *_: None
    assert "replaced on the instance" in patch(mended).left_alone[""]


def test_hooks_on_all_modules(head):
    patch(head)
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        head(*INPUTS)
        assert head.res_blocks[0] in calls
        assert "a hook on all modules" in patch(Canonical()).left_alone[""]
    finally:
        handle.remove()


def test_an_adapter_put_in_later_works(head):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, h):
            return self.base(h) + 1

    patch(head)
    head.res_blocks[0].mlp[0] = Adapter(head.res_blocks[0].mlp[0])
    ours = head(*INPUTS)
    with backend("triton"), pytest.raises(ValueError, match="replaced, wrapped or given a hook"):
        head(*INPUTS)
    unpatch(head)
    close(ours, head(*INPUTS))


def test_kernels_that_cannot_serve():
    class Weighted(Last):
        make_norm = JvpLayerNorm

    head = randomize(type("Own", (Canonical,), {"make_last": Weighted})())
    expected = head(*INPUTS)
    assert "plain only: its last norm has a weight" in patch(head).patched[""]
    close(head(*INPUTS), expected)
    with backend("triton"), pytest.raises(ValueError, match="its last norm has a weight"):
        head(*INPUTS)


def test_dropout_inside():
    class Drops(FlowBlock):
        def make_mlp(self, width, hidden):
            return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width), nn.Dropout(0.5))

    head = randomize(with_blocks(Drops)())
    torch.manual_seed(3)
    expected = head(*INPUTS)
    assert "dropout inside" in patch(head).patched[""]
    assert head.res_blocks[0].mlp[3].p == 0.5
    torch.manual_seed(3)
    close(head(*INPUTS), expected)


# --------------------------------------------------------------------------------------------------------- attention


class NaiveAttention(nn.Module):
    """timm's and InternViT's attention as they write it without a fused kernel."""

    def __init__(self, width=32, heads=4, norm=None, dropout=0.0):
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop, self.proj_drop = nn.Dropout(dropout), nn.Dropout(0.0)
        if norm:
            self.q_norm, self.k_norm = (nn.LayerNorm(width if norm == "all" else width // heads) for _ in range(2))
        self.norm = norm

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        if self.norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        scores = scores if mask is None else scores + mask
        out = self.attn_drop(scores.softmax(-1)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class FusedAttention(NaiveAttention):
    def forward(self, x):
        q, k, v = (p.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CausalAttention(NaiveAttention):
    def forward(self, x):
        return super().forward(x, torch.full((x.shape[1],) * 2, float("-inf")).triu(1))


class EncoderLayer(nn.Module):
    """InternViT's and UniFlow's: LayerScale on both branches."""

    def __init__(self, width=32):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = NaiveAttention(width, norm="all")
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.ls1, self.ls2 = (nn.Parameter(torch.full((width,), 0.1)) for _ in range(2))

    def forward(self, x):
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


@pytest.mark.parametrize("norm", [None, "head", "all"])
def test_attention(norm, within_twice):
    layer = randomize(NaiveAttention(norm=norm))
    x = rows(2, 9, 32)

    def run(layer, x):
        x = x.clone().requires_grad_()
        out = layer(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]

    exact, before = run(copy.deepcopy(layer).double(), x.double()), run(layer, x)
    report = patch(layer)
    assert "attention of 4 heads" in report.patched[""]
    for results in zip(run(layer, x), before, exact, strict=True):
        within_twice(*results, floor=2e-6)


def test_attention_inside_an_encoder_layer():
    model = nn.ModuleList(randomize(EncoderLayer()) for _ in range(2))
    x = rows(2, 9, 32)
    expected = model[0](x)
    report = patch(model)
    assert set(report.patched) == {"0.attn", "1.attn"}
    close(model[0](x), expected)


def test_attention_that_is_left_alone():
    model = nn.ModuleDict({"fused": FusedAttention(), "causal": CausalAttention()})
    report = patch(model)
    assert report.patched == {}
    assert "nothing to gain" in report.left_alone["fused"]
    assert "a mask" in report.left_alone["causal"]


def test_attention_keeps_its_own_forward_where_scores_are_wanted():
    layer, x, mask = randomize(NaiveAttention(dropout=0.5)), rows(2, 9, 32), rows(9, 9)
    torch.manual_seed(1)
    dropped, masked = layer(x), layer.eval()(x, mask)
    patch(layer, strict=True)
    assert torch.equal(layer(x, mask), masked)
    torch.manual_seed(1)
    assert torch.equal(layer.train()(x), dropped)
    scores = []
    layer.eval().attn_drop.register_forward_hook(lambda *args: scores.append(args[2]))
    layer(x)
    assert scores[0].shape == (2, 4, 9, 9)
