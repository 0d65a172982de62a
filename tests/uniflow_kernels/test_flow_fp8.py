"""Modulations in fp8: the quantized numbers by their definition, and the head that runs on them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import randomize
from tests.uniflow_kernels.test_flow_blocks import options
from tests.uniflow_kernels.test_fp8_linear import by_definition
from uniflow_kernels import FlowHead, backend, flow_matching_loss, fused_flow_blocks
from uniflow_kernels.ops import flow_fp8
from uniflow_kernels.ops.flow_blocks import FromLayers, flow_blocks
from uniflow_kernels.ops.flow_fp8 import QuantizedLayers
from uniflow_kernels.ops.flow_head import fp8_flow_blocks_op
from uniflow_kernels.ops.fp8_linear import check_precision, explain_fp8, why_not_fp8

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


def make_head(width=48, depth=4, dtype=torch.float32, **how):
    return randomize(FlowHead(12, width, 12, 20, depth, **how)).to(dtype).requires_grad_(False)


def inputs(rows=7, conditions=None, width=48, dtype=torch.float32):
    return torch.randn(rows, 12).to(dtype), 2 * torch.randn(rows if conditions is None else conditions, width).to(dtype)


def in_float64(head, y):
    """All modulations, of quantized numbers and of those that they stand for, and the sum of products' magnitudes."""
    _, modulations, final = head.tensors()
    layers = [*modulations, *([] if final is None else [final])]
    weight = torch.cat([layer.weight for layer in layers])
    bias = 0.0 if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    a = F.silu(y)
    rounded = bias if isinstance(bias, float) else bias.bfloat16().double()
    quantized = by_definition(a) @ by_definition(weight).t() + rounded
    plain = a.double() @ weight.double().t() + (bias if isinstance(bias, float) else bias.double())
    return quantized, plain, a.double().abs() @ weight.double().abs().t()


def modulations_of(head, y):
    _, modulations, final = head.tensors()
    return QuantizedLayers.of(modulations, final)(F.silu(y))


@options
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product(options, dtype):
    head = make_head(dtype=dtype, **options)
    _, y = inputs(dtype=dtype)
    ours = modulations_of(head, y)
    assert ours.dtype == torch.bfloat16
    quantized, plain, magnitudes = in_float64(head, y)
    # the sum in float32, and its rounding to bfloat16
    assert ((ours - quantized).abs() <= 2.0**-8 * quantized.abs() + 48 * 2.0**-24 * magnitudes).all()
    # an eighth for the two roundings to e4m3, 2^-10 of a row's largest number (in both factors) where it is subnormal
    assert ((ours - plain).abs() <= (0.13 * magnitudes + 0.05 * magnitudes.mean() + 2.0**-8 * plain.abs())).all()
    assert ((ours - plain).norm() / plain.norm()) < 0.05


def test_rows_of_zeros_and_numbers_that_are_none():
    rows = torch.randn(4, 32)
    rows[0] = 0
    rows[1, 3], rows[2, 4] = torch.nan, -torch.inf
    layers = QuantizedLayers.of(*make_head(width=32).tensors()[1:])
    made = layers(rows)
    assert torch.equal(made[0], layers.bias)
    assert not made[1:3].isfinite().any()
    assert made[3].isfinite().all()
    head = make_head(precision="fp8", depth=1)
    head.res_blocks[0].adaLN_modulation[1].weight[0, 0] = torch.inf
    assert head.from_embedding(*inputs()).isnan().any(1).all()


def run(head, x, y, name, path="auto"):
    with backend(name):
        return fused_flow_blocks(
            head.input_proj(x), y, *head.tensors(), **head.form._asdict(), path=path, precision="fp8"
        )


