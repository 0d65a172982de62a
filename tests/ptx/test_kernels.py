"""Every kernel of flow head and layers as it is compiled: both passes, sizes that end inside tiles, the 2x rule."""

import pytest
import torch

from tests.ptx.session import unwritten_is_nan
from tests.uniflow_kernels import (
    test_compared_norm,
    test_dual_rows,
    test_mlp,
    test_modulated_norm,
    test_transformer_layers,
    test_transformer_mlp,
)
from tests.uniflow_kernels.test_flow_blocks import OPTIONS, against_definition, make_head
from uniflow_kernels import backend
from uniflow_kernels.ops import fp8_linear


@pytest.mark.parametrize(
    ("name", "dtype", "width", "hidden"),
    [
        ("canonical", torch.bfloat16, 144, 272),
        pytest.param("canonical", torch.bfloat16, 136, 264, marks=pytest.mark.slow),
        pytest.param("VibeVoice", torch.float16, 144, 136, marks=pytest.mark.slow),
    ],
)
def test_products(within_twice, name, dtype, width, hidden):
    """Rows of 144 are aligned enough for cp.async, those of 136 not."""
    head = make_head(width, 1, **{**OPTIONS[name], "hidden": hidden})
    floor = 1e-2 if dtype == torch.bfloat16 else 1e-3
    with unwritten_is_nan():
        against_definition(within_twice, head, (130,), (130,), dtype, "none", floor, "products")


@pytest.mark.parametrize(
    ("name", "dtype", "rows", "conditions"),
    [
        ("canonical", torch.bfloat16, (21,), (21,)),
        pytest.param("VibeVoice", torch.float32, (2, 65), (2, 1), marks=pytest.mark.slow),
    ],
)
def test_rows(within_twice, name, dtype, rows, conditions):
    floor = 1e-2 if dtype == torch.bfloat16 else 2e-6
    with unwritten_is_nan():
        against_definition(within_twice, make_head(72, 1, **OPTIONS[name]), rows, conditions, dtype, "none", floor)


@pytest.mark.parametrize(
    ("name", "width", "hidden"),
    [
        ("ViT", 144, 272),
        pytest.param("rms", 136, 264, marks=pytest.mark.slow),
        pytest.param("tanh", 144, 136, marks=pytest.mark.slow),
    ],
)
def test_layers(within_twice, name, width, hidden):
    """Norms folded into products, GELU by tanh.approx, residuals and the moments that they leave."""
    _, _, form, there = test_transformer_layers.FORMS[name]
    layers = test_transformer_layers.make(width, hidden, torch.bfloat16, **there)
    x = test_transformer_layers.tokens((2, 65, width), torch.bfloat16)
    with unwritten_is_nan():
        test_transformer_layers.against_definition(within_twice, layers, x, form, "products", 1e-2)


@pytest.mark.parametrize(
    ("activation", "dtype", "width", "hidden"),
    [
        ("gelu", torch.bfloat16, 144, 272),
        pytest.param("gelu", torch.float16, 136, 264, marks=pytest.mark.slow),
        pytest.param("gelu_pytorch_tanh", torch.bfloat16, 136, 136, marks=pytest.mark.slow),
    ],
)
def test_the_mlp_in_training(within_twice, activation, dtype, width, hidden):
    """The activation's gradient in the backward product."""
    given = test_transformer_mlp.make(dtype, shape=(130, width), hidden=hidden)
    floor = 1e-2 if dtype == torch.bfloat16 else 1e-3
    with unwritten_is_nan():
        test_transformer_mlp.against_definition(within_twice, given, activation, "products", floor)


def test_an_mlp(within_twice):
    """Positions that begin anew inside a tile."""
    with unwritten_is_nan():
        given = test_mlp.make(64, 136, 144, torch.bfloat16, shape=(2, 65))
        test_mlp.against_definition(within_twice, given, "products", floor=1e-2)


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 144), (torch.float32, 1030)])
def test_quantization(request, dtype, width):
    """The bits of the definition, by the conversion that a GPU has from sm_89 on."""
    if request.config.getoption("--emulate") == "80":
        pytest.skip("sm_80 has no 8-bit floats")
    rows = (torch.randn(9, width) * 10.0 ** torch.linspace(-4, 4, width)).to(dtype)
    rows[2], rows[3, 1] = 0, torch.nan
    with unwritten_is_nan(), backend("triton"):
        q, scale = fp8_linear.quantized(rows)
    finite = torch.arange(9) != 3
    exact, exact_scale = fp8_linear.quantize(rows[finite])
    assert torch.equal(scale[finite], exact_scale)
    assert torch.equal(q[finite].view(torch.uint8), exact.view(torch.uint8))
    assert q[3, 1].isnan()


@pytest.mark.parametrize(
    ("without", "dtype"),
    [
        (test_modulated_norm.PLAIN, torch.bfloat16),
        pytest.param(("gate", *test_modulated_norm.PLAIN), torch.float32, marks=pytest.mark.slow),
    ],
    ids=["LayerScale", "no LayerScale"],
)
def test_residual_and_norm(within_twice, without, dtype):
    """LayerScale, whose gradient is summed over all rows in the kernel, and no modulation."""
    given = test_modulated_norm.inputs("one for all", dtype, without=without)
    exact, plain = (
        test_modulated_norm.results(test_modulated_norm.definition, given, d) for d in (torch.float64, dtype)
    )
    with unwritten_is_nan(), backend("triton"):
        found = test_modulated_norm.results(test_modulated_norm.ours, given, dtype)
    for mine, theirs, truth in zip(found, plain, exact, strict=True):
        within_twice(mine, theirs, truth)


@pytest.mark.parametrize(
    ("form", "dtype", "teacher_dtype"),
    [
        ("the release's", torch.bfloat16, torch.bfloat16),
        pytest.param("no LayerScale", torch.float32, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_residual_norm_and_distance(within_twice, form, dtype, teacher_dtype):
    with unwritten_is_nan(), backend("triton"):
        test_compared_norm.against_definition(within_twice, form, (2, 19, 24), dtype, teacher_dtype)


@pytest.mark.parametrize(
    ("form", "dtype", "width"),
    [
        ("the release's", torch.bfloat16, 72),
        pytest.param("rms, swiglu, groups", torch.float32, 37, marks=pytest.mark.slow),
    ],
)
def test_values_with_tangents(within_twice, form, dtype, width):
    floor = 1e-2 if dtype == torch.bfloat16 else 1e-5
    with unwritten_is_nan():
        for stop_tangent in (False, True):
            test_dual_rows.against_definition(within_twice, form, dtype, 5, width, stop_tangent, floor)
