"""Masks in blocks and masks of all pairs: one rule, the same numbers."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from tests.uniflow.unifluid.test_backbones import FAMILIES, PARTS
from uniflow.unifluid import attention, backbone
from uniflow.unifluid.attention import NEVER, Sight, why_not_blocks
from uniflow.unifluid.config import UniFluidConfig
from uniflow.unifluid.model import UniFluid

BLOCK = 128
SIDE, TEXT = 12, 20
N = SIDE * SIDE
CAN = ("llama", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3")


def sight(device="cpu", earlier=40):
    """Text of which a part is padding, content in steps of three, and queries; behind columns of before."""
    groups = torch.arange(N, device=device) // 3
    text = torch.arange(TEXT, device=device)
    padding = torch.full((5,), NEVER, device=device)
    visible = torch.cat([padding, text[5:], TEXT + groups, torch.full_like(groups, NEVER)])
    sees = torch.cat([-torch.ones_like(padding), text[5:], TEXT + groups, TEXT + groups - 1])
    places = torch.randperm(N, generator=torch.Generator().manual_seed(0)).to(device) + TEXT
    position = torch.cat([text, places, places])
    before = torch.arange(earlier, device=device)
    own = torch.arange(len(sees), device=device) + earlier
    others = torch.cat([before, position])
    rows = [part.expand(2, -1) for part in (position, sees, torch.cat([before % 7, visible]), others)]
    return Sight(rows[0], rows[1], own, rows[2], rows[3])


@pytest.mark.parametrize("window", [None, 30])
def test_blocks_hold_what_the_dense_mask_does(window):
    given = sight()
    dense, blocks = given.dense(window), given.blocks(window)
    slots, columns = dense.shape[-2:]
    assert torch.equal(create_mask(blocks.mask_mod, 2, None, slots, columns, "cpu"), dense)
    padded = torch.zeros(2, 1, *(-(-extent // BLOCK) * BLOCK for extent in (slots, columns)), dtype=torch.bool)
    padded[..., :slots, :columns] = dense
    tiles = padded.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(3, 4)
    listed = {}
    for name, counts, indices in (
        ("partly", blocks.kv_num_blocks, blocks.kv_indices),
        ("full", blocks.full_kv_num_blocks, blocks.full_kv_indices),
    ):
        first = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
        listed[name] = torch.zeros_like(first).scatter_(-1, indices.long(), first)
    assert torch.equal(listed["full"], tiles.all(-1).all(-1))
    assert torch.equal(listed["full"] | listed["partly"], tiles.any(-1).any(-1))
    assert not (listed["full"] | listed["partly"]).all()  # some are left out, else nothing is won


def test_a_slot_sees_what_the_definition_says():
    given = sight()
    dense = given.dense(30)[:, 0]
    generator = torch.Generator().manual_seed(0)
    for number, (slot, column) in enumerate(torch.randint(0, 300, (200, 2), generator=generator).tolist()):
        row = number % 2
        by_time = given.visible[row, column] <= given.sees[row, slot] or column == given.own[slot]
        near = abs(given.position[row, slot] - given.others[row, column]) < 30
        assert dense[row, slot, column] == (by_time and near)


def test_making_blocks_waits_for_no_device():
    """On the meta device there are no numbers to wait for."""
    assert sight("meta").blocks(30).kv_indices.is_meta


@pytest.fixture
def in_blocks(monkeypatch):
    """Masks in blocks on a CPU, where FlexAttention has no gradients; nothing is compiled. Gives how many were made."""
    made = []
    create = attention.create_block_mask

    def counted(*given):
        made.append(given)
        return create(*given)

    def switch(on):
        monkeypatch.setattr(attention, "create_block_mask", counted)
        monkeypatch.setattr(backbone, "why_not_blocks", (lambda *_: None) if on else why_not_blocks)
        return made

    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield switch


def tiny(family, text_tokenizer, **more):
    own = {**FAMILIES[family], "model_type": family, "max_position_embeddings": 512, **more}
    torch.manual_seed(0)
    return UniFluid(UniFluidConfig(own, **{**PARTS, "grid": (SIDE, SIDE)}), text_tokenizer).train()


def states(model):
    generator = torch.Generator().manual_seed(0)
    ids, real = torch.randint(3, 290, (2, TEXT), generator=generator), torch.ones(2, TEXT, dtype=torch.bool)
    real[1, :7] = False
    order = torch.stack([torch.randperm(N, generator=generator) for _ in range(2)])
    tokens = torch.randn(2, N, 5, generator=generator).to(model.dtype)
    return model.draw_states(tokens, ids, real, order, (torch.arange(N) // 3).expand(2, N))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", CAN)
def test_both_forms_give_the_same_states(in_blocks, text_tokenizer, family):
    model = tiny(family, text_tokenizer).double()
    made = in_blocks(False)
    expected = states(model)
    assert not made
    in_blocks(True)
    found = states(model)
    kinds = set(getattr(model.backbone.config, "layer_types", None) or ["all"])
    assert len(made) == len(kinds)
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()
    model.eval()
    assert torch.equal(states(model), expected)
    assert len(made) == len(kinds)  # drawing has a mask of all pairs


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_autocast_and_compiled_layers_take_blocks(in_blocks, text_tokenizer):
    model = tiny("qwen3", text_tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        expected = states(model)
        in_blocks(True)
        found = states(model)
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()
        compiled = []

        def counted(graph, _):
            compiled.append(graph)
            return graph.forward

        for layer in model.layers():
            layer.compile(backend=counted, fullgraph=True)
        with torch.compiler.set_stance("default"):
            for _ in range(3):  # each with a mask of its own
                assert torch.equal(states(model), found)
        assert len(compiled) == 1  # of all layers


@pytest.mark.parametrize(
    ("family", "more", "why"),
    [
        ("llama", {}, None),
        ("gemma2", {}, None),
        ("llama", {"attention_dropout": 0.1}, "FlexAttention knows no attention_dropout"),
        ("gpt2", {}, "the transformers package has no FlexAttention for a gpt2"),
        ("gpt_oss", {}, "the transformers package has no FlexAttention for a gpt_oss"),  # sinks
    ],
)
def test_which_form_serves_is_said(family, more, why):
    own = backbone.new_backbone({**FAMILIES.get(family, FAMILIES["llama"]), "model_type": family, **more})
    assert why_not_blocks(own, torch.device("cuda")) == why
    assert why_not_blocks(own, torch.device("cpu")) == "FlexAttention trains on CUDA, not on cpu"