@options
@pytest.mark.parametrize("conditions", [None, 1])
@pytest.mark.parametrize("name", ["eager", "triton"])
def test_blocks_on_these_modulations(within_twice, options, conditions, name):
    head, (x, y) = make_head(**options), inputs(conditions=conditions)
    ours = run(head, x, y, name)
    x = head.input_proj(x)
    blocks, modulations, final = head.tensors()
    given = QuantizedLayers.of(modulations, final).given(F.silu(y), x.dtype)
    plain = flow_blocks(x, blocks, given, head.form)
    blocks = [type(b)(*(type(p)(*(t if t is None else t.double() for t in p)) for p in b)) for b in blocks]
    given = type(given)([g.double() for g in given.groups], None if given.final is None else given.final.double())
    within_twice(ours, plain, flow_blocks(x.double(), blocks, given, head.form), floor=1e-5)
    unquantized = flow_blocks(x, head.tensors()[0], FromLayers(F.silu(y), modulations, final), head.form)
    assert 1e-4 < (ours - unquantized).norm() / unquantized.norm() < 0.1


@pytest.mark.parametrize("name", ["eager", "triton"])
@pytest.mark.parametrize("shape", [(3, 5, 48), (3, 1, 48), (1, 5, 48), (1, 1, 48), (5, 48), (48,)])
def test_rows_that_share_a_condition_in_chunks(monkeypatch, name, shape):
    head, x, y = make_head(), torch.randn(3, 5, 12), torch.randn(shape)
    whole = run(head, x, y.expand(3, 5, 48), name)
    made = []
    plain = QuantizedLayers.given
    monkeypatch.setattr(QuantizedLayers, "given", lambda self, a, dtype: made.append(len(a)) or plain(self, a, dtype))
    monkeypatch.setattr(flow_fp8, "CHUNK_ROWS", 2)
    in_chunks = run(head, x, y, name)
    assert torch.allclose(in_chunks, whole, atol=2e-3)  # a sum may round to the next bfloat16
    assert sum(made) == y.numel() // 48
    assert max(made) <= 2


@pytest.mark.parametrize("name", ["eager", "triton"])
def test_strided_rows_no_rows_and_equal_bits(name):
    head, (x, y) = make_head(), inputs(rows=9)
    first = run(head, x, y, name)
    assert torch.equal(run(head, x, y, name), first)
    strided = torch.randn(9, 24)[:, ::2].copy_(x), torch.randn(48, 9).t().copy_(y)
    assert torch.equal(run(head, *strided, name), first)
    for conditions in (0, 1):
        assert run(head, x[:0], y[:conditions], name).shape == (0, 48)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", ["eager", "triton"])
def test_half_precision_and_autocast(dtype, name):
    head, (x, y) = make_head(), inputs()
    exact = run(head, x, y, name)
    with torch.autocast("cpu", dtype):
        ours = run(head, x, y, name)
    assert ours.dtype == dtype
    error = (ours - exact).norm() / exact.norm()
    assert error < 0.02  # of the products in half precision: the quantized weights are those of the float32 ones
    assert run(head.to(dtype), x.to(dtype), y.to(dtype), name).dtype == dtype


def test_the_module_and_what_is_kept_of_its_weights():
    head, (x, y) = make_head(), inputs()
    plain = head.from_embedding(x, y)
    head.precision = "fp8"
    ours = head.from_embedding(x, y)
    assert not torch.equal(ours, plain)
    assert torch.equal(head.final_layer.linear(run(head, x, y, "auto")), ours)
    assert head.quantized() is head.quantized()
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other.from_embedding(x, y), ours)
    layer = head.res_blocks[1].adaLN_modulation[1]
    layer.weight.mul_(2)
    changed = head.from_embedding(x, y)
    assert not torch.equal(changed, ours)
    layer.weight.div_(2)
    assert torch.equal(head.from_embedding(x, y), ours)
    assert "modulations in fp8: the same numbers in float32" in head.explain()
    head.precision = None
    assert torch.equal(head.from_embedding(x, y), plain)


