"""Families of language models as backbones, from folders that the transformers package wrote."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests.uniflow.unifluid.conftest import LLAMA
from tests.uniflow.unifluid.test_objective import Tokens, Vision
from uniflow.checkpoint import CheckpointError
from uniflow.unifluid import UniFluid, UniFluidConfig, UniFluidObjective, answer, draw_tokens
from uniflow.unifluid.backbone import embedding_scale, read_backbone
from uniflow.unifluid.captions import Drawings, Readings
from uniflow.unifluid.conversations import about_a_picture, question_ids
from uniflow.unifluid.slots import picture_slots
from uniflow.unifluid.texts import make_text_tokenizer, padded, prompt_ids, read_text_tokenizer, text_ids

transformers = pytest.importorskip("transformers")

WINDOW = 4
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}  # as make_text_tokenizer has them
COMMON = {name: value for name, value in LLAMA.items() if name not in ("model_type", "head_dim")} | SPECIAL
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
TEXT = {**COMMON, "head_dim": 16, **MIXED}
FAMILIES = {
    "llama": COMMON,
    "qwen2": COMMON,
    "qwen3": {**COMMON, "head_dim": 16},
    "gemma": {**COMMON, "head_dim": 16},
    "gemma2": {**TEXT, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {**TEXT, "query_pre_attn_scalar": 16},
    "gemma3": {
        "text_config": {**TEXT, "model_type": "gemma3_text", "query_pre_attn_scalar": 16},
        "vision_config": {
            **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            **{"image_size": 8, "patch_size": 4, "model_type": "siglip_vision_model"},
        },
        **{"mm_tokens_per_image": 4, "boi_token_index": 290, "eoi_token_index": 291, "image_token_index": 292},
    },
    "mistral": {**COMMON, "sliding_window": WINDOW},
    "phi3": {**COMMON, "sliding_window": WINDOW},
    "smollm3": {**COMMON, "no_rope_layers": [1, 0]},
    "olmo2": COMMON,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 300, "initializer_range": 0.2}
    | dict.fromkeys(("bos_token_id", "eos_token_id"), 1),
}
WITHOUT_BOS = ("qwen2", "qwen3")
PARTS = {"token_channels": 5, "grid": (3, 4), "head_width": 32, "head_depth": 1, "vision_channels": 7}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A folder with a family's model of random weights, and its tokenizer."""
    place = tmp_path_factory.mktemp(request.param)
    config = transformers.AutoConfig.for_model(request.param, **FAMILIES[request.param])
    kind = transformers.AutoModelForImageTextToText if "text_config" in config else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = kind.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(place)
    tokenizer = make_text_tokenizer(["a seven", "which digit?"], 290)
    if request.param in WITHOUT_BOS:
        tokenizer.bos_token = None
    if request.param == "gpt2":
        tokenizer.bos_token, tokenizer.pad_token = tokenizer.eos_token, None
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture
def model(folder):
    backbone, tokenizer = read_backbone(folder), read_text_tokenizer(folder)
    config = UniFluidConfig(backbone.config.to_diff_dict(), **PARTS)
    torch.manual_seed(1)
    model = UniFluid(config, tokenizer, backbone).eval()
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_text_alone_is_the_language_models_own(folder, model):
    """Scales of embeddings, soft caps, positions and windows (a third of the text): as the package runs the model."""
    kind = transformers.AutoModelForImageTextToText if folder.name.startswith("gemma30") else None
    own = (kind or transformers.AutoModelForCausalLM).from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.randint(3, 290, (1, 3 * WINDOW), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        expected = own(input_ids=ids).logits
        loss = F.cross_entropy(expected[0, :-1], ids[0, 1:])
        logits = model.answer_logits(torch.empty(1, 0, 7), ids, real, ids.shape[1] - 1)
        states = model.states([model.text_slots(ids, real)])
        again = own.get_decoder()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(F.cross_entropy(logits[0], ids[0, 1:]), loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(states, again, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("error::FutureWarning")  # of arguments that transformers 5.40 will not know any more
def test_a_family_is_trained_draws_and_answers(model, tmp_path):
    tokenizer = model.text_tokenizer
    objective = UniFluidObjective(model.train(), Tokens(), Vision())
    images = torch.randint(256, (2, 3, 6, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    asked, answered = (
        question_ids(tokenizer, about_a_picture("which digit?"), [picture_slots(12)]),
        [*text_ids(tokenizer, "seven"), tokenizer.eos_token_id],
    )
    drawings = Drawings(images, *padded([prompt_ids(tokenizer, text) for text in ("a seven", None)], tokenizer))
    readings = Readings(images, *padded([asked + answered] * 2, tokenizer), torch.ones(2, len(answered)).bool())
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    objective(drawings, readings).total.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert set(before) - set(changed) == {"token_mean", "token_std"}

    model.eval().save_pretrained(tmp_path)
    again = UniFluid.from_pretrained(tmp_path)
    for cfg in (1.0, 2.0):
        drawn, same = (
            draw_tokens(m, *drawings[1:3], 4, head_steps=2, cfg=cfg, generator=torch.Generator().manual_seed(0))
            for m in (model, again)
        )
        assert torch.isfinite(drawn).all()
        assert torch.equal(drawn, same)
    prompt = padded([asked, [*asked[:12], *asked[13:]]], tokenizer)
    features = Vision()(images.float())
    found = answer(model, features, *prompt, longest=6)
    assert len(found) == 2
    assert found == answer(again, features, *prompt, longest=6)
    assert len(model.layers()) == 2


def test_what_goes_in_beside_text_begins_with_its_spread(model):
    """Gemma's text embeddings are multiplied by the square root of their size where they are looked up."""
    scale = 32**0.5 if "gemma" in model.backbone.config.model_type else 1
    assert embedding_scale(model.backbone) == pytest.approx(scale)
    expected = scale * getattr(model.backbone.config, "initializer_range", 0.02)
    assert model.place_embedding.std().item() == pytest.approx(expected, rel=0.2)
    embedding = model.backbone.get_input_embeddings()
    ids = torch.arange(3, 200)
    assert embedding(ids).std().item() == pytest.approx(scale * embedding.weight[ids].std().item(), rel=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "mistral", "phi3"])
def test_windows_hold_for_sequences_with_pictures(family, text_tokenizer):
    """In one layer a token's query sees what is known of the text and the picture up to the window, and no further."""
    own = {**FAMILIES[family], "model_type": family, "num_hidden_layers": 1}
    if "layer_types" in own:
        own["layer_types"] = ["sliding_attention"]
    torch.manual_seed(0)
    model = UniFluid(UniFluidConfig(own, **PARTS), text_tokenizer).eval()
    ids, real = torch.arange(10, 16).unsqueeze(0), torch.ones(1, 6, dtype=torch.bool)
    tokens, order = torch.randn(1, 12, 5), torch.randperm(12).unsqueeze(0)
    groups = torch.arange(12).unsqueeze(0) // 2

    def states(ids, tokens):
        with torch.no_grad():
            return model.draw_states(tokens, ids, real, order, groups)[0]

    before = states(ids, tokens)
    for place in range(12):
        changed = tokens.clone()
        changed[0, place] += 1
        rank = order[0].tolist().index(place)
        seen = (groups[0] > groups[0, rank]) & ((order[0] - place).abs() < WINDOW)
        assert torch.equal((states(ids, changed) - before).abs().amax(-1) > 0, seen)
    for column in range(6):
        changed = ids.clone()
        changed[0, column] = 7
        assert torch.equal((states(changed, tokens) - before).abs().amax(-1) > 0, 6 + order[0] - column < WINDOW)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("mamba", {}, "a mamba cannot be used: expected layers of full_attention .* got 'linear_attention'"),
        ("llama4_text", {}, "a llama4_text cannot be used: .* got 'chunked_attention'"),
        ("bart", {}, "a bart cannot be used: its forward takes no position_ids"),
        ("bert", {}, "a bert cannot be used: expected a decoder"),
        ("mistral", {"sliding_window": -1}, "sliding_window: expected an integer of at least 1"),
    ],
)
def test_what_cannot_serve_is_refused_by_name(text_tokenizer, kind, more, message):
    with pytest.raises(ValueError, match=f"^backbone: {message}"):
        UniFluid(UniFluidConfig({"model_type": kind, **COMMON, **more}, **PARTS), text_tokenizer)


def test_a_model_that_does_not_attend_as_masks_say_is_refused(text_tokenizer):
    backbone = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**COMMON))
    config = UniFluidConfig(LLAMA, **PARTS)
    own = backbone.model.forward

    def causal(inputs_embeds, attention_mask, position_ids, **how):
        return own(inputs_embeds=inputs_embeds, position_ids=position_ids, **how)

    UniFluid(config, text_tokenizer, backbone)
    backbone.model.forward = causal
    with pytest.raises(ValueError, match="a llama cannot be used: it does not attend as masks say"):
        UniFluid(config, text_tokenizer, backbone)


def test_a_folder_with_an_encoder_must_be_whole(tmp_path):
    """Nothing is made up for what its language model lacks; and one of another kind of positions is no backbone."""
    config = transformers.AutoConfig.for_model("gemma3", **FAMILIES["gemma3"])
    whole = transformers.AutoModelForImageTextToText.from_config(config)
    state = whole.state_dict()
    state.pop("model.language_model.layers.1.mlp.up_proj.weight")
    whole.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(CheckpointError, match=r"missing \(1\): .*layers.1.mlp.up_proj"):
        read_backbone(tmp_path)
    transformers.AutoConfig.for_model("qwen2_vl").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no language model .*'qwen2_vl_text' by itself"):
        read_backbone(tmp_path)
