"""What the fused flow head launches and keeps, counted: numbers that hold on any machine."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import randomize
from uniflow_kernels import FlowHead, backend
from uniflow_kernels.ops.flow_head import _flow_blocks

DEPTH, WIDTH, ROWS = 12, 16, 8
NO_LAUNCH = (
    "view",
    "detach",
    "empty",
    "split",
    "chunk",
    "slice",
    "select",
    "unbind",
    "alias",
    "expand",
    "transpose",
    "aten.t.",
)


class Launches(TorchDispatchMode):
    """Counts PyTorch's operations that work on elements, those inside the fused op too."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = str(function)
        if name == "uniflow_kernels.flow_blocks.default":
            with self:
                return _flow_blocks(*arguments, **(keywords or {}))
        if not any(part in name for part in NO_LAUNCH):
            self.names.append(name)
        return function(*arguments, **(keywords or {}))


@pytest.fixture
def launched(monkeypatch):
    """Names of the Triton kernels launched; they do nothing, so that the interpreter's operations are not counted."""
    from uniflow_kernels.triton_kernels import flow_head as kernels

    names = []

    def norm_modulate(*_):
        names.append("norm_modulate")

    def activation(p, hidden):
        names.append("activation")
        return p.new_empty(p.shape[0], hidden)

    monkeypatch.setattr(kernels, "norm_modulate", norm_modulate)
    monkeypatch.setattr(kernels, "activation", activation)
    return names


def make(**options):
    head = randomize(FlowHead(WIDTH, WIDTH, WIDTH, WIDTH, DEPTH, **options))
    x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    return head, x, y.requires_grad_()


def test_launches_of_the_forward_pass(launched):
    """Modulation, norm, W1, activation, W2 a block; input, SiLU(y), last modulation and norm, output."""
    head, x, y = make()
    with torch.no_grad():
        with Launches() as plain:
            head.from_embedding(x, y)
        assert not launched
        with backend("triton"), Launches() as fused:
            head.from_embedding(x, y)
    assert launched.count("norm_modulate") == DEPTH + 1
    assert launched.count("activation") == DEPTH
    products = [name for name in fused.names if "mm" in name or "linear" in name]
    assert len(products) == 3 * DEPTH + 3
    assert len(fused.names) + len(launched) == 5 * DEPTH + 5
    assert len(plain.names) == 8 * DEPTH + 7


@pytest.mark.parametrize(("recompute", "widths"), [("none", 6), ("gate", 4), ("block", 1)])
def test_saved_bytes(recompute, widths):
    """A row and block keep 6, 4 or 1 times the width, and the head x, SiLU(y) and the last modulation besides."""
    head, x, y = make(recompute=recompute)
    weights = {p.untyped_storage().data_ptr() for p in head.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with backend("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = head.from_embedding(x, y)
    row = ROWS * WIDTH * 4
    # input_proj's x, its result, y, SiLU(y), what the last product was given; the last modulation if it is kept
    besides = 5 + (0 if recompute == "block" else 2)
    assert sum(storages.values()) == (widths * DEPTH + besides) * row
    assert out.requires_grad
