import torch
from torch import nn

from benchmarks.measure import Trial, interleave, peak_bytes, quartiles, saved_bytes


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


def test_rivals_are_called_in_turn():
    order = []

    def sampler(label):
        def sample():
            order.append(label)
            return {("forward", "wall_ms"): 1.0}

        return sample

    found = interleave({"a": [sampler("a")], "b": [sampler("b")]}, seconds=0)
    assert order == ["a", "b"] * 5
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
