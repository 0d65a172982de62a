"""`uniflow.compile` on a GPU: compiled layers inside CUDA graphs, on parameters that are read where they are."""

import pytest
import torch

import uniflow
from uniflow import UniFlow, UniFlowConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def similar(ours, exact):
    return torch.cosine_similarity(ours.double(), exact.double(), dim=-1).mean()


@torch.no_grad()
def test_the_same_numbers_from_graphs():
    torch.manual_seed(0)
    config = UniFlowConfig.preset("base", num_hidden_layers=2, global_blocks_depth=1, num_decoder_layers=1)
    model = UniFlow(config).to("cuda", torch.bfloat16).eval()
    images = torch.randn(2, 3, 448, 448, device="cuda", dtype=torch.bfloat16)
    fast = uniflow.compile(model, batch=2, steps=1, dtype=torch.float32)
    print(fast)
    assert len(fast.encode._graphs) == len(fast.decode._graphs) == 1
    latents = model.encode(images)
    assert similar(fast.encode(images), latents) > 0.9995
    decoder = model.compile_decoder(2, steps=1, dtype=torch.float32)
    pictures = fast.decode(latents, seed=1)
    assert (pictures - decoder(latents, seed=1)).norm() < 0.05 * pictures.norm()
    model.encoder.layers[0].mlp.fc2.weight.mul_(3)
    assert similar(fast.encode(images), model.encode(images)) > 0.9995
    assert not torch.equal(model.encode(images), latents)
    assert fast(images[:1, :, :224], seed=1).shape == (1, 3, 224, 448)
    assert fast.report[0].op == "layers"
