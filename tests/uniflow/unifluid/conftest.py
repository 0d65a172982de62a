import pytest
import torch

pytest.importorskip("transformers")

from uniflow.unifluid.config import UniFluidConfig
from uniflow.unifluid.drawing import Sources
from uniflow.unifluid.model import UniFluid
from uniflow.unifluid.slots import FEATURES, TOKENS
from uniflow.unifluid.texts import make_text_tokenizer

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def text_tokenizer():
    return make_text_tokenizer(["a seven", "which digit?"], 300)


@pytest.fixture
def make_model(text_tokenizer):
    """A small model, all of whose parameters matter (a new head's output is zero)."""

    def make(backbone=None, seed=0, encoder=None, **changes):
        values = {"token_channels": 5, "grid": (3, 4), "head_width": 32, "head_depth": 2, "vision_channels": 7}
        torch.manual_seed(seed)
        config = UniFluidConfig({**LLAMA, **(backbone or {})}, **{**values, **changes})
        model = UniFluid(config, text_tokenizer, vision=encoder).eval()
        for parameter in model.head.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return model

    return make


@pytest.fixture
def texts():
    """Ids [2, 5] of two texts, the second of which is shorter, and which of them are real."""
    ids = torch.randint(3, 300, (2, 5), generator=torch.Generator().manual_seed(0))
    real = torch.ones(2, 5, dtype=torch.bool)
    real[1, :2] = False
    return ids, real


@pytest.fixture
def asked(texts):
    """Those texts with slots for the features of a picture before each: 4 of them, or others."""

    def with_slots(features=4, ids=None, real=None):
        ids, real = texts if ids is None else (ids, real)
        slots = torch.full((len(ids), features), FEATURES)
        return torch.cat([slots, ids], 1), torch.cat([torch.ones_like(slots, dtype=torch.bool), real], 1)

    return with_slots


@pytest.fixture
def edits(texts):
    """Two prompts with two sources each, of 4 features and 12 clean tokens, and what is seen of these."""
    ids, real = texts
    before = torch.tensor([[FEATURES] * 4 + [TOKENS] * 12] * 2).repeat(1, 2)
    generator = torch.Generator().manual_seed(3)
    sources = Sources(torch.randn(4, 4, 7, generator=generator), torch.randn(4, 12, 5, generator=generator))
    return torch.cat([before, ids], 1), torch.cat([torch.ones_like(before, dtype=torch.bool), real], 1), sources
