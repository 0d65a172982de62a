"""Transformer layers by row kernels and by products with the norms folded into them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from uniflow_kernels import backend, cpu_kernels, doctor
from uniflow_kernels.choice import in_graph
from uniflow_kernels.ops import flow_choice
from uniflow_kernels.ops import transformer_layers as op
from uniflow_kernels.ops.flow_blocks import Affine
from uniflow_kernels.ops.transformer_layers import (
    ACTIVATIONS,
    KERNELS,
    ONE_DNN,
    Layer,
    LayerForm,
    choose_layers_path,
    explain_layers,
    fold_norm,
    linear_by_one_dnn,
    may_have_kernels,
    plain_layer,
    transformer_layers,
)
from uniflow_kernels.torch_private import has_one_dnn, one_dnn_linear

triton = pytest.importorskip("triton")
from uniflow_kernels.triton_kernels import layer_products, products  # noqa: E402

HEADS = 2


def attend(qkv):
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def make(width, hidden, dtype=torch.float32, *, bias=True, norm_bias=True, scale=True, layers=2, device="cpu"):
    """Layers of random numbers; a norm's weight is about 1, LayerScale about 0.5."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape, mean=0.0, std=1.0):
        return (mean + std * torch.randn(shape, generator=generator)).to(device, dtype)

    def linear(columns, rows):
        return Affine(numbers(columns, rows, std=rows**-0.5), numbers(columns, std=0.1) if bias else None)

    def norm():
        return Affine(numbers(width, mean=1.0, std=0.2), numbers(width, std=0.2) if norm_bias else None)

    def one():
        scales = [numbers(width, mean=0.5, std=0.1) if scale else None for _ in range(2)]
        first = norm(), (linear(3 * width, width),), attend, linear(width, width), scales[0]
        return Layer(*first, norm(), linear(hidden, width), linear(width, hidden), scales[1])

    return [one() for _ in range(layers)]


def wide(layers):
    """In float64."""

    def of(value):
        if isinstance(value, Affine):
            return Affine(*(None if t is None else t.double() for t in value))
        if isinstance(value, tuple):
            return tuple(map(of, value))
        return value.double() if isinstance(value, torch.Tensor) else value

    return [Layer(*map(of, layer)) for layer in layers]


