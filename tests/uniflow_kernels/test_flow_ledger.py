"""What the fused flow head launches and keeps, counted: numbers that hold on any machine."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import randomize
from uniflow_kernels import FlowHead, backend
from uniflow_kernels.modules import sampling
from uniflow_kernels.ops import flow_ledger
from uniflow_kernels.ops.flow_choice import PATHS, forced_path
from uniflow_kernels.ops.flow_head import _flow_blocks, _modulated_flow_blocks
from uniflow_kernels.triton_kernels import flow_head as row_kernels
from uniflow_kernels.triton_kernels import flow_products

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


FUSED = {
    "uniflow_kernels.flow_blocks.default": _flow_blocks,
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

    def replace(kernels, name, result=lambda *arguments: None):
        def launch(*arguments):
            launches.append((name, arguments))
            return result(*arguments)

        monkeypatch.setattr(kernels, name, launch)

    replace(row_kernels, "norm_modulate")
    replace(row_kernels, "activation", lambda p, hidden: p.new_empty(p.shape[0], hidden))
    replace(flow_products, "moments")
    for name in ("modulated", "up", "down"):
        replace(flow_products, name)
    return launches


def make(**options):
    head = randomize(FlowHead(WIDTH, WIDTH, WIDTH, WIDTH, DEPTH, **options))
    x, y = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    return head, x, y.requires_grad_()


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
    with torch.no_grad(), backend("triton"), forced_path("products"), Launches() as fused:
        head.from_embedding(x, y)
    names = [name for name, _ in launched]
    assert names == ["moments", *("modulated", "up", "down") * DEPTH, "modulated"]
    assert len(products_of(fused.names)) == 2  # input and output
    assert len(fused.names) + len(launched) == 3 * DEPTH + 5 == 41
    given = [t for _, arguments in launched for t in arguments if isinstance(t, torch.Tensor) and t.shape[0] == ROWS]
    assert all(tensor.shape[1] == tensor.stride(0) == WIDTH for tensor in given)
    # x, SiLU(y), h, u, the sum and the output: inference allocates no more, whatever the depth
    assert len({tensor.data_ptr() for tensor in given}) == 6


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("recompute", ["none", "gate", "block"])
def test_the_ledger_lists_what_is_launched(launched, path, recompute):
    head, x, y = make(recompute=recompute)
    keep = {"none": "all", "gate": "no gate", "block": "inputs"}[recompute]
    with backend("triton"), forced_path(path), Launches() as fused:
        head.from_embedding(x, y)
    listed = flow_ledger.forward(flow_ledger.Shape(ROWS, WIDTH, WIDTH, DEPTH), path, keep)
    kernels = row_kernels if path == "rows" else flow_products
    assert [launch.name for launch in listed if hasattr(kernels, launch.name)] == [name for name, _ in launched]
    others = 3  # input, SiLU(y), output
    assert len(listed) == len(fused.names) + len(launched) - others


def test_launches_of_a_sampler(launched, monkeypatch):
    """Four a block and step; the modulations once for two steps, the embeddings once for all."""
    monkeypatch.setattr(sampling, "ROWS_AHEAD", 2 * ROWS)
    head, noise, condition = make()
    with torch.no_grad(), backend("triton"), Launches() as fused:
        head.sample(condition, 5, noise=noise)
    listed = [launch.name for launch in flow_ledger.sampling(flow_ledger.Shape(ROWS, WIDTH, WIDTH, DEPTH), 5, 2)]
    assert [name for name in listed if hasattr(row_kernels, name)] == [name for name, _ in launched]
    assert listed.count("modulation") == 3 * (DEPTH + 1)
    assert len(listed) == 3 * (DEPTH + 1) + 5 * (4 * DEPTH + 1)
    others = 1 + 2 + 5 * 2  # the condition, the times, input and output of each step
    assert len(products_of(fused.names)) == len([n for n in listed if n in ("modulation", "up", "down")]) + others


def test_the_ledger_of_a_sampler():
    """20 steps of 4 rows at width 1024 in bfloat16, six blocks, by hand: weights are read 260 times, not 640."""
    shape, t, weight = flow_ledger.Shape(4, 1024, 1024, 6), 4 * 1024 * 2, 1024**2 * 2
    launches = flow_ledger.sampling(shape, 20, 20)
    # modulations 4 a block and 3; norms 7 a block (the first 4) and 7, W1 2, SiLU 2, W2 2
    moved = 20 * (6 * 4 + 3 + 6 * 13 - 3 + 7) * t + (6 * 3 + 2 + 20 * 6 * 2) * weight
    assert sum(launch.read + launch.written for launch in launches) == moved
    apart = 20 * flow_ledger.forward(shape, "rows")
    assert sum(launch.read + launch.written for launch in apart) == moved + (640 - 260) * weight
    assert sum(launch.flops for launch in launches) == sum(launch.flops for launch in apart)
    assert len(apart) - len(launches) == 19 * 7


def test_moments_are_of_as_many_columns_as_the_ledger_says():
    tiles = [architecture.tiles["down"] for arch, architecture in flow_products.ARCHITECTURES.items() if arch]
    assert {tile.piece for tile in tiles} == {flow_ledger.PART}


def test_the_ledger_of_the_official_head():
    """32768 tokens in bfloat16, counted by hand: T is a tensor of them, U a product of them with a [W, W] weight."""
    shape = flow_ledger.Shape(32768, 1024, 1024, 12)
    t, u, weight = 32768 * 1024 * 2, 2 * 32768 * 1024**2, 1024**2 * 2

    def total(launches):
        return sum(launch.read + launch.written for launch in launches), sum(launch.flops for launch in launches)

    # a block: modulation 4, norm 7 (the first 4), W1 2, SiLU 2, W2 2; then modulation 3 and norm 7
    by_rows = (12 * 17 - 3 + 3 + 7) * t
    assert total(flow_ledger.forward(shape, "rows")) == (by_rows + 62 * weight, 62 * u)
    # the first moments 1; a block: 3, 2 and 4; the last norm 3. Moments: of whole rows, then of 16 parts, out and in
    by_products = (1 + 12 * 9 + 3) * t + 2 * 8 * 32768 * (1 + 12 * 16)
    assert total(flow_ledger.forward(shape, "products")) == (by_products + 62 * weight, 62 * u)
    # scale, p, gate and q of a block are written too, and the last scale and zeros for the last shift
    assert total(flow_ledger.forward(shape, "products", "all"))[0] == by_products + 62 * weight + (12 * 4 + 2) * t
    # the last norm 10, its modulation 4 and 3. A block: W2 2, SiLU 4, weight gradients 4, W1 2, norm 10 (the last 6),
    # modulation 5 and 4. A gradient of a weight and the weight are one each in every product
    backward = (17 + 12 * 31 - 4) * t
    assert total(flow_ledger.backward(shape, "rows")) == (backward + 2 * 62 * weight, 2 * 62 * u)
    assert total(flow_ledger.backward(shape, "products")) == (backward - 12 * 2 * t + 2 * 62 * weight, 2 * 62 * u)


def test_the_ledger_of_a_swiglu_without_a_last_modulation():
    """One row of width 2, hidden 3, one block, float32, counted by hand in elements."""
    shape = flow_ledger.Shape(1, 2, 3, 1, gated=True, final=False, itemsize=4)
    names, read, written, flops = zip(*flow_ledger.forward(shape, "products", "all"), strict=True)
    assert names == ("moments", "modulated", "up", "down", "norm_modulate")
    # x; a, x, weight [4, 2] and two moments; h and weight [6, 2]; u, x, a and weights [2, 3] and [2, 2]; x
    assert read == (8, 4 * (2 + 2 + 8) + 8, 4 * (2 + 12), 4 * (3 + 2 + 2 + 6 + 4), 8)
    # two moments; h and scale; u, p and up; sum, q, gate and two moments; out
    assert written == (8, 16, 4 * 9, 4 * 6 + 8, 8)
    assert flops == (0, 16, 24, 20, 0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("recompute", "widths"), [("none", 6), ("gate", 4), ("block", 1)])
def test_saved_bytes(launched, recompute, widths, path):
    """A row and block keep 6, 4 or 1 times the width, and the head x, SiLU(y) and the last modulation besides."""
    head, x, y = make(recompute=recompute)
    weights = {p.untyped_storage().data_ptr() for p in head.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with backend("triton"), forced_path(path), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = head.from_embedding(x, y)
    row = ROWS * WIDTH * 4
    # input_proj's x, its result, y, SiLU(y), what the last product was given; the last modulation if it is kept
    besides = 5 + (0 if recompute == "block" else 2)
    assert sum(storages.values()) == (widths * DEPTH + besides) * row
    assert out.requires_grad
