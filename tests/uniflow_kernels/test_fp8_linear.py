"""A linear layer in fp8: the quantized numbers by their definition, the op that multiplies them, and its module."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from uniflow_kernels import backend
from uniflow_kernels.modules.fp8_linear import Fp8Linear, lower, why_not_lowered
from uniflow_kernels.ops import fp8_linear as fp8
from uniflow_kernels.ops.fp8_linear import fp8_linear, fp8_linear_op, multiplied, quantize, quantized_layer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)


def e4m3(values):
    """The nearest number of e4m3, ties to even: four bits with the leading one, down to multiples of 2^-9."""
    exponent = torch.frexp(values).exponent.clamp(min=-5) - 4  # frexp's mantissa is below one
    unit = torch.ldexp(torch.ones_like(values), exponent)
    return (values / unit).round() * unit


def by_definition(rows):
    """Rows in float64, quantized and brought back."""
    scale = rows.double().abs().amax(1, keepdim=True).float() / 448
    return e4m3((rows.float() * (1 / scale)).double()) * scale.double()


def layer(inputs=48, outputs=32, bias=True, dtype=torch.float32):
    return torch.nn.Linear(inputs, outputs, bias).to(dtype).requires_grad_(False)


def exact(x, linear):
    """The outputs of the quantized numbers in float64, and the sum of products' magnitudes."""
    rows, weight = by_definition(x.flatten(0, -2)), by_definition(linear.weight)
    bias = 0 if linear.bias is None else linear.bias.bfloat16().double()
    made = rows @ weight.t() + bias, rows.abs() @ weight.abs().t()
    return [part.unflatten(0, x.shape[:-1]) for part in made]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_the_nearest_of_e4m3(dtype):
    rows = (torch.randn(9, 257) * 10.0 ** torch.linspace(-3, 3, 257)).to(dtype)
    q, scale = quantize(rows)
    assert q.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    assert torch.equal(q.double() * scale.double(), by_definition(rows))
    assert (q.float().abs().amax(1) == 448).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(48, 32, True), (16, 1040, False), (2064, 16, True)])
def test_the_op(dtype, inputs, outputs, bias):
    linear = layer(inputs, outputs, bias, dtype)
    x = torch.randn(2, 3, inputs).to(dtype)
    ours = fp8_linear(x, linear.weight, linear.bias)
    assert ours.dtype == dtype
    quantized, magnitudes = exact(x, linear)
    # the sum in float32, and its rounding to bfloat16
    assert ((ours - quantized).abs() <= 2.0**-8 * quantized.abs() + inputs * 2.0**-24 * magnitudes).all()
    plain = F.linear(x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double())
    assert 0.005 < (ours - plain).norm() / plain.norm() < 0.05
    assert torch.equal(fp8_linear(x, linear.weight, linear.bias), ours)


def test_the_product_is_torchs_scaled_one():
    (q, scale), linear = quantize(torch.randn(16, 64)), layer(64, 96)
    quantized = quantized_layer(linear.weight, linear.bias)
    try:
        theirs = fp8.scaled_product(q, scale, quantized)
    except NotImplementedError:
        pytest.skip("this torch has no scaled product on a CPU")
    ours = multiplied(q, scale, quantized)
    assert theirs.dtype == ours.dtype
    assert (ours != theirs).float().mean() < 0.01  # where the float32 sum lies between two numbers of bfloat16
    assert ((ours - theirs).abs() <= 2.0**-7 * theirs.abs() + 1e-6).all()


def test_zeros_outliers_and_numbers_that_are_none():
    linear = layer()
    rows = torch.randn(5, 48)
    rows[0] = 0
    rows[1, 3], rows[2, 4] = torch.nan, -torch.inf
    rows[4, 5] = 3e4  # beside which the others still have their bits
    made = fp8_linear(rows, linear.weight, linear.bias)
    assert torch.equal(made[0], linear.bias.bfloat16().float())
    assert not made[1:3].isfinite().any()
    assert made[3:].isfinite().all()
    without = by_definition(rows[4:])[0].index_fill(0, torch.tensor(5), 0)
    kept = rows[4].double().index_fill(0, torch.tensor(5), 0)
    assert (without - kept).norm() / kept.norm() < 0.05
    huge = torch.full((1, 48), torch.finfo(torch.float16).max, dtype=torch.float16)
    assert quantized_layer(linear.weight, linear.bias)(huge).isfinite().all()
    broken = layer()
    broken.weight[2, 1] = torch.inf
    assert fp8_linear(rows[3:], broken.weight).isfinite().logical_not().any(0).nonzero().tolist() == [[2]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 257, 4112])
