"""UniFluid on a GPU: the numbers of the CPU, the head's graphs, and no waiting for the device."""

import warnings

import pytest
import torch

pytest.importorskip("transformers")

from tests.conftest import randomize
from tests.uniflow.unifluid.conftest import asked, texts
from uniflow.unifluid import UniFluid, UniFluidConfig, UniFluidObjective, draw_tokens
from uniflow.unifluid.captions import Drawings, Readings
from uniflow.unifluid.orders import draw_groups, draw_orders
from uniflow.unifluid.steps import Steps
from uniflow.unifluid.texts import make_text_tokenizer
from uniflow_kernels.modules import sampling

__all__ = ["asked", "texts"]  # fixtures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "initializer_range": 0.05,
}
N = 16


class Tokens(torch.nn.Module):
    channels, grid, image_size = 12, (4, 4), (8, 8)

    def encode(self, images):
        return torch.nn.functional.pixel_unshuffle(images, 2).flatten(2).transpose(1, 2)


class Vision(torch.nn.Module):
    width, image_size, merge = 12, (8, 8), 1

    def forward(self, images):
        return Tokens().encode(images)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = UniFluidConfig(LLAMA, 12, (4, 4), 256, 3, vision_channels=12)
    model = UniFluid(config, make_text_tokenizer(["a seven"], 300)).eval()
    randomize(model.head)
    return model


def seeded():
    return torch.Generator().manual_seed(1)


def test_steps_of_the_transformer_are_one_graph(model, texts, monkeypatch):
    """Captured once a drawing, in inference mode too; the numbers are those without a graph."""
    model = model.cuda()
    on_device = [part.cuda() for part in texts]
    order = draw_orders(2, N, "random", torch.device("cpu"), seeded()).cuda()
    kept = []
    end = Steps.end
    monkeypatch.setattr(Steps, "end", lambda self: kept.append(len(self._graphs)) or end(self))

    def drawn():
        return draw_tokens(model, *on_device, 6, head_steps=4, cfg=2.0, order=order, generator=seeded())

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error", UserWarning)  # a graph that could not be
        first, second = drawn(), drawn()
    model.layers()[0].register_forward_hook(lambda *_: None)  # has the steps run one by one
    assert torch.equal(first, second)
    torch.testing.assert_close(drawn(), first, rtol=1e-4, atol=1e-4)
    assert kept == [1, 1, 0]


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_drawing_is_that_of_the_cpu(model, texts, cfg):
    order = draw_orders(2, N, "random", torch.device("cpu"), seeded())
    expected = draw_tokens(model, *texts, 6, head_steps=10, cfg=cfg, order=order, generator=seeded())
    model = model.cuda()
    on_device = [part.cuda() for part in (*texts, order)]
    drawn = [
        draw_tokens(model, *on_device[:2], 6, head_steps=10, cfg=cfg, order=on_device[2], generator=seeded())
        for _ in range(3)
    ]
    assert len(sampling._GRAPHS[model.head]) > 0
    for tokens in drawn:
        torch.testing.assert_close(tokens.cpu(), expected, rtol=1e-2, atol=1e-2)


def test_a_generator_of_the_cpu_serves_both_heads(texts):
    for head in ("flow", "ddpm"):
        torch.manual_seed(0)
        config = UniFluidConfig(LLAMA, 12, (4, 4), 256, 3, head=head)
        model = UniFluid(config, make_text_tokenizer(["a seven"], 300)).eval().cuda()
        randomize(model.head)
        on_device = [part.cuda() for part in texts]
        first, second = (draw_tokens(model, *on_device, 6, head_steps=4, generator=seeded()) for _ in range(2))
        torch.testing.assert_close(first, second)


def test_states_are_those_of_the_cpu(model, texts):
    tokens = torch.randn(2, N, 12, generator=seeded())
    order = draw_orders(2, N, "random", torch.device("cpu"), seeded())
    groups = draw_groups(2, N, torch.device("cpu"))
    with torch.no_grad():
        expected = model.draw_states(tokens, *texts, order, groups)
        found = model.cuda().draw_states(*(part.cuda() for part in (tokens, *texts, order, groups)))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_masks_in_blocks_give_the_numbers_of_the_dense_one(texts):
    """States and gradients, soft caps and windows too, of a sequence of several blocks."""
    kinds = {"sliding_window": 50, "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    caps = {"model_type": "gemma2", "head_dim": 64, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 64}
    for own in ({}, {**kinds, **caps}):
        torch.manual_seed(0)
        config = UniFluidConfig({**LLAMA, "max_position_embeddings": 512, **own}, 12, (12, 12), 256, 3)
        model = UniFluid(config, make_text_tokenizer(["a seven"], 300)).cuda()
        ids, real = (part.cuda() for part in texts)
        order = draw_orders(2, 144, "random", ids.device)
        groups = draw_groups(2, 144, ids.device)
        tokens = torch.randn(2, 144, 12, device="cuda")
        found = []
        for training in (True, False):  # in training in blocks
            model.train(training).zero_grad()
            states = model.draw_states(tokens, ids, real, order, groups)
            states.square().mean().backward()
            found.append([states.detach(), *(p.grad for p in model.backbone.parameters() if p.grad is not None)])
        for blocks, dense in zip(*found, strict=True):
            torch.testing.assert_close(blocks, dense, rtol=1e-3, atol=1e-3 * float(dense.abs().max()))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_training_step_does_not_wait_for_the_gpu(model, texts, asked, autocast):
    model = model.cuda().train()
    objective = UniFluidObjective(model, Tokens(), Vision())
    ids, real = (part.cuda() for part in texts)
    question = [part.cuda() for part in asked(N)]
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8, device="cuda")
    answer = torch.ones(2, 2, dtype=torch.bool, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            losses = objective(Drawings(images, ids, real), Readings(images, *question, answer))
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return losses

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(value) for value in losses.measured().values())


def test_bfloat16(model, texts):
    model = model.to("cuda", torch.bfloat16)
    tokens = draw_tokens(model, *(part.cuda() for part in texts), 6, head_steps=10, cfg=2.0)
    assert tokens.dtype == torch.float32
    assert torch.isfinite(tokens).all()
