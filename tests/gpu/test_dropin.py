"""Other projects' heads, blocks and layers on a GPU, patched: numbers and gradients of the kernels against float64."""

import copy

import pytest
import torch

from tests.conftest import randomize
from tests.dropin.stand_ins import PROJECTS
from tests.dropin.test_blocks import BLOCKS
from tests.dropin.test_blocks import INPUTS as OF_BLOCKS
from tests.dropin.test_encoder_layers import FAMILIES, WIDTH, made, others
from tests.dropin.test_heads import DISTINCT, compare, outputs_and_gradients
from uniflow_kernels import backend, patch
from uniflow_kernels.dropin import encoder_layers
from uniflow_kernels.ops.transformer_layers import choose_layers_path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def on_gpu(value):
    return value.cuda() if torch.is_tensor(value) else value


@pytest.mark.parametrize("name", DISTINCT)
def test_numbers_and_gradients(name, within_twice):
    project = PROJECTS[name]
    head = randomize(project.make()).cuda()
    inputs, kwargs = [on_gpu(v) for v in project.inputs], {k: on_gpu(v) for k, v in project.kwargs.items()}
    exact = outputs_and_gradients(copy.deepcopy(head).double(), inputs, kwargs, torch.float64)
    before = outputs_and_gradients(head, inputs, kwargs, torch.float32)
    patch(head, strict=True)
    after = outputs_and_gradients(head, inputs, kwargs, torch.float32)
    compare(after, before, exact, within_twice, floor=2e-6)


@pytest.mark.parametrize("name", BLOCKS)
def test_numbers_and_gradients_of_transformer_blocks(name, within_twice):
    make, kwargs = BLOCKS[name]
    block, inputs = randomize(make()).cuda(), [on_gpu(value) for value in OF_BLOCKS]
    kwargs = {key: on_gpu(value) for key, value in kwargs.items()}
    exact = outputs_and_gradients(copy.deepcopy(block).double(), inputs, kwargs, torch.float64)
    before = outputs_and_gradients(block, inputs, kwargs, torch.float32)
    patch(block, strict=True)
    after = outputs_and_gradients(block, inputs, kwargs, torch.float32)
    compare(after, before, exact, within_twice, floor=2e-6)


@pytest.mark.parametrize("path", ["rows", "products", "small products"])
@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_of_layers_of_vision_transformers(name, path, within_twice, monkeypatch):
    """Two layers in bfloat16, of which the second takes what the products of the first left."""
    layers = torch.nn.ModuleList([made(name, torch.bfloat16), made(name, torch.bfloat16)]).cuda()
    x = torch.randn(4, 33, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()

    def run(layers, x):
        given = {key: tuple(map(on_gpu, value or ())) or None for key, value in others(layers[0], 33, x.dtype).items()}
        with torch.no_grad():
            return layers[1](layers[0](x, **given), **given)

    before, exact = run(layers, x), run(copy.deepcopy(layers).double(), x.double())
    patch(layers, strict=True)
    monkeypatch.setattr(encoder_layers, "choose_layers_path", lambda *given: choose_layers_path(*given, path))
    with backend("triton"):
        within_twice(run(layers, x), before, exact)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_layers_of_vision_transformers(name, within_twice):
    layer, x = made(name).cuda(), torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).cuda()

    def found(layer, dtype):
        given = {key: tuple(map(on_gpu, value or ())) or None for key, value in others(layer, 5, dtype).items()}
        leaf = x.to(dtype).requires_grad_()
        leaves = {"x": leaf, **dict(layer.named_parameters())}
        out = layer(leaf, **given)
        return {
            "out": out.detach(),
            **dict(zip(leaves, torch.autograd.grad(out.sum(), list(leaves.values())), strict=True)),
        }

    exact, before = found(copy.deepcopy(layer).double(), torch.float64), found(layer, torch.float32)
    patch(layer, strict=True)
    compare(found(layer, torch.float32), before, exact, within_twice, floor=2e-6)