def test_the_kernel_gives_the_bits_of_the_definition(dtype, width):
    pytest.importorskip("triton")
    rows = (torch.randn(7, 2 * width) * 10.0 ** torch.linspace(-4, 4, 2 * width)).to(dtype)[:, :width]
    rows[2] = 0
    rows[3, 5] = 0.4 * torch.finfo(dtype).max
    for given in (rows, rows.t().contiguous().t(), rows[:1], rows[:0]):
        with backend("triton"):
            q, scale = fp8.quantized(given)
        exact, divided_by = quantize(given)
        assert torch.equal(scale, divided_by)
        assert torch.equal(q.view(torch.uint8), exact.view(torch.uint8))


def test_where_the_kernel_serves(monkeypatch):
    pytest.importorskip("triton")
    from uniflow_kernels.triton_kernels import quantization

    launched, plain = [], quantization.quantize
    monkeypatch.setattr(quantization, "quantize", lambda *given: launched.append(given[0].shape) or plain(*given))
    linear, x = layer(), torch.randn(6, 48)
    exact = fp8_linear(x, linear.weight, linear.bias)
    assert not launched
    with backend("triton"):
        assert torch.equal(fp8_linear(x, linear.weight, linear.bias), exact)
        linear.weight.mul_(2)
        fp8_linear(x, linear.weight, linear.bias)
        assert launched == [(6, 48), (32, 48), (6, 48)]
        with torch.no_grad():
            wide = torch.randn(1, 16400)
            assert torch.equal(fp8.quantized(wide)[1], quantize(wide)[1])
    assert len(launched) == 3
    monkeypatch.setattr(fp8, "why_not_on", lambda *_: None)
    for arch, reason in ((80, "from compute capability 8.9 on"), (89, None)):
        monkeypatch.setattr(fp8, "architecture", lambda device, arch=arch: arch)
        found = fp8.why_not_kernel(torch.device("cuda"), torch.bfloat16, 64)
        assert found == reason or found.endswith(reason)


def test_no_rows_strided_rows_and_one_row():
    linear = layer()
    x = torch.randn(6, 48)
    whole = fp8_linear(x, linear.weight, linear.bias)
    assert fp8_linear(x[:0], linear.weight, linear.bias).shape == (0, 32)
    assert torch.equal(fp8_linear(torch.randn(48, 6).t().copy_(x), linear.weight, linear.bias), whole)
    assert torch.equal(fp8_linear(x.view(2, 3, 48), linear.weight, linear.bias), whole.view(2, 3, 32))
    one = fp8_linear(x[0], linear.weight, linear.bias)
    assert torch.allclose(one, whole[0], rtol=2.0**-7)  # whose float32 sum may have another order
    assert one.shape == (32,)


def test_autocast_and_inference_mode():
    linear, x = layer(), torch.randn(6, 48)
    outside = fp8_linear(x.bfloat16(), linear.weight, linear.bias)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fp8_linear(x, linear.weight, linear.bias)
    assert inside.dtype == torch.bfloat16
    assert torch.equal(inside, outside)  # products of float32 numbers also there
    with torch.inference_mode():
        assert torch.equal(fp8_linear(x.bfloat16(), linear.weight, linear.bias), outside)