def test_compiles_whole_without_recompiling_for_another_number_of_rows():
    head = make_head(precision="fp8", depth=1)
    x, t, c = torch.randn(9, 12), 1000 * torch.rand(9), torch.randn(9, 20)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")  # inductor takes 12 s, and has nothing to fuse
    for rows in (9, 5, 3):
        with torch._dynamo.config.patch(error_on_recompile=rows == 3):
            ours = compiled(x[:rows], t[:rows], c[:rows])
        assert torch.allclose(ours, head(x[:rows], t[:rows], c[:rows]), atol=2e-3)


def test_the_registered_op():
    head, (x, y) = make_head(), inputs()
    blocks, modulations, final = head.tensors()
    weights = [tensor for block in blocks for affine in block for tensor in affine]
    x = head.input_proj(x)
    arguments = (x, F.silu(y), *QuantizedLayers.of(modulations, final), weights, 1, *head.form, "eager")
    op = torch.ops.uniflow_kernels.fp8_flow_blocks.default
    # not its schema, for whose check torch would multiply 8-bit floats
    torch.library.opcheck(op, arguments, test_utils=("test_faketensor", "test_aot_dispatch_dynamic"))
    assert torch.equal(op(*arguments), fp8_flow_blocks_op(*arguments))


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_sampling_a_few_rows_or_many(monkeypatch, cfg):
    """Modulations made together for many steps are those that each step makes."""
    head, condition, noise = make_head(), torch.randn(5, 20), torch.randn(5, 12)
    plain = head.sample(condition, 5, noise=noise, cfg=cfg)
    head.precision = "fp8"
    ours = head.sample(condition, 5, noise=noise, cfg=cfg)
    assert not torch.allclose(ours, plain, atol=1e-5)
    monkeypatch.setattr("uniflow_kernels.modules.sampling.ROWS_AHEAD", 0)
    assert torch.allclose(head.sample(condition, 5, noise=noise, cfg=cfg), ours, atol=5e-3)


def test_what_it_cannot_serve_is_said():
    with pytest.raises(ValueError, match="precision: expected one of fp8, got 'fp4'"):
        FlowHead(12, 32, 12, 20, 1, precision="fp4")
    head, (x, y) = make_head(precision="fp8"), inputs()
    with pytest.raises(ValueError, match="path 'products' cannot serve this input"):
        run(head, x, y, "triton", path="products")
    with pytest.raises(ValueError, match="'fp8' cannot serve: it has no rules for the transforms"):
        torch.func.jvp(lambda x: head.from_embedding(x, y), (x,), (x,))
    head.precision = "fp4"
    with pytest.raises(ValueError, match="precision: expected one of fp8, got 'fp4'"):
        head.from_embedding(x, y)
    head.precision = "fp8"
    head.res_blocks[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="a submodule was replaced, wrapped or given a hook"):
        head.from_embedding(x, y)


def test_it_is_not_for_training():
    head = make_head(precision="fp8", width=32).requires_grad_()
    x, y = torch.randn(4, 12), torch.randn(4, 32)
    with pytest.raises(ValueError, match="it is for inference and has no gradient"):
        head.from_embedding(x, y)
    with torch.no_grad():
        head.from_embedding(x, y)
    images, t = torch.rand(1, 3, 4, 4), torch.rand(1)
    head = FlowHead(12, 32, 12, 20, 1, precision="fp8")
    with pytest.raises(ValueError, match="has no gradient"):
        flow_matching_loss(head, torch.randn(1, 4, 20), images, t, patch_size=2, seed=0, chunk_tokens=2)


def test_gpus_and_widths():
    assert why_not_fp8(torch.device("cuda"), 64) is None
    with pytest.raises(ValueError, match="a multiple of 16, not 40"):
        check_precision("fp8", torch.device("cuda"), 40)
    assert explain_fp8(torch.device("cuda"), 40)[0] == "nothing"
