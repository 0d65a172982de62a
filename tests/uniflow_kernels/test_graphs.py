"""The cache of CUDA graphs, with a stand-in for the graph itself: copies of the inputs and a count of the captures."""

import gc
import threading
import warnings
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from uniflow_kernels import backend, graphs
from uniflow_kernels.graphs import GraphCache, Reader, why_not_graph


class StandIn:
    """Runs the function on buffers of its own, as a replay does."""

    captures = 0

    def __init__(self, function, inputs, place):
        StandIn.captures += 1
        self.function, self.running = function, False
        self.inputs = [None if given is None else given.clone() for given in inputs]

    def __call__(self, inputs):
        assert not self.running, "two replays at the same time"
        self.running = True
        for mine, given in zip(self.inputs, inputs, strict=True):
            if mine is not None:
                mine.copy_(given)
        out = self.function(*self.inputs).clone()
        self.running = False
        return out


class Nowhere:
    def wait(self):
        pass


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    StandIn.captures = 0
    monkeypatch.setattr(graphs, "Graph", StandIn)
    monkeypatch.setattr(graphs, "Place", Nowhere)


def double(x, y=None):
    return 2 * x if y is None else 2 * x + y


def test_the_second_of_a_kind_is_captured_and_the_third_replayed():
    cache, weight = GraphCache("double"), torch.ones(1)
    for i, (captured, calls) in enumerate([(0, 1), (1, 1), (1, 1)]):
        x = torch.full((3,), float(i))
        assert torch.equal(cache(double, (x, None), [weight], "how"), 2 * x)
        assert (StandIn.captures, len(cache)) == (captured, captured), calls


def test_kinds_are_told_apart():
    cache = GraphCache("double", limit=100)
    x, y = torch.ones(3), torch.ones(3)
    calls = [
        lambda: cache(double, (x, None), [], 1),
        lambda: cache(double, (x, None), [], 2),
        lambda: cache(double, (x, y), [], 1),
        lambda: cache(double, (x[:2], None), [], 1),
        lambda: cache(double, (x.double(), None), [], 1),
    ]
    for _ in range(3):
        for call in calls:
            call()
    assert len(cache) == len(calls)
    for _ in range(2):
        with backend("eager"):
            calls[0]()
    assert len(cache) == len(calls) + 1


def test_results_are_the_callers():
    cache = GraphCache("double")
    x = torch.ones(3)
    one, two, three = (cache(double, (x * i, None), [], 0) for i in range(3))
    three.zero_()
    assert torch.equal(two, torch.full((3,), 2.0))
    assert torch.equal(one, torch.zeros(3))


def test_the_cache_is_bounded_and_says_when_it_is_too_small():
    cache = GraphCache("double", limit=3)
    for _ in range(2):
        for n in (1, 2, 3):
            cache(double, (torch.ones(n), None), [], 0)
    assert len(cache) == 3
    with pytest.warns(UserWarning, match="double: more than 3 kinds of input take turns"):
        cache(double, (torch.ones(4), None), [], 0)
    assert len(cache) == 2
    # kinds that take turns beyond the limit are never captured in vain
    before = StandIn.captures
    cache.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(40):
            cache(double, (torch.ones(1 + i % 4), None), [], 0)
    assert StandIn.captures == before
    # the one used last stays
    cache.clear()
    for n in (1, 1, 2, 3, 1):
        cache(double, (torch.ones(n), None), [], 0)
    with pytest.warns(UserWarning, match="take turns"):
        cache(double, (torch.ones(4), None), [], 0)
    assert len(cache) == 1