def test_the_registered_op_compiles_whole_and_finds_the_weight_that_is_kept(monkeypatch):
    linear, x = layer(), torch.randn(6, 48)
    op = torch.ops.uniflow_kernels.fp8_linear.default
    torch.library.opcheck(op, (x, linear.weight, linear.bias))
    expected = fp8_linear(x, linear.weight, linear.bias)
    made = []
    monkeypatch.setattr(fp8, "quantized_layer", lambda *given: made.append(given) or quantized_layer(*given))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: fp8_linear(x, linear.weight, linear.bias), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    made.clear()  # where it was traced
    assert torch.equal(compiled(x), expected)
    assert torch.equal(op(x, linear.weight, linear.bias), fp8_linear_op(x, linear.weight, linear.bias))
    assert not made
    linear.weight.mul_(2)
    fp8_linear(x, linear.weight, linear.bias)
    assert len(made) == 1


def test_what_it_cannot_serve_is_said():
    linear, x = layer(), torch.randn(6, 48)
    with pytest.raises(ValueError, match="it is for inference and has no gradient"):
        fp8_linear(x.requires_grad_(), linear.weight)
    x.requires_grad_(False)
    with pytest.raises(ValueError, match="must be multiples of 16, not 48 and 30"):
        fp8_linear(x, linear.weight[:30])
    with pytest.raises(ValueError, match=r"x: expected \[..., 48\], got \(6, 32\)"):
        fp8_linear(x[:, :32], linear.weight)
    with pytest.raises(ValueError, match=r"bias: expected shape \(32,\), got \(48,\)"):
        fp8_linear(x, linear.weight, x[0])
    with pytest.raises(ValueError, match=r"weight: expected \[O, W\], got \(48,\)"):
        fp8_linear(x, x[0])
    with pytest.raises(TypeError, match=r"x: expected a floating point dtype, got torch\.int64"):
        fp8_linear(x.long(), linear.weight)
    assert fp8_linear(x.to("meta"), linear.weight.to("meta")).shape == (6, 32)
    with pytest.raises(ValueError, match="it runs on CUDA and on CPUs, not on xpu"):
        fp8.check_precision("fp8", torch.device("xpu"))
    with pytest.raises(ValueError, match="no rules for the transforms"):
        torch.func.vmap(lambda x: fp8_linear(x, linear.weight))(x)


def test_a_gpu_that_has_no_scaled_product_multiplies_in_float32(monkeypatch):
    monkeypatch.setattr(fp8, "why_not_on", lambda *_: None)
    monkeypatch.setattr(fp8, "architecture", lambda device: 80)
    runs, why = fp8.explain_fp8(torch.device("cuda"), 64)
    assert runs == "the same numbers in float32"
    assert "needs a GPU of compute capability 8.9 (Ada, Hopper or later), this one has 8.0" in why
    monkeypatch.setattr(fp8, "architecture", lambda device: 90)
    runs, why = fp8.explain_fp8(torch.device("cuda"), 64)
    assert runs.endswith("one scaled product by cuBLAS or CUTLASS")
    assert why == "unmeasured on this GPU"


def test_the_module_has_the_parameters_of_the_layer_that_it_stands_for():
    linear, x = layer(), torch.randn(6, 48)
    module = Fp8Linear.of(linear)
    ours = module(x)
    assert torch.equal(ours, fp8_linear(x, linear.weight, linear.bias))
    assert module.weight is linear.weight
    assert list(module.state_dict()) == list(linear.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), ours)
        other.load_state_dict({"weight": 2 * linear.weight, "bias": 2 * linear.bias})
        assert torch.equal(other(x), 2 * ours)
    assert torch.equal(module(x), ours)
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert Fp8Linear.of(layer(bias=False)).bias is None


def test_which_layers_of_a_module_are_lowered():
    class Other(torch.nn.Linear):
        """Which may compute anything."""

    inner = torch.nn.Sequential(layer(48, 30), layer())
    model = torch.nn.ModuleList([layer(), Other(48, 32), inner, layer()])
    model[3].register_forward_hook(lambda *_: None)
    keys = list(model.state_dict())
    assert lower(model) == 2
    assert [type(part) is Fp8Linear for part in (*model, *inner)] == [True, False, False, False, False, True]
    assert list(model.state_dict()) == keys
    assert why_not_lowered(model[1]) == why_not_lowered(model[3]) == "it is of another class, wrapped, or has a hook"
    assert why_not_lowered(inner[0]) == "its inputs and outputs must be multiples of 16, not 48 and 30"
    assert lower(model) == 0
