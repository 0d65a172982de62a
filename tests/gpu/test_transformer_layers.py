"""Transformer layers on a GPU: every path against the definition, in the sizes of the base preset and in odd ones."""

import pytest
import torch
from torch import nn

from tests.conftest import randomize
from tests.uniflow_kernels import test_mlp
from tests.uniflow_kernels import test_transformer_layers as on_cpu
from tests.uniflow_kernels import test_transformer_mlp as mlp_on_cpu
from uniflow.transformer import TransformerLayer, kernel_states, last_of
from uniflow_kernels import backend
from uniflow_kernels.ops.transformer_layers import KERNELS, LayerForm
from uniflow_kernels.ops.transformer_mlp import transformer_mlp
from uniflow_kernels.triton_kernels.products import ARCHITECTURES, architecture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("exact_float32"),
]


@pytest.fixture(params=KERNELS)
def path(request):
    made = ARCHITECTURES.get(architecture(torch.device("cuda")))
    if request.param != "rows" and (made is None or (request.param == "small products" and made.small is None)):
        pytest.skip("it has no such tiles for this GPU")
    return request.param


@pytest.mark.parametrize(
    ("name", "shape", "hidden"),
    [("ViT", (2, 1025, 1024), 4096), ("no LayerScale, no bias", (3, 130, 136), 264), ("rms", (1, 67, 144), 272)],
)
def test_numbers(within_twice, path, name, shape, hidden):
    _, _, form, there = on_cpu.FORMS[name]
    layers = on_cpu.make(shape[-1], hidden, torch.bfloat16, device="cuda", **there)
    on_cpu.against_definition(within_twice, layers, on_cpu.tokens(shape, torch.bfloat16, "cuda"), form, path, 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "hidden"), [((2, 1025, 1024), 4096), ((67, 136), 264)])
def test_the_mlp_in_training(within_twice, path, dtype, shape, hidden):
    if path == "rows":
        pytest.skip("it has no row kernels")
    given = mlp_on_cpu.make(dtype, shape=shape, hidden=hidden, device="cuda")
    found = mlp_on_cpu.against_definition(within_twice, given, "gelu", path, 1e-3)
    with backend("triton"):
        assert all(map(torch.equal, found, mlp_on_cpu.results(transformer_mlp, *given, "gelu", path)))


@pytest.mark.parametrize("sizes", [(1024, 1024, 64), (64, 1024, 1024), (40, 136, 24)])
def test_an_mlp(within_twice, path, sizes):
    """Those around the latent, whose positions begin anew with each picture."""
    if path == "rows":
        pytest.skip("plain PyTorch")
    given = test_mlp.make(*sizes, torch.bfloat16, shape=(3, 256 if 64 in sizes else 67), device="cuda")
    test_mlp.against_definition(within_twice, given, path, floor=1e-3)


@pytest.mark.parametrize("name", on_cpu.ROWS)
def test_a_folded_norm_of_rows_with_large_means_and_outlier_channels(within_twice, name):
    """On tensor cores, whose sums are not rounded as float32 ones are."""
    x = on_cpu.ROWS[name](on_cpu.tokens((300, 1024))).to("cuda", torch.bfloat16)
    affine = on_cpu.Affine(*(t.to("cuda", torch.bfloat16) for t in on_cpu.random_linear(1024, 1024)))
    norm = on_cpu.Affine(*(t.cuda() for t in on_cpu.of_norm(1024, 0.01, torch.bfloat16)))
    within_twice(*on_cpu.folded(x, norm, affine))


def test_a_graph_gives_the_same_bits_and_sees_new_weights(path):
    layers = randomize(nn.ModuleList(TransformerLayer(256, 4, 1024, layer_scale=0.5) for _ in range(2)))
    layers = layers.to("cuda", torch.bfloat16).requires_grad_(False).eval()
    x = torch.randn(2, 257, 256, device="cuda").bfloat16()

    def run():
        with backend("triton"):
            return last_of(kernel_states(layers, x, path), x)

    expected, stream, graph = run(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        out = run()
    graph.replay()
    assert torch.equal(out, expected)
    layers[0].norm1.weight.mul_(1.5)
    graph.replay()
    assert torch.equal(out, run())
    assert not torch.equal(out, expected)


def test_samples_are_left_out_without_waiting_for_the_gpu():
    """As many as are drawn; the same in both passes, and what is computed is what a mask would leave."""
    layer = randomize(TransformerLayer(256, 4, 512, layer_scale=0.5, drop_path=0.5)).cuda()
    x = torch.randn(8, 65, 256, device="cuda", requires_grad=True)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = layer(x)
            gradients = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found.append([out, *gradients])
    assert all(map(torch.equal, *found))
    torch.manual_seed(3)
    masks = [(2.0 * (torch.rand(8) >= 0.5)).cuda()[:, None, None] for _ in range(2)]
    total = x + masks[0] * layer.attn(layer.norm1(x)) * layer.ls1
    total = total + masks[1] * layer.mlp(layer.norm2(total)) * layer.ls2
    torch.testing.assert_close(found[0][0], total, rtol=1e-4, atol=1e-4)


def test_memory_checker_finds_nothing(sanitized):
    sanitized(
        "import torch\nfrom torch import nn\nfrom uniflow.transformer import TransformerLayer, kernel_states, last_of\n"
        "from uniflow_kernels import backend\n"
        "for rows, width in ((130, 144), (67, 1024)):\n"
        "    layers = nn.ModuleList([TransformerLayer(width, width // 16, 2 * width, layer_scale=0.5)])\n"
        "    layers = layers.to('cuda', torch.bfloat16).requires_grad_(False).eval()\n"
        "    x = torch.randn(1, rows, width, device='cuda').bfloat16()\n"
        "    with backend('triton'):\n"
        "        last_of(kernel_states(layers, x, 'products'), x)\n"
    )


def test_the_form_of_a_layer_with_rms_norms_runs_too(within_twice, path):
    """Whose norms round twice in their own forward."""
    layers = randomize(nn.ModuleList([TransformerLayer(256, 4, 512, norm_type="rms_norm", qk_normalization=True)]))
    layers = layers.to("cuda", torch.bfloat16).requires_grad_(False).eval()
    assert layers[0].form == LayerForm("rms", 1e-5, "gelu")
    x = torch.randn(2, 257, 256, device="cuda").bfloat16()
    with backend("triton"):
        found = last_of(kernel_states(layers, x, path), x)
    plain = layers[0](x)
    within_twice(found, plain, layers.double()[0](x.double()), 1e-3)