def tokens(shape, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def run(x, layers, form, path="eager"):
    with torch.no_grad():
        return list(transformer_layers(x, layers, form, path))


def against_definition(within_twice, layers, x, form, path, floor=1e-6):
    with backend("triton"), torch.no_grad():
        assert choose_layers_path(x, layers, form, path) == path
        found = run(x, layers, form, path)
    plain, exact = run(x, layers, form), run(x.double(), wide(layers), form)
    for mine, theirs, truth in zip(found, plain, exact, strict=True):
        assert mine.dtype == x.dtype
        within_twice(mine, theirs, truth, floor)


# widths that end inside tiles and parts; form; what is there
FORMS = {
    "ViT": (24, 40, LayerForm(), {}),
    "no LayerScale, no bias": (136, 264, LayerForm(eps=1e-6), {"scale": False, "bias": False}),
    "rms": (38, 51, LayerForm("rms", 1e-6, "silu"), {"norm_bias": False}),
    "rms, no bias": (24, 40, LayerForm("rms", 1e-6, "relu"), {"norm_bias": False, "bias": False, "scale": False}),
    "tanh": (40, 24, LayerForm(activation="gelu_pytorch_tanh"), {"norm_bias": False}),
}


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("name", FORMS)
def test_numbers(within_twice, name, path):
    """Rows that end inside a tile, and what layers have or have not."""
    width, hidden, form, there = FORMS[name]
    against_definition(within_twice, make(width, hidden, **there), tokens((2, 67, width)), form, path)


@pytest.mark.parametrize("path", KERNELS)
def test_bfloat16_and_the_same_bits(within_twice, path):
    layers, x, form = make(48, 96, torch.bfloat16), tokens((2, 9, 48), torch.bfloat16), LayerForm()
    against_definition(within_twice, layers, x, form, path)
    with backend("triton"):
        assert all(map(torch.equal, run(x, layers, form, path), run(x, layers, form, path)))


def test_the_definition_is_written_out():
    """Both branches, on its own: not through what it is made of."""
    (layer,), x = make(8, 12, torch.float64, layers=1), tokens((1, 3, 8), torch.float64)

    def norm(x, affine):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * affine.weight + affine.bias

    qkv = norm(x, layer.norm1) @ layer.qkv[0].weight.T + layer.qkv[0].bias
    y = x + layer.scale1 * (attend(qkv) @ layer.proj.weight.T + layer.proj.bias)
    hidden = norm(y, layer.norm2) @ layer.fc1.weight.T + layer.fc1.bias
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    y = y + layer.scale2 * (hidden @ layer.fc2.weight.T + layer.fc2.bias)
    torch.testing.assert_close(plain_layer(x, layer, LayerForm()), y, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # of exp, to a sigmoid of 0
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_the_epilogue(name):
    """For bfloat16 GELU is a polynomial and one tanh: as wrong as its comment says, out to where it is 0 or x."""
    x = torch.linspace(-40, 40, 4001)[:, None].repeat(1, 8)
    exact = ACTIVATIONS[name](x.double())[:, 0]
    for dtype, most in ((torch.float32, 2e-6), (torch.bfloat16, 2.7e-5)):
        out = torch.empty(x.shape)
        activate[(1,)](
            x, out, 8 * len(x), {torch.float32: triton.language.float32}.get(dtype, triton.language.bfloat16), name
        )
        assert (out[:, 0].double() - exact).abs().max() < most


@triton.jit
def activate(x_p, out_p, size, dtype: triton.language.constexpr, act: triton.language.constexpr):
    at = triton.language.arange(0, 32768)
    x = triton.language.load(x_p + at, at < size, 0.0)
    triton.language.store(out_p + at, layer_products._activated(x, dtype, act), at < size)


ROWS = {
    "a large mean": lambda x: x + 60,
    "means of every size": lambda x: x + torch.linspace(-200, 200, len(x))[:, None],
    # of ViTs: few channels hundreds of times as large as the others, whose norm weights are small
    "outlier channels": lambda x: torch.where(torch.arange(x.shape[1]) % 50 == 7, 300 + 20 * x, x),
    "both": lambda x: torch.where(torch.arange(x.shape[1]) % 50 == 7, x - 500, x + 8),
}


def of_norm(width, small, dtype):
    """Its weight is small where outliers are."""
    outlier = torch.arange(width) % 50 == 7
    weight = torch.where(outlier, small, 1 + 0.2 * tokens((width,)))
    return Affine(weight.to(dtype), (0.2 * tokens((width,))).to(dtype))


def random_linear(columns, rows):
    return Affine(tokens((columns, rows)) * rows**-0.5, 0.1 * tokens((columns,)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("norm_bias", "bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_norms_are_folded_as_their_definition_says(dtype, norm_bias, bias):
    norm, affine = of_norm(200, 0.01, dtype), Affine(*(t.to(dtype) for t in random_linear(37, 200)))
    norm, affine = (each if there else Affine(each[0]) for each, there in ((norm, norm_bias), (affine, bias)))
    for found, expected in zip(layer_products.fold_norm(norm, affine), fold_norm(norm, affine), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert found.dtype == expected.dtype
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if not norm_bias:
        assert torch.equal(layer_products.fold_norm(Affine(None), affine)[0], affine.weight)


def folded(x, norm, affine):
    made = layer_products.fold_norm(norm, affine)
    rows = layer_products.folded_norm(x, products.moments(x, False), *made, "none", False, 1e-6)
    plain = [
        F.linear(
            F.layer_norm(x.to(d), x.shape[1:], norm.weight.to(d), norm.bias.to(d), 1e-6), *(t.to(d) for t in affine)
        )
        for d in (x.dtype, torch.float64)
    ]
    return rows, *plain


@pytest.mark.parametrize("name", ROWS)
def test_a_folded_norm_of_rows_with_large_means_and_outlier_channels(within_twice, name):
    """The mean is taken from a product as large as it, and cancels: the sums are those of the rounded weight."""
    x, dtype = ROWS[name](tokens((40, 200))).bfloat16(), torch.bfloat16
    affine = Affine(*(t.to(dtype) for t in random_linear(96, 200)))
    within_twice(*folded(x, of_norm(200, 0.01, dtype), affine))


def test_of_float32_a_large_mean_would_not_cancel(within_twice):
    """Its numbers are as fine as the sum of the product; but no GPU's tensor cores multiply them."""
    affine = random_linear(96, 200)
    with pytest.raises(AssertionError, match="error"):
        within_twice(*folded(ROWS["means of every size"](tokens((40, 200))), of_norm(200, 0.01, torch.float32), affine))
    assert all(torch.float32 not in made.dtypes for arch, made in products.ARCHITECTURES.items() if arch)


def test_of_float16_no_norm_is_folded(within_twice):
    """A small weight times the norm's small one has few bits left; each alone, and what they make, has all."""
    half = torch.float16
    norm = Affine(torch.full((200,), 1e-3, dtype=half), torch.zeros(200, dtype=half))
    affine = Affine((1e-4 * tokens((96, 200))).to(half), torch.zeros(96, dtype=half))
    with pytest.raises(AssertionError, match="error"):
        within_twice(*folded(tokens((40, 200), half), norm, affine))
    layers = make(24, 40, torch.float16)
    with backend("triton"), pytest.raises(ValueError, match=r"'products' .* bfloat16, not torch.float16"):
        choose_layers_path(tokens((2, 3, 24), torch.float16), layers, LayerForm(), "products")


class Asked:
    """What `choose_layers_path` says of layers that are on a GPU of sm_90, as far as anybody can tell."""

    def __init__(self, monkeypatch, entries):
        monkeypatch.setattr(flow_choice, "architecture", lambda device: 90)
        monkeypatch.setattr(flow_choice, "gpu_name", lambda device: "some H100")
        monkeypatch.setattr("uniflow_kernels.ops.transformer_layers.is_plain", lambda on_cuda: False)
        monkeypatch.setattr("uniflow_kernels.ops.transformer_layers.why_not_on", lambda *_: None)
        monkeypatch.setattr(products, "architecture", lambda device: 90)
        monkeypatch.setattr(flow_choice, "_table", lambda op: entries if op == "transformer_layers" else [])
        flow_choice.measured.cache_clear()

    def __call__(self, rows, dtype=torch.bfloat16, width=64):
        with torch.no_grad():
            return choose_layers_path(torch.zeros(1, rows, width, dtype=dtype), make(width, 64, dtype), LayerForm())


@pytest.fixture
def asked(monkeypatch):
    entry = {"gpu": "some H100", "arch": 90, "dtype": "bfloat16", "width": 64, "training": [], "graph_training": []}
    orders = {
        100: (["rows", "eager"], ["products", "rows"]),
        10: (["eager", "rows"], ["small products"]),
        1000: (["products"], ["rows"]),
    }
    entries = [
        {**entry, "rows": rows, "inference": calls, "graph_inference": graphs}
        for rows, (calls, graphs) in orders.items()
    ]
    yield Asked(monkeypatch, entries)
    flow_choice.measured.cache_clear()


def test_the_measured_order_chooses(asked):
    assert [asked(rows) for rows in (5, 10, 99, 100, 1000)] == ["eager", "eager", "eager", "rows", "products"]
    with in_graph():
        assert [asked(rows) for rows in (10, 100, 1000)] == ["small products", "products", "rows"]
    assert asked(1000, torch.float16) == asked(1000, width=128) == "eager"  # of which nothing was measured
    with backend("triton"):
        assert asked(10) == "rows"


def test_nothing_measured_means_the_layers_own_forwards(monkeypatch):
    ask = Asked(monkeypatch, [])
    assert ask(10) == ask(100000) == "eager"
    flow_choice.measured.cache_clear()


def test_what_speaks_against_kernels():
    layers, x, form = make(24, 40), tokens((2, 3, 24)), LayerForm()
    with pytest.raises(ValueError, match="transformer_layers: path 'rows' cannot serve this input: it runs on CUDA"):
        choose_layers_path(x, layers, form, "rows")
    with pytest.raises(ValueError, match=r"path: expected one of auto, rows, .*, oneDNN, got 'fast'"):
        choose_layers_path(x, layers, form, "fast")
    with backend("triton"):
        assert choose_layers_path(x, layers, form) == "rows"
        assert choose_layers_path(x[:0], layers, form) == "eager"
        assert choose_layers_path(x.clone().requires_grad_(), layers, form) == "eager"
        assert choose_layers_path(x.bfloat16(), layers, form) == "eager"
        with pytest.raises(ValueError, match="it has no gradients"):
            choose_layers_path(x.clone().requires_grad_(), layers, form, "products")
    with backend("eager"):
        assert choose_layers_path(x, layers, form) == "eager"


@pytest.fixture
def on_amd(monkeypatch):
    """Whatever the processor is."""
    if not has_one_dnn():
        pytest.skip("torch is built without oneDNN or MKL")
    monkeypatch.setattr(cpu_kernels, "is_amds", lambda: True)
    monkeypatch.setattr(op, "_WORTH_ONE_DNN", 0)  # of products however small


@pytest.mark.usefixtures("on_amd")
@pytest.mark.parametrize("name", FORMS)
def test_products_by_one_dnn(within_twice, name):
    width, hidden, form, there = FORMS[name]
    layers, x = make(width, hidden, **there), tokens((2, 67, width))
    found, exact = run(x, layers, form, ONE_DNN), run(x.double(), wide(layers), form)
    for mine, theirs, truth in zip(found, run(x, layers, form), exact, strict=True):
        within_twice(mine, theirs, truth)
    assert all(map(torch.equal, found, run(x, layers, form, ONE_DNN)))
    apart = x.repeat(1, 1, 2)[..., :width]
    assert all(map(torch.equal, found, run(apart, layers, form, ONE_DNN)))


@pytest.mark.usefixtures("on_amd")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_small_products_are_not_worth_a_call_of_one_dnn(within_twice, monkeypatch, name):
    x, affine = tokens((2, 5, 24)), Affine(tokens((16, 24)), tokens((16,)))
    exact = ACTIVATIONS[name](F.linear(*(t.double() for t in (x, *affine))))
    plain, made = ACTIVATIONS[name](F.linear(x, *affine)), []
    monkeypatch.setattr(op, "one_dnn_linear", lambda *given: made.append(1) or one_dnn_linear(*given))
    for worth, calls in ((2 * 5 * 24 * 16, [1]), (2 * 5 * 24 * 16 + 1, [])):
        monkeypatch.setattr(op, "_WORTH_ONE_DNN", worth)
        within_twice(linear_by_one_dnn(x, affine, name), plain, exact)
        assert made == calls
        made.clear()


@pytest.mark.usefixtures("on_amd")
def test_where_one_dnn_makes_the_products(monkeypatch):
    layers, x, form = make(24, 40), tokens((2, 3, 24)), LayerForm()
    with torch.no_grad():
        assert may_have_kernels(x)
        assert not may_have_kernels(x[:0])
        assert choose_layers_path(x, layers, form) == choose_layers_path(x, layers, form, ONE_DNN) == ONE_DNN
        assert choose_layers_path(x.bfloat16(), make(24, 40, torch.bfloat16), form) == "eager"
        assert choose_layers_path(x, make(24, 40, torch.float64), form) == "eager"
        with torch.autocast("cpu", torch.bfloat16):
            assert choose_layers_path(x, layers, form) == "eager"
        with FlopCounterMode(display=False):  # which knows the products of torch alone
            assert not may_have_kernels(x)
        with backend("eager"):
            assert not may_have_kernels(x)
        runs, why = explain_layers(x.device, x.dtype, 24)
        assert runs == "products by oneDNN, activations in them"
        assert "docs/layers.md" in why
    assert not may_have_kernels(x)  # a gradient may be wanted
    with pytest.raises(ValueError, match="path 'oneDNN' cannot serve this input: it has no gradients"):
        choose_layers_path(x.clone().requires_grad_(), layers, form, ONE_DNN)
    with pytest.raises(ValueError, match=r"'oneDNN' .* torch takes it for products in torch.float64"):
        choose_layers_path(x.double(), layers, form, ONE_DNN)
    monkeypatch.setattr(cpu_kernels, "is_amds", lambda: False)
    with torch.no_grad():
        assert choose_layers_path(x, layers, form) == "eager"
        assert not may_have_kernels(x)


def test_doctor_says_that_nothing_was_measured():
    (line,) = (op for op in doctor().ops if op.op == "transformer_layers")
    assert line.runs == "plain PyTorch"
    assert "CUDA" in line.why
