"""The MLP of a transformer layer with its gradient, the activation's in a product."""

import pytest
import torch

from uniflow.transformer import TransformerLayer
from uniflow_kernels import backend
from uniflow_kernels.ops import flow_choice
from uniflow_kernels.ops import transformer_mlp as module
from uniflow_kernels.ops.flow_blocks import Affine
from uniflow_kernels.ops.transformer_layers import ACTIVATIONS
from uniflow_kernels.ops.transformer_mlp import KERNELS, choose_mlp_path, plain_mlp, transformer_mlp

pytest.importorskip("triton")

SHAPE, HIDDEN = (3, 43, 40), 72  # which end inside tiles


def make(dtype=torch.float32, bias=True, shape=SHAPE, hidden=HIDDEN, device="cpu"):
    """x with gaps between its rows, fc1 and fc2, and the result's gradient."""
    generator, width = torch.Generator().manual_seed(0), shape[-1]

    def numbers(*shape, std=1.0):
        return (std * torch.randn(shape, generator=generator)).to(device, dtype)

    x = numbers(*shape[:-1], width + 8, std=2.0)[..., :width].requires_grad_()
    weights = numbers(hidden, width, std=width**-0.5), numbers(width, hidden, std=hidden**-0.5)
    biases = (numbers(hidden, std=0.1), numbers(width, std=0.1)) if bias else (None, None)
    pairs = zip(weights, biases, strict=True)
    fc1, fc2 = (Affine(*(None if t is None else t.requires_grad_() for t in pair)) for pair in pairs)
    return x, fc1, fc2, numbers(*shape)


def results(mlp, x, fc1, fc2, dy, *more):
    out = mlp(x, fc1, fc2, *more)
    return [out, *torch.autograd.grad(out, [t for t in (x, *fc1, *fc2) if t is not None], dy)]


def against_definition(within_twice, given, activation, path, floor=1e-6):
    def wide(t):
        return None if t is None else t.detach().double().requires_grad_()

    x, fc1, fc2, dy = given
    exact = results(plain_mlp, wide(x), Affine(*map(wide, fc1)), Affine(*map(wide, fc2)), dy.double(), activation)
    plain = results(plain_mlp, *given, activation)
    with backend("triton"):
        found = results(transformer_mlp, *given, activation, path)
    for mine, theirs, truth in zip(found, plain, exact, strict=True):
        assert mine.dtype == x.dtype
        within_twice(mine, theirs, truth, floor)
    return found


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numbers_and_gradients(within_twice, activation, path):
    against_definition(within_twice, make(), activation, path)


@pytest.mark.parametrize(("dtype", "floor"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-4)])
def test_half_precision_without_biases_and_the_same_bits(within_twice, dtype, floor):
    given = make(dtype, bias=False)
    found = against_definition(within_twice, given, "gelu", "products", floor)
    with backend("triton"):
        again = results(transformer_mlp, *given, "gelu", "products")
    assert all(map(torch.equal, found, again))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_whole_range_of_gelu(dtype):
    """And of its derivative, to a rounding and the polynomial: where that is largest, where it ends, and far out."""
    p = torch.linspace(-12, 12, 4096).view(32, 128).to(dtype)
    with backend("triton"):
        dp, u, sums = module.mlp_backward_op(p.new_ones(32, 1), p.new_ones(1, 128), p, "gelu", "products")
    x = p.double().requires_grad_()
    exact = torch.nn.functional.gelu(x)
    (slope,) = torch.autograd.grad(exact.sum(), x)
    rounding, fitted = torch.finfo(dtype).eps, 5e-4 if dtype == torch.bfloat16 else 1e-6
    for found, truth in ((u, exact), (dp, slope)):
        assert ((found.double() - truth).abs() <= rounding * truth.abs() + fitted).all()
    assert torch.allclose(sums.double(), slope.sum(0), rtol=1e-4, atol=1e-3)


def test_what_is_frozen_has_no_gradient_and_what_is_kept(within_twice):
    x, fc1, fc2, dy = make()
    fc1.weight.requires_grad_(False)
    fc2.bias.requires_grad_(False)
    saved = []
    with backend("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = transformer_mlp(x, fc1, fc2, path="products")
    rows = 3 * 43
    assert sorted(t.numel() for t in saved) == sorted([rows * 40, rows * HIDDEN, HIDDEN * 40, HIDDEN * 40])
    with backend("triton"):
        found = torch.autograd.grad(out, [x, fc1.bias, fc2.weight], dy)
    plain = torch.autograd.grad(plain_mlp(x, fc1, fc2), [x, fc1.bias, fc2.weight], dy)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, plain, strict=True))
    with backend("triton"), pytest.raises(RuntimeError, match="transformer_mlp: it has no second derivative"):
        torch.autograd.grad(transformer_mlp(x, fc1, fc2, path="products").sum(), x, create_graph=True)


