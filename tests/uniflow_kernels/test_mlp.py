"""Two linear layers around an activation, by products, by oneDNN and in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from tests.uniflow_kernels.test_transformer_layers import Asked
from uniflow_kernels import backend
from uniflow_kernels.ops import mlp as module
from uniflow_kernels.ops.flow_blocks import Affine
from uniflow_kernels.ops.mlp import mlp
from uniflow_kernels.ops.transformer_layers import ACTIVATIONS, ONE_DNN
from uniflow_kernels.torch_private import has_one_dnn

pytest.importorskip("triton")
PATHS = ("products", "small products")


def make(width, hidden, outputs, dtype=torch.float32, bias=True, position=True, shape=(2, 67), device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    def linear(columns, rows):
        return Affine(numbers(columns, rows) * rows**-0.5, numbers(columns) if bias else None)

    x, fc1, fc2 = numbers(*shape, width), linear(hidden, width), linear(outputs, hidden)
    return x, fc1, fc2, numbers(1, shape[1], outputs) if position else None


def definition(x, fc1, fc2, position, activation="gelu"):
    made = F.linear(ACTIVATIONS[activation](F.linear(x, *fc1)), *fc2)
    return made if position is None else made + position


def wide(x, fc1, fc2, position):
    def of(t):
        return None if t is None else t.double()

    return of(x), Affine(*map(of, fc1)), Affine(*map(of, fc2)), of(position)


def against_definition(within_twice, given, path, activation="gelu", floor=1e-6):
    x, fc1, fc2, position = given
    with backend("triton"), torch.no_grad():
        found = mlp(x, fc1, fc2, activation, position, path)
    assert found.dtype == x.dtype
    within_twice(found, definition(*given, activation), definition(*wide(*given), activation), floor)


# what ends inside tiles; rows of pictures whose positions begin inside them
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("sizes", "shape", "there", "activation"),
    [
        ((24, 40, 16), (3, 67), {}, "gelu"),
        ((16, 136, 40), (2, 130), {"bias": False}, "silu"),
        ((40, 24, 8), (1, 9), {}, "relu"),
        ((40, 24, 8), (2, 9), {"position": False}, "gelu_pytorch_tanh"),
    ],
)
def test_numbers(within_twice, path, sizes, shape, there, activation):
    against_definition(within_twice, make(*sizes, shape=shape, **there), path, activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_strides_and_the_same_bits(within_twice, dtype):
    x, *others = make(24, 40, 16, dtype, shape=(2, 9))
    turned = others[2][:, 1:].mT.contiguous().mT  # as positions that were interpolated
    against_definition(within_twice, (x[:, 1:], *others[:2], turned), "products")
    fc1, fc2, position = others
    with backend("triton"), torch.no_grad():
        first, again = (mlp(x, fc1, fc2, "gelu", position, "products") for _ in range(2))
    assert torch.equal(first, again)


def test_gradients_are_those_of_plain_pytorch():
    x, fc1, fc2, position = wide(*make(8, 12, 6, shape=(2, 5)))
    given = [t.requires_grad_() for t in (x, *fc1, *fc2, position)]
    assert torch.autograd.gradcheck(lambda x, a, b, c, d, e: mlp(x, Affine(a, b), Affine(c, d), "gelu", e), given)


def chosen(given):
    x, fc1, fc2, position = given
    with torch.no_grad():
        return module._choose(x, fc1.weight.shape[0], [*fc1, *fc2, position])


def test_the_path_of_layers_of_its_width(monkeypatch):
    entry = {"gpu": "some H100", "arch": 90, "dtype": "bfloat16", "width": 64, "training": [], "graph_training": []}
    orders = {10: ["rows", "products"], 100: ["small products", "rows"], 1000: ["products"]}
    entries = [{**entry, "rows": rows, "inference": order, "graph_inference": []} for rows, order in orders.items()]
    Asked(monkeypatch, entries)

    def of(rows, width=64):
        return chosen(make(32, width, 16, torch.bfloat16, shape=(1, rows)))

    assert [of(rows) for rows in (20, 100, 1000)] == ["eager", "small products", "products"]
    assert of(1000, width=128) == "eager"
    x, fc1, fc2, position = make(32, 64, 16, torch.bfloat16, shape=(1, 1000))
    assert module._choose(x.requires_grad_(), 64, [*fc1, *fc2, position]) == "eager"


def test_by_one_dnn(within_twice, monkeypatch):
    given = make(24, 40, 16, shape=(2, 9))
    if not has_one_dnn():
        pytest.skip("torch is built without oneDNN or MKL")
    layers = "uniflow_kernels.ops.transformer_layers"
    monkeypatch.setattr(f"{layers}.why_not_one_dnn", lambda *_: None)
    monkeypatch.setattr(f"{layers}._WORTH_ONE_DNN", 0)
    assert chosen(given) == ONE_DNN
    x, fc1, fc2, position = given
    with torch.no_grad():
        found = mlp(x, fc1, fc2, "gelu", position)
    within_twice(found, definition(*given), definition(*wide(*given)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "activation: expected one of gelu, .*, got 'tanh'"),
        ({"path": "rows"}, "path: expected one of auto, products, small products, got 'rows'"),
        ({"path": "products"}, "mlp: path 'products' cannot serve this input: it runs on CUDA"),
    ],
)
def test_errors(change, message):
    x, fc1, fc2, position = make(24, 40, 16)
    with pytest.raises(ValueError, match=message):
        mlp(x, fc1, fc2, position=position, **change)
