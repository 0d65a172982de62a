"""What `patch` leaves as it is, whom it leaves alone, and how it is undone."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import fully_shard

from tests.conftest import randomize
from tests.dropin.stand_ins import (
    COND,
    PROJECTS,
    TARGET,
    Canonical,
    FlowBlock,
    UniFlowNet,
    VibeVoiceHead,
    canonical_inputs,
    close,
    inside,
    rows,
    with_blocks,
)
from tests.dropin.test_heads import outputs_and_gradients
from uniflow_kernels import FlowHead, backend, cpu_kernels, patch, patched, unpatch
from uniflow_kernels.dropin import deferral, running

pytestmark = pytest.mark.usefixtures("served")
INPUTS = PROJECTS["MAR"].inputs


class Gelu(FlowBlock):
    def make_mlp(self, width, hidden):
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


@pytest.fixture
def head():
    return randomize(Canonical())


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


def test_a_report_has_one_line_for_each_kind_of_thing(head):
    names = [*(f"h{i}" for i in range(3)), *(f"g{i}" for i in range(12)), "own"]
    heads = [*(Canonical() for _ in range(3)), *(with_blocks(Gelu)() for _ in range(12)), FlowHead(4, 8, 4, 4, 1)]
    first, second, third = str(patch(nn.ModuleDict(dict(zip(reversed(names), reversed(heads), strict=True))))).split(
        "\n"
    )
    assert first.startswith("h2 ... h0 (3 modules): flow head (2 blocks of 16")
    assert second == "own: left alone: it is this package's own already"
    assert third.startswith("g11 ... g0 (12 modules): left alone: res_blocks.0.mlp: its activation is not SiLU")


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


@pytest.mark.parametrize("name", ["MAR", "SphereAR"])
def test_a_call_leaves_no_garbage(name):
    """Nothing of a call waits for the collector: rows and conditions are freed when it ends."""
    project = PROJECTS[name]
    head = randomize(project.make())
    patch(head, strict=True)
    while gc.collect():  # on torch 2.11 what a compilation leaves is found only after its graph is gone
        pass
    gc.disable()
    try:
        with torch.no_grad():
            head(*project.inputs)
        assert gc.collect() == 0
    finally:
        gc.enable()


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


def test_checkpointing_of_transformers_computes_blocks_again():
    """Switched on after patching, on the blocks, and in training alone."""
    layers = pytest.importorskip("transformers.modeling_layers")

    class Block(FlowBlock, layers.GradientCheckpointingLayer):
        def forward(self, x, y):
            return super().forward(x, y)

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: sizes.append(saved.numel()) or saved, lambda s: s):
            head(*INPUTS)
        return sum(sizes)

    head = randomize(with_blocks(Block)())
    patch(head, strict=True)
    everything = kept()
    for block in head.res_blocks:
        block.gradient_checkpointing = True
    assert kept() < everything / 2
    head.eval()
    assert kept() == everything


@pytest.mark.parametrize(
    ("times", "rows_embedded"),
    [
        (lambda c: (torch.full((300,), 3), c), [1, 300]),
        (lambda c: (torch.tensor(3.0).expand(300), c[:1].expand(300, -1)), [1, 1]),
        (lambda c: (torch.arange(300), c), [300, 300]),
        (lambda c: (torch.arange(300), c[:1].expand(300, -1)), [300, 300]),
    ],
    ids=["numbers", "strides", "neither", "condition alone"],
)
def test_what_rows_share_is_embedded_once(head, times, rows_embedded):
    x, _, c = canonical_inputs(torch.rand(300))
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


@pytest.mark.parametrize("name", ["MAR", "pocket-tts", "SphereAR"])
def test_compiles_whole(name):
    """By tensors, by modules, and with modulations that blocks share; what is unpickled first of all is compiled."""
    head, inputs = randomize(PROJECTS[name].make()), PROJECTS[name].inputs
    expected = head(*inputs)
    patch(head, strict=True)
    pickled = pickle.dumps(head)
    deferral._classes.clear()
    torch._dynamo.reset()
    head = pickle.loads(pickled)
    counter = CompileCounter()
    compiled = torch.compile(nn.Sequential(Calls(head)), fullgraph=True, backend=counter)
    close(compiled(inputs), expected)
    with torch.no_grad():
        head.input_proj.weight.mul_(2)
    close(compiled(inputs), head(*inputs))
    assert counter.frame_count == 1
    head.__class__ = type("FSDPHead", (type(head),), {})  # as wrapped by FSDP2, and never run before
    close(torch.compile(nn.Sequential(Calls(head)), fullgraph=True, backend=counter)(inputs), head(*inputs))


class Calls(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, inputs):
        return self.head(*inputs)


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
    assert "compile the patched model" in patch(head, strict=True).patched[""]
    assert "torch.compile" not in patch(plain).patched[""]
    close(head(*INPUTS), plain(*INPUTS))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_does_not_depend_on_what_rows_share(head):
    x, _, c = canonical_inputs(torch.rand(300))
    patch(head)
    with torch.no_grad():
        traced = torch.jit.trace(head, (x, torch.full((300,), 3.0), c))
        close(traced(x, torch.arange(300.0), c), head(x, torch.arange(300.0), c))


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


def test_layers_that_are_quantised_later_run(head):
    """Of a dynamic int8 layer `weight` is a method."""

    class Packed(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = [layer]

        def weight(self):
            return self.layer[0].weight

        def forward(self, h):
            return self.layer[0](h) + 1

    patch(head)
    for holder, name in ((head.res_blocks[0].mlp, "0"), (head.final_layer, "linear"), (head, "input_proj")):
        setattr(holder, name, Packed(getattr(holder, name)))
        close(head(*INPUTS), type(head).forward(head, *INPUTS))


# ---------------------------------------------------------------------------------------------------- where none serve


@pytest.mark.parametrize("name", ["MAR", "VibeVoice", "pocket-tts", "SphereAR"])
def test_where_no_kernel_serves_its_own_forward_runs(name, monkeypatch):
    """Bit for bit, with its own gradients, whatever the rows are asked for."""
    monkeypatch.undo()  # as on a CPU
    project = PROJECTS[name]
    head = randomize(project.make())
    expected = outputs_and_gradients(head, project.inputs, project.kwargs, torch.float32)
    patch(head, strict=True)
    monkeypatch.setattr(deferral, "run", None)
    found = outputs_and_gradients(head, project.inputs, project.kwargs, torch.float32)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    with backend("eager"):
        assert torch.equal(head(*project.inputs), expected["out"])
    with torch.autocast("cpu", torch.bfloat16):
        ours = head(*project.inputs)
        unpatch(head)
        assert torch.equal(ours, head(*project.inputs))


@pytest.mark.skipif(cpu_kernels.why_not_built() is not None, reason=str(cpu_kernels.why_not_built()))
@pytest.mark.parametrize("name", ["MAR", "NextStep-1", "Ming-UniVision", "VibeVoice", "pocket-tts", "SphereAR"])
def test_few_rows_without_gradients_are_a_call_of_the_cpu_part(name, monkeypatch, within_twice):
    """In their own numbers by the 2x rule; more rows, and calls with gradients, are the head's own forward."""
    monkeypatch.undo()  # as on a CPU
    project = PROJECTS[name]
    head = randomize(project.make())
    paths, run = [], running.run_flow_blocks

    def watched(*given, **options):
        paths.append(given[-1])
        return run(*given, **options)

    def called(module, inputs):
        with torch.no_grad():
            return module(*inputs, **project.kwargs)

    double = [x.double() if x.is_floating_point() else x for x in project.inputs]
    expected, exact = called(head, project.inputs), called(copy.deepcopy(head).double(), double)
    patch(head, strict=True)
    monkeypatch.setattr(running, "run_flow_blocks", watched)
    assert torch.equal(called(head, project.inputs), expected)  # these blocks are too small
    assert not paths
    monkeypatch.setattr(running, "WORTH_PUTTING_OFF", 0)
    within_twice(called(head, project.inputs), expected, exact, floor=1e-6)
    assert paths == ["few rows"]
    head(*project.inputs, **project.kwargs)
    many = [torch.cat([x] * 5) if x.ndim and len(x) == len(project.inputs[0]) else x for x in project.inputs]
    called(head, many)
    with backend("eager"):
        assert torch.equal(called(head, project.inputs), expected)
    assert len(paths) == 1


@pytest.mark.parametrize(("kernels_serve", "dynamic"), [(False, None), (True, None), (True, True)])
def test_a_graph_for_any_number_of_rows_is_the_one_of_the_original(kernels_serve, dynamic, head, monkeypatch):
    if not kernels_serve:
        monkeypatch.undo()
    graphs = []
    for patch_it in (False, True):
        if patch_it:
            patch(head, strict=True)
        torch._dynamo.reset()
        compiled = torch.compile(head, fullgraph=True, dynamic=dynamic, backend=(counter := CompileCounter()))
        for count in (5, 6, 70, 64, 130, 1024) if dynamic else (5, 6, 1, 70, 64, 1024):
            x, t, c = canonical_inputs(torch.rand(count))
            close(compiled(x, t, c), head(x, t, c))
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[0]
    assert graphs[1] == 1 or not dynamic
