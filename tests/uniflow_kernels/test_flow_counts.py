"""What the fused flow head launches and keeps, counted: numbers that hold on any machine."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import randomize
from uniflow_kernels import FlowHead, backend, fused_flow_blocks
from uniflow_kernels.modules import sampling
from uniflow_kernels.ops.flow_choice import KERNELS
from uniflow_kernels.ops.flow_head import _flow_blocks, _flow_blocks_backward, _modulated_flow_blocks
from uniflow_kernels.triton_kernels import activation, flow_products, products
from uniflow_kernels.triton_kernels import flow_head as row_kernels

DEPTH, WIDTH, ROWS = 12, 16, 8
NO_LAUNCH = (
    "view",
    "aten.reshape",
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
    "unsqueeze",
    "aten.t.",
)


FUSED = {
    "uniflow_kernels.flow_blocks.default": _flow_blocks,
    "uniflow_kernels.flow_blocks_backward.default": _flow_blocks_backward,
    "uniflow_kernels.modulated_flow_blocks.default": _modulated_flow_blocks,
}


class Launches(TorchDispatchMode):
    """Counts PyTorch's operations that work on elements, those inside the fused op too."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = str(function)
        if name in FUSED:
            with self:
                return FUSED[name](*arguments, **(keywords or {}))
        if not any(part in name for part in NO_LAUNCH):
            self.names.append(name)
        return function(*arguments, **(keywords or {}))


@pytest.fixture
def launched(monkeypatch):
    """Triton kernels launched, with their arguments; they do nothing, or the interpreter's operations would count."""
    launches = []

    def replace(kernels, name, result=lambda **arguments: None):
        def launch(*positional, **arguments):
            launches.append((name, [*positional, *arguments.values()]))
            return result(*positional, **arguments)

        monkeypatch.setattr(kernels, name, launch)

    replace(row_kernels, "norm_modulate")
    replace(activation, "activation", lambda p, hidden: p.new_empty(p.shape[0], hidden))
    replace(products, "moments", lambda x, rms: None)
    for name in ("modulated", "up", "down"):
        replace(flow_products, name)
    return launches


def make(**options):
    head = randomize(FlowHead(WIDTH, WIDTH, WIDTH, WIDTH, DEPTH, **options))
    x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    return head, x, y.requires_grad_()


def on(path, head, x, y):
    """`head.from_embedding` with its blocks on one path."""
    x = fused_flow_blocks(head.input_proj(x), y, *head.tensors(), recompute=head.recompute, path=path)
    return head.final_layer.linear(x)


def products_of(names):
    return [name for name in names if "mm" in name or "linear" in name]


def test_launches_of_the_forward_pass_by_rows(launched):
    """Modulation, norm, W1, activation, W2 a block; input, SiLU(y), last modulation and norm, output."""
    head, x, y = make()
    with torch.no_grad():
        with Launches() as plain:
            head.from_embedding(x, y)
        assert not launched
        with backend("triton"), Launches() as fused:
            head.from_embedding(x, y)
    names = [name for name, _ in launched]
    assert names.count("norm_modulate") == DEPTH + 1
    assert names.count("activation") == DEPTH
    assert len(products_of(fused.names)) == 3 * DEPTH + 3
    assert len(fused.names) + len(launched) == 5 * DEPTH + 5
    assert len(plain.names) == 8 * DEPTH + 7


def test_launches_of_the_forward_pass_by_products(launched):
    """Three a block; input, SiLU(y), the first moments, the last norm, output: 41. No modulation is ever written."""
    head, x, y = make()
    with torch.no_grad(), backend("triton"), Launches() as fused:
        on("products", head, x, y)
    names = [name for name, _ in launched]
    assert names == ["moments", *("modulated", "up", "down") * DEPTH, "modulated"]
    assert len(products_of(fused.names)) == 2  # input and output
    assert len(fused.names) + len(launched) == 3 * DEPTH + 5 == 41
    given = [t for _, arguments in launched for t in arguments if isinstance(t, torch.Tensor) and t.shape[0] == ROWS]
    assert all(tensor.shape[1] == tensor.stride(0) == WIDTH for tensor in given)
    # x, SiLU(y), h, u, the sum and the output: inference allocates no more, whatever the depth
    assert len({tensor.data_ptr() for tensor in given}) == 6