def test_moved_parameters_drop_all_graphs_and_changed_ones_none():
    weight = torch.nn.Parameter(torch.ones(3))
    cache = GraphCache("times")

    def times(x):
        return x * weight

    x = torch.ones(3)
    with torch.no_grad():
        for _ in range(2):
            cache(times, (x,), [weight], 0)
        weight.fill_(5)
        assert torch.equal(cache(times, (x,), [weight], 0), torch.full((3,), 5.0))
        assert StandIn.captures == 1
        moved = torch.nn.Parameter(torch.full((3,), 7.0))
        cache(times, (x,), [moved], 0)
        assert len(cache) == 0
        half = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        for _ in range(2):
            cache(times, (x,), [half], 0)
        half.data = half.data.view(torch.float16)  # where it was, and no longer ones
        cache(times, (x,), [half], 0)
        assert len(cache) == 0


def test_what_cannot_be_captured_runs_and_says_so_once(monkeypatch):
    tries = []

    def refuse(*_):
        tries.append(1)
        raise RuntimeError("no capture today")

    monkeypatch.setattr(graphs, "Graph", refuse)
    cache, x = GraphCache("double"), torch.ones(3)
    cache(double, (x, None), [], 0)
    with pytest.warns(UserWarning, match="double: runs without a CUDA graph: no capture today"):
        assert torch.equal(cache(double, (x, None), [], 0), 2 * x)
    for _ in range(3):
        assert torch.equal(cache(double, (x, None), [], 0), 2 * x)
    assert len(tries) == 1


def test_threads_take_turns():
    cache, wrong = GraphCache("double"), []

    def work(seed):
        for i in range(50):
            x = torch.full((64,), float(seed * 1000 + i))
            if not torch.equal(cache(double, (x, None), [], 0), 2 * x):
                wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert StandIn.captures == 1


def test_why_not():
    cpu = torch.device("cpu")
    assert why_not_graph(cpu, []) == "it runs on CUDA, not on cpu"
    weight = torch.ones(1, requires_grad=True)
    assert "gradients are wanted" in why_not_graph(torch.device("cuda"), [None, weight])
    reasons = []
    torch.func.vmap(lambda x: (reasons.append(why_not_graph(cpu, [])), x)[1])(torch.ones(2))
    assert reasons == ["a transform of torch.func is at work"]


# --- what a function reads ---


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.unread = nn.Sequential(nn.Linear(4, 4), nn.SiLU()), nn.Linear(4, 4)
        self.norm, self.last = nn.LayerNorm(4), nn.Linear(4, 4, bias=False)
        self.last.register_buffer("shift", torch.ones(4))

    def run(self, x):
        return self.last(self.norm(self.first(x))) + self.last.shift


