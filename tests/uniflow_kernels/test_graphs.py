"""The cache of CUDA graphs, with a stand-in for the graph itself: copies of the inputs and a count of the captures."""

import threading
import warnings

import pytest
import torch

from uniflow_kernels import backend, graphs
from uniflow_kernels.graphs import GraphCache, why_not_graph


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
