"""Layers in fp8 on a GPU: a scaled product beside the numbers that a CPU makes, and what a model makes of them."""

import copy

import pytest
import torch

from uniflow import EncoderTeacher, UniFlow, UniFlowConfig
from uniflow_kernels import fp8_linear
from uniflow_kernels.ops.fp8_linear import quantize, quantized, why_not_scaled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SCALED = pytest.mark.skipif(
    torch.cuda.is_available() and why_not_scaled(torch.device("cuda")) is not None,
    reason="needs compute capability 8.9",
)


def close(ours, exact):
    """Each sums in another order, and may round to the next bfloat16."""
    ours, exact = ours.cpu().double(), exact.double()
    assert ((ours - exact).abs() <= 2.0**-7 * exact.abs() + 1e-3 * exact.abs().mean()).all()
    assert (ours != exact).double().mean() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(1024, 3072, True), (4096, 1024, False), (48, 16, True)])
@pytest.mark.parametrize("rows", [1, 33, 1025])
def test_the_op_gives_the_numbers_of_a_cpu(rows, inputs, outputs, bias, dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(inputs, outputs, bias).to(dtype).requires_grad_(False)
    x = torch.randn(rows, inputs).to(dtype)
    x[0, 3] = 300
    exact = fp8_linear(x, linear.weight, linear.bias)
    linear.cuda()
    ours = fp8_linear(x.cuda(), linear.weight, linear.bias)
    assert ours.dtype == dtype
    close(ours, exact)
    assert torch.equal(fp8_linear(x.cuda(), linear.weight, linear.bias), ours)


def test_rows_of_zeros_and_numbers_that_are_none():
    linear = torch.nn.Linear(64, 32).cuda().requires_grad_(False)
    rows = torch.randn(4, 64, device="cuda")
    rows[0] = 0
    rows[1, 3], rows[2, 4] = torch.nan, torch.inf
    made = fp8_linear(rows, linear.weight, linear.bias)
    assert torch.equal(made[0], linear.bias.bfloat16().float())
    assert not made[1:3].isfinite().any()
    assert made[3].isfinite().all()
    assert fp8_linear(rows[:0], linear.weight, linear.bias).shape == (0, 32)
    on_cpu, scale = quantize(rows[3:].cpu())
    assert torch.equal(quantize(rows[3:])[0].cpu().view(torch.uint8), on_cpu.view(torch.uint8))
    assert torch.equal(quantize(rows[3:])[1].cpu(), scale)


@SCALED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [16, 1024, 4096, 16384])
def test_the_kernel_gives_the_bits_of_a_cpu(width, dtype):
    rows = (torch.randn(1025, width) * 10.0 ** torch.linspace(-4, 4, width)).to(dtype)
    rows[2] = 0
    for given in (rows, rows[:1], rows[::2]):
        exact, exact_scale = quantize(given)
        q, scale = quantized(given.cuda())
        assert torch.equal(scale.cpu(), exact_scale)
        assert torch.equal(q.cpu().view(torch.uint8), exact.view(torch.uint8))


def model():
    config = UniFlowConfig.preset("base", num_hidden_layers=2, global_blocks_depth=1, num_decoder_layers=1)
    torch.manual_seed(0)
    return UniFlow(config).to("cuda", torch.bfloat16).eval()


@SCALED
@torch.no_grad()
def test_a_model_compiled_and_in_graphs():
    exact = model()
    lowered = exact.at_precision("fp8")
    images = torch.randn(2, 3, 448, 448, device="cuda", dtype=torch.bfloat16)
    latents = lowered.encode(images)
    cosine = torch.cosine_similarity(latents.double(), exact.encode(images).double(), dim=-1).mean()
    assert 0.98 < cosine < 0.999999
    layer = copy.deepcopy(lowered.encoder.layers[0])
    state = lowered.embeddings(images)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)(state)
    similar = torch.cosine_similarity(compiled.double(), layer(state).double(), dim=-1).mean()
    assert similar > 0.9995  # numbers that a fused norm rounds otherwise are quantized otherwise
    encoder = exact.compile_encoder(2, precision="fp8")
    assert len(encoder._graphs) == 1
    assert torch.equal(encoder(images), latents)
    exact.encoder.layers[0].mlp.fc1.weight.mul_(1.5)
    changed = encoder(images)
    assert not torch.equal(changed, latents)
    assert torch.equal(changed, lowered.encode(images))


@torch.no_grad()
def test_a_teacher():
    student = model()
    images = torch.randn(1, 3, 448, 448, device="cuda", dtype=torch.bfloat16)
    teacher = EncoderTeacher.copy_of(student).lowered(precision="fp8")
    with torch.autocast("cuda", torch.bfloat16):
        taught = list(teacher.states(images))
    for ours, theirs in zip(taught, student.layer_states(images), strict=True):
        assert ours.dtype == torch.bfloat16
        assert 0.98 < torch.cosine_similarity(ours.double(), theirs.double(), dim=-1).mean() < 0.999999