@pytest.mark.parametrize(("path", "more"), [("rows", 0), ("products", 1)])
def test_training_launches_no_more_in_its_forward_pass(launched, path, more):
    """But zeros where the products write no last shift."""
    head, x, y = make()
    counts = []
    for gradients in (False, True):
        launched.clear()
        with torch.set_grad_enabled(gradients), backend("triton"), Launches() as fused:
            on(path, head, x, y)
        counts.append(len(fused.names) + len(launched))
    assert counts[1] - counts[0] == more


@pytest.mark.parametrize(("path", "products"), [("rows", 6), ("products", 5)])
def test_launches_of_the_backward_pass(launched, monkeypatch, path, products):
    """Two kernels a block, and products alone: vectors' gradients of all blocks are summed and copied at once."""

    def through_norm(dh, dsum, x, residual, sums, **others):
        _, total = sums.of_launch(3, (6, WIDTH), x.device)
        return torch.empty_like(x), None if residual is None else torch.empty_like(x), total.unsqueeze(0)

    def through_activation(du, p, sums):
        return torch.empty_like(p), torch.empty_like(p), sums.of_launch(3, p.shape[1:], p.device)[1]

    def counting(kernels, name, result):
        monkeypatch.setattr(kernels, name, lambda *given, **named: launched.append(name) or result(*given, **named))

    counting(row_kernels, "norm_modulate_backward", through_norm)
    counting(activation, "activation_backward", through_activation)
    counting(flow_products, "down_backward", lambda dq, weight, p, small, sums: through_activation(dq, p, sums))
    head, x, y = make()
    with backend("triton"):
        out = on(path, head, x, y)
        launched.clear()
        with Launches() as fused:
            torch.autograd.grad(out.sum(), [y, *head.parameters()], allow_unused=True)
    assert len(launched) == 2 * DEPTH + 1
    inside = 5  # the last modulation's two products, two sums, the copies
    outside = 8  # the sum and its gradient, input and output, SiLU
    assert len(fused.names) == products * DEPTH + inside + outside


def test_launches_of_a_sampler(launched, monkeypatch):
    """Four a block and step; the modulations once for two steps, the embeddings once for all."""
    monkeypatch.setattr(sampling, "ROWS_AHEAD", 2 * ROWS)
    head, noise, condition = make()
    with torch.no_grad(), backend("triton"), Launches() as fused:
        head.sample(condition, 5, noise=noise)
    names = [name for name, _ in launched]
    assert names.count("norm_modulate") == 5 * (DEPTH + 1)
    assert names.count("activation") == 5 * DEPTH
    modulations, blocks = 3 * (DEPTH + 1), 5 * 2 * DEPTH
    others = 1 + 2 + 5 * 2  # the condition, the times, input and output of each step
    assert len(products_of(fused.names)) == modulations + blocks + others


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize(("recompute", "widths"), [("none", 6), ("block", 1)])
def test_saved_bytes(launched, recompute, widths, path):
    """A row and block keep 6 times the width or once, and the head x, SiLU(y) and the last modulation besides."""
    head, x, y = make(recompute=recompute)
    weights = {p.untyped_storage().data_ptr() for p in head.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with backend("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = on(path, head, x, y)
    row = ROWS * WIDTH * 4
    # input_proj's x, its result, y, SiLU(y), what the last product was given; the last modulation if it is kept
    besides = 5 + (0 if recompute == "block" else 2)
    assert sum(storages.values()) == (widths * DEPTH + besides) * row
    assert out.requires_grad