class Other(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def twice(net):
    return {name: 2 * value for name, value in net.state_dict().items()}


def set_forward(module, factor):
    module.forward = lambda x: factor * type(module).forward(module, x)


def set_parameters(module):
    module._parameters = {name: nn.Parameter(3 * p) if p is not None else p for name, p in module._parameters.items()}


def transposed(net):
    net.last.weight.data = (2 * net.last.weight.data).t().contiguous()


# in the order in which they come, each on top of those before
REPLACED = {
    "assigned values": lambda net: net.load_state_dict(twice(net), assign=True),
    "data": transposed,
    "dtype": lambda net: net.double(),
    "parameter": lambda net: setattr(net.last, "weight", nn.Parameter(2 * net.last.weight.data)),
    "parameter, beside the module": lambda net: net.last._parameters.update(weight=nn.Parameter(torch.eye(4).double())),
    "all parameters of a module": lambda net: set_parameters(net.last),
    "a parameter that was not there": lambda net: setattr(net.last, "bias", nn.Parameter(torch.ones(4).double())),
    "buffer": lambda net: setattr(net.last, "shift", torch.full((4,), 5.0).double()),
    "a buffer that was not there": lambda net: net.norm.register_buffer("late", torch.ones(1)),
    "activation": lambda net: net.first.__setitem__(1, nn.Tanh()),
    "activation, beside the module": lambda net: net.first._modules.update({"1": nn.ReLU()}),
    "one more": lambda net: net.first.append(nn.Linear(4, 4).double()),
    "one less": lambda net: net.first.__delitem__(2),
    "eps": lambda net: setattr(net.norm, "eps", 1.0),
    "forward": lambda net: set_forward(net.last, 2),
    "another forward": lambda net: set_forward(net.last, 3),
    "no forward": lambda net: net.last.__delattr__("forward"),
    "class": lambda net: setattr(net.last, "__class__", Other),
}


@pytest.mark.usefixtures("stand_in")
def test_nothing_that_was_replaced_or_moved_is_replayed(monkeypatch):
    """Change upon change, with a graph that has the tensors and modules of its capture, as a real one has."""

    def seen(net):
        modules = [module for name, module in net.named_modules() if name != "unread"]
        tensors = [t for module in modules for t in (*module.parameters(False), *module.buffers(False))]
        how = [(type(m), m.__dict__.get("forward"), m.__dict__.get("eps"), id(m)) for m in modules]
        return how, [(t.data_ptr(), t.dtype) for t in tensors], modules

    class Frozen(StandIn):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.seen = seen(net)

        def __call__(self, inputs):
            assert seen(net) == self.seen, "what it was captured with is no more"
            return super().__call__(inputs)

    monkeypatch.setattr(graphs, "Graph", Frozen)
    net, cache, reader = Net(), GraphCache("net"), Reader(skipped=("unread",))

    def call():
        read = reader(net)
        assert not read.hooked
        x = torch.arange(8.0, dtype=net.last.weight.dtype).view(2, 4)
        assert torch.equal(cache(net.run, (x,), read.tensors, 0, read.structure), net.run(x)), change
        return read

    with torch.no_grad():
        for captures, (change, make) in enumerate({"": lambda net: None, **REPLACED}.items(), start=1):
            make(net)
            for _ in range(4):
                call()
            assert StandIn.captures == captures, change
        # what is read in place needs no other graph, nor what is not read
        before = call().structure
        net.load_state_dict(twice(net))
        net.last.weight.data.mul_(2)
        net.unread.double().register_forward_hook(print)
        assert call().structure is before
        assert StandIn.captures == captures


@pytest.mark.parametrize(
    "hook",
    [
        lambda net: net.first[1].register_forward_hook(print).remove,
        lambda net: net.register_forward_pre_hook(print).remove,
        lambda net: net.norm._forward_hooks.update({1: print}) or net.norm._forward_hooks.clear,
        lambda net: setattr(net.norm, "_forward_hooks", OrderedDict({1: print})) or net.norm._forward_hooks.clear,
        lambda net: register_module_forward_hook(lambda *_: None).remove,
    ],
)
def test_hooks_are_seen_when_they_come_and_go(hook):
    net, reader = Net(), Reader()
    for _ in range(2):
        assert not reader(net).hooked
        remove = hook(net)
        assert reader(net).hooked
        remove()
    assert not reader(net).hooked


def test_a_module_that_moves_to_the_next_one_is_seen():
    linear, reader = nn.Linear(4, 4), Reader()
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), linear), nn.Sequential(nn.Linear(4, 4)))
    before = reader(net).structure
    net[0].pop(1)
    net[1].insert(0, linear)
    assert reader(net).structure is not before


def test_modules_are_walked_through_once_and_the_first_is_not_held(monkeypatch):
    net, reader = Net(), Reader()
    first = reader(net)

    def fail(*_, **__):
        raise AssertionError("walked through again")

    with monkeypatch.context() as patch:
        for name in ("named_modules", "named_children", "named_parameters", "named_buffers"):
            patch.setattr(nn.Module, name, fail)
        patch.setattr(Reader, "_walked", fail)
        again = reader(net)
    assert again.structure is first.structure
    assert [id(tensor) for tensor in again.tensors] == [id(tensor) for tensor in first.tensors]
    assert {id(t) for t in first.tensors} == {id(t) for t in (*net.parameters(), *net.buffers())}
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
