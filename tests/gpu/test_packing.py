"""What is derived from parameters under CUDA graphs and on other streams."""

import pytest
import torch
from torch import nn

from uniflow_kernels.packing import forget, packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture
def layer():
    forget()
    return nn.Linear(64, 64, device="cuda")


def doubled(layer):
    return packed("double", (layer.weight,), lambda weight: 2 * weight)


def change(layer):
    with torch.no_grad():
        layer.weight.add_(1)


def test_a_captured_graph_sees_later_changes(layer):
    doubled(layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = doubled(layer)
    change(layer)
    graph.replay()
    assert torch.equal(captured, 2 * layer.weight)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_step_is_seen(layer, optimizer):
    layer(torch.randn(5, 64, device="cuda")).square().sum().backward()
    doubled(layer)
    optimizer(layer.parameters(), lr=0.1, fused=True).step()
    assert torch.equal(doubled(layer), 2 * layer.weight)


def test_only_on_the_default_stream(layer):
    kept = doubled(layer)
    assert doubled(layer) is kept
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert doubled(layer) is not kept
    torch.cuda.current_stream().wait_stream(side)
    assert doubled(layer) is kept


def test_cuda_graphs_of_torch_compile(layer):
    def function(x):
        return nn.functional.linear(x, doubled(layer))

    compiled = torch.compile(function, mode="reduce-overhead")
    x = torch.randn(8, 64, device="cuda")
    for _ in range(4):
        torch.testing.assert_close(compiled(x).clone(), function(x), rtol=1e-4, atol=1e-4)
        change(layer)


def test_nothing_waits_for_the_device(layer):
    doubled(layer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        doubled(layer)
        change(layer)
        doubled(layer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