def test_autocast(within_twice):
    given = make()
    with torch.autocast("cpu", torch.bfloat16):
        plain = results(plain_mlp, *given[:3], given[3].bfloat16())
        with backend("triton"):
            found = results(transformer_mlp, *given[:3], given[3].bfloat16(), "gelu", "products")
    for mine, theirs, truth in zip(found, plain, results(plain_mlp, *given), strict=True):
        assert mine.dtype == theirs.dtype
        within_twice(mine, theirs, truth.double(), 1e-3)


def test_layers_take_it_where_a_gradient_is_wanted(within_twice, monkeypatch):
    taken = []
    run = module._mlp_backward
    monkeypatch.setattr(module, "mlp_backward_op", lambda *given: taken.append(given[-1]) or run(*given))
    torch.manual_seed(0)
    layer = TransformerLayer(32, 4, 64, layer_scale=0.5)
    x = torch.randn(2, 5, 32)
    plain = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    assert not taken
    with backend("triton"):
        found = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
        assert taken == ["products"]
        with torch.no_grad():
            layer(x)
        layer.mlp.fc1.register_forward_hook(lambda *_: None)  # somebody looks
        torch.autograd.grad(layer(x).sum(), list(layer.parameters()))
    assert taken == ["products"]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, plain, strict=True))


@pytest.fixture
def table(monkeypatch):
    """Paths of the interpreter's device, as if they had been measured."""
    orders = {
        "inference": ["eager"],
        "training": ["eager", "small products"],
        "graph_inference": [],
        "graph_training": [],
    }
    entry = {"arch": 0, "dtype": "float32", "width": 40, "gpu": "", **orders}
    entries = [entry | {"rows": 64}, entry | {"rows": 1024, "training": ["small products", "products", "eager"]}]
    monkeypatch.setattr(flow_choice, "_table", lambda op: entries if op == module.OP else [])
    flow_choice.measured.cache_clear()
    yield
    flow_choice.measured.cache_clear()


def test_the_path_is_what_was_measured(table, monkeypatch):
    def choose(rows, **changes):
        x, fc1, fc2, _ = make(shape=(rows, 40), **changes)
        return choose_mlp_path(x, fc1, fc2)

    monkeypatch.setattr(module, "is_plain", lambda on_cuda: False)
    monkeypatch.setattr(module, "why_not_on", lambda *_: None)  # as on a GPU
    assert (choose(63), choose(64), choose(1024)) == ("eager", "eager", "small products")
    assert choose(1024, dtype=torch.bfloat16) == "eager"  # nothing was measured
    with backend("triton"):
        assert (choose(64), choose(63), choose(1024)) == ("small products", "products", "small products")
    with torch.no_grad():
        assert choose(1024) == "eager"
    with torch.autocast("cpu", torch.bfloat16):
        assert choose(1024) == "eager"
    runs, why = module.explain_mlp(torch.device("cpu"), torch.float32, 40)
    assert runs.startswith("from 64 rows plain PyTorch; from 1024 rows such Triton products")
    assert why.startswith("measured on")
    assert module.explain_mlp(torch.device("cpu"), torch.float32, 48)[1] == "Triton, on request: unmeasured on this GPU"


def test_what_cannot_serve_is_refused():
    x, fc1, fc2, _ = make()
    with pytest.raises(ValueError, match=r"activation: expected .*gelu.*, got 'swish'"):
        transformer_mlp(x, fc1, fc2, "swish")
    with pytest.raises(ValueError, match=r"path: expected .*products.*, got 'rows'"):
        transformer_mlp(x, fc1, fc2, path="rows")
    with pytest.raises(ValueError, match="transformer_mlp: path 'products' cannot serve this input: it runs on CUDA"):
        transformer_mlp(x, fc1, fc2, path="products")
    with backend("triton"), torch.no_grad(), pytest.raises(ValueError, match="no gradient is wanted"):
        transformer_mlp(x, fc1, fc2, path="products")
    with backend("triton"), pytest.raises(ValueError, match="not of one dtype"):
        transformer_mlp(x.double().float(), Affine(fc1.weight.bfloat16(), None), fc2, path="products")
    assert transformer_mlp(x[:0], fc1, fc2).shape == (0, 43, 40)


def test_the_registered_op_and_a_compiled_graph():
    x, fc1, fc2, dy = make(shape=(6, 40))
    op = torch.ops.uniflow_kernels.transformer_mlp.default
    with backend("triton"):
        torch.library.opcheck(op, (x.detach().contiguous().requires_grad_(), *fc1, *fc2, "gelu", "products"))
        compiled = torch.compile(transformer_mlp, fullgraph=True, backend="aot_eager")
        found = results(compiled, x, fc1, fc2, dy)
    plain = results(plain_mlp, x, fc1, fc2, dy)
    assert all(map(torch.equal, found, plain))
