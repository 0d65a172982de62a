"""The compiled encoder on a GPU: latents from graphs, weights in place, no waiting."""

import pytest
import torch

from uniflow import UniFlow, UniFlowConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_replays_are_equal_to_encode_see_new_weights_and_do_not_wait():
    config = UniFlowConfig.preset("base", num_hidden_layers=2, global_blocks_depth=1, num_decoder_layers=1)
    model = UniFlow(config).to("cuda", torch.bfloat16).eval()
    encoder = model.compile_encoder(2)
    assert len(encoder._graphs) == 1
    images = torch.randn(2, 3, 448, 448, device="cuda", dtype=torch.bfloat16)
    for step in range(3):
        with torch.no_grad():
            model.chal_proj.c_proj.bias.add_(0.1 * step)
            expected = model.encode((1 + step) * images)
        assert torch.equal(encoder((1 + step) * images), expected)
    for graphs in (1, 2, 2):
        with torch.no_grad():
            expected = model.encode(images[:1, :, :224])
        assert torch.equal(encoder(images[:1, :, :224]), expected)
        assert len(encoder._graphs) == graphs
    torch.cuda.set_sync_debug_mode("error")
    try:
        encoder(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
