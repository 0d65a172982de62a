import contextlib
import types

import pytest
import torch
from torch import nn

from benchmarks.measure import GpuTimer, Trial, interleave, peak_bytes, quartiles, rotation, saved_bytes


def test_quartiles():
    assert quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == {"q1": 2.0, "median": 3.0, "q3": 4.0, "samples": 5}
    assert quartiles([7.0]) == {"q1": 7.0, "median": 7.0, "q3": 7.0, "samples": 1}


def test_saved_bytes_count_each_storage_once_and_no_parameter():
    layer = nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)

    def form(layer, x):
        h = layer(x)  # keeps x, and the weight, which is a parameter
        return h * h.exp()  # keeps h and exp(h), the latter twice

    assert saved_bytes(Trial(form, (layer, x))) == 3 * x.nbytes


def test_a_view_counts_its_whole_storage():
    x = torch.randn(100, 8, requires_grad=True)
    assert saved_bytes(Trial(lambda x: x[:2].square(), (x,))) == x.nbytes


def test_rivals_are_called_in_turn_and_each_is_first_in_its_turn():
    order = []

    def sampler(label):
        def sample():
            order.append(label)
            return {("forward", "wall_ms"): 1.0}

        return sample

    found = interleave({"a": [sampler("a")], "b": [sampler("b")]}, seconds=0)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b", "b", "a"]
    assert found["a"]["forward"]["wall_ms"]["samples"] == 5


def test_peak_bytes_see_a_large_temporary():
    def call():
        torch.ones(64 * 2**20, dtype=torch.uint8).sum()

    peak = peak_bytes(call)
    assert peak is None or peak >= 60 * 2**20


def test_a_problem_without_gradients_has_one_pass():
    trial = Trial(torch.square, (torch.ones(3),))
    assert set(trial.passes()) == {"forward"}
    assert set(trial.wall()) == {("forward", "wall_ms")}


class FakeEvent:
    """A clock that moves by what the fake graphs say they take."""

    now = 0.0

    def __init__(self, enable_timing):
        self.time = None

    def record(self):
        self.time = FakeEvent.now

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.time - self.time


@pytest.fixture
def fake_cuda(monkeypatch):
    """Python's side of CUDA graphs and events: a replay takes 10 ms for every graph captured before it, and 10 more."""
    graphs = []

    class FakeGraph:
        def __init__(self):
            graphs.append(self)
            self.milliseconds = 10.0 * len(graphs)

        def replay(self):
            FakeEvent.now += self.milliseconds

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(L2_cache_size=1000))


@pytest.mark.usefixtures("fake_cuda")
def test_gpu_time_is_that_of_one_call_of_a_rotation():
    x = torch.randn(125, requires_grad=True)  # 500 bytes: six copies sweep a cache of 1000 bytes three times
    timer = GpuTimer(rotation(torch.square, (x,), call_ms=0.1), pool=None)
    assert len(timer.trials) == 6
    assert len({trial.inputs[0].data_ptr() for trial in timer.trials}) == 6
    assert timer.why_no_graph is None
    # graphs 1, 2, 3: forward without gradients, forward with, backward
    expected = {"forward": 10 / 6, "backward": 30 / 6, "both": 50 / 6}
    assert timer() == {(name, "gpu_ms"): pytest.approx(value) for name, value in expected.items()}


@pytest.mark.usefixtures("fake_cuda")
def test_a_long_call_is_not_rotated():
    x = torch.randn(125)
    assert len(rotation(torch.square, (x,), call_ms=30.0)) == 1


@pytest.mark.usefixtures("fake_cuda")
def test_a_form_that_cannot_be_captured_is_timed_as_it_is(monkeypatch):
    def refuse(graph, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    calls = []

    def form(x):
        calls.append(x)
        return x.square()

    timer = GpuTimer([Trial(form, (torch.randn(3, requires_grad=True),))], pool=None)
    assert "not permitted" in str(timer.why_no_graph)
    before = len(calls)
    assert set(timer()) == {("forward", "gpu_ms"), ("backward", "gpu_ms"), ("both", "gpu_ms")}
    assert len(calls) == before + 2
