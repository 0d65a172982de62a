import copy
import io
import json
import pickle
import socket
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.conftest import check_reset
from tests.uniflow.unifluid.conftest import LLAMA
from uniflow.checkpoint import CheckpointError, read_state
from uniflow.unifluid.backbone import read_backbone
from uniflow.unifluid.config import UniFluidConfig
from uniflow.unifluid.model import UniFluid
from uniflow.unifluid.orders import draw_groups, draw_orders
from uniflow.unifluid.slots import FEATURES, TOKENS
from uniflow.unifluid.texts import ids_fingerprint, make_text_tokenizer

KINDS = [
    {},
    {"model_type": "gemma"},
    {"model_type": "gemma2", "sliding_window": 4},
    {"model_type": "gemma3_text", "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    {"model_type": "gpt2", "n_inner": 64},
    {"tie_word_embeddings": True},
]
N = 12


def pictures(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, N, 5, generator=generator)
    order = draw_orders(2, N, "random", torch.device("cpu"), generator)
    groups = torch.tensor([0, 0, 1, 1, 1, 2, 3, 4, 4, 5, 5, 5]).expand(2, N)
    return tokens, order, groups


def states(model, texts, tokens, order, groups):
    with torch.no_grad():
        return model.draw_states(tokens, *texts, order, groups)


@pytest.mark.parametrize("backbone", KINDS, ids=lambda kind: kind.get("model_type", "llama"))
def test_a_prediction_sees_the_text_and_earlier_steps_and_nothing_else(make_model, texts, backbone):
    model = make_model(backbone)
    tokens, order, groups = pictures()
    before = states(model, texts, tokens, order, groups)
    for rank in range(N):
        changed = tokens.clone()
        changed[0, order[0, rank]] += 1
        difference = (states(model, texts, changed, order, groups) - before).abs().amax(-1)
        later = groups[0] > groups[0, rank]
        assert torch.equal(difference[0] > 0, later)
        assert difference[1].max() == 0
    ids, real = texts
    for column in range(ids.shape[1]):
        changed = ids.clone()
        changed[:, column] = 3 + (changed[:, column] - 2) % 297
        difference = (states(model, (changed, real), tokens, order, groups) - before).abs().amax(-1)
        assert (difference[0] > 0).all()
        assert (difference[1] > 0).all() if real[1, column] else difference[1].max() == 0  # padding is seen by none


@pytest.mark.parametrize("backbone", KINDS[:2], ids=["llama", "gemma"])
def test_text_sees_no_later_text_and_no_image_token(make_model, texts, backbone):
    model = make_model(backbone)
    tokens, order, groups = pictures()
    ids, real = texts
    begin = real.sum(1, keepdim=True)

    def text_logits(ids, with_tokens):
        text = model.text_slots(ids, real)
        image = [
            model.content_slots(tokens, order, groups, begin, 5),
            model.query_slots(order, groups, begin, 5),
        ]
        with torch.no_grad():
            return model.backbone.lm_head(model.states([text, *(image if with_tokens else [])])[:, :5])

    alone = text_logits(ids, False)
    torch.testing.assert_close(text_logits(ids, True), alone, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # and it is the language model's own likelihood
        own = model.backbone(input_ids=ids[:1], attention_mask=real[:1].long()).logits
    torch.testing.assert_close(alone[:1], own, rtol=1e-5, atol=1e-5)
    changed = ids.clone()
    changed[:, 3] = 7
    difference = (text_logits(changed, True) - alone).abs().amax(-1)
    assert difference[:, :3].max() < 1e-5
    assert (difference[:, 3:] > 0).all()


def test_padding_changes_nothing(make_model, texts):
    model = make_model()
    tokens, order, groups = pictures()
    ids, real = texts
    padded = states(model, texts, tokens, order, groups)[1:]
    alone = states(model, (ids[1:, 2:], real[1:, 2:]), tokens[1:], order[1:], groups[1:])
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


def test_the_order_within_a_step_makes_no_difference(make_model, texts):
    # what is known is a set: given at once it may come in any order
    model = make_model()
    tokens, order, _ = pictures()
    groups = torch.tensor([0] * 8 + [1] * 4).expand(2, N)
    shuffled = order.clone()
    shuffled[:, :8] = order[:, torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])]
    before = states(model, texts, tokens, order, groups)[:, 8:]
    after = states(model, texts, tokens, shuffled, groups)[:, 8:]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    # and a known token's place matters
    moved = order.clone()
    moved[:, [0, 9]] = order[:, [9, 0]]
    assert (states(model, texts, tokens, moved, groups)[:, 10:] - before[:, 2:]).abs().max() > 1e-3


def test_answers_are_predicted_from_the_picture_and_what_stands_before(make_model, asked):
    model = make_model()
    ids, real = asked()
    features = torch.randn(2, 4, 7)
    with torch.no_grad():
        logits = model.answer_logits(features, ids, real, 2)
        assert logits.shape == (2, 2, 300)
        changed = ids.clone()
        changed[:, 7] = 7
        difference = (model.answer_logits(features, changed, real, 2) - logits).abs().amax(-1)
        assert difference[:, 0].max() == 0  # the place of an id does not see it
        assert (difference[:, 1] > 0).all()
        assert ((model.answer_logits(features + 1, ids, real, 2) - logits).abs().amax(-1) > 0).all()
        kept = real[1]
        alone = model.answer_logits(features[1:], ids[1:, kept], real[1:, kept], 2)
    torch.testing.assert_close(logits[1:], alone, rtol=1e-5, atol=1e-5)


def test_every_prediction_sees_the_sources_and_they_nothing_behind_them(make_model, edits):
    model = make_model(sources="both")
    ids, real, sources = edits
    tokens, order, groups = pictures()

    def states(ids, features, clean):
        with torch.no_grad():
            return model.draw_states(tokens, ids, real, order, groups, features, clean)

    before = states(ids, *sources)
    for name in ("features", "clean"):
        changed = getattr(sources, name).clone()
        changed[3, 2] += 1  # of the second row's second picture
        difference = (states(ids, **{**sources._asdict(), name: changed}) - before).abs().amax(-1)
        assert difference[0].max() == 0
        assert (difference[1] > 0).all()
    # each of a picture's tokens has its place
    swapped = sources.clean[:, [1, 0, *range(2, N)]]
    assert ((states(ids, sources.features, swapped) - before).abs().amax(-1) > 1e-3).all()
    # and a source's token is another thing than the picture's own
    with torch.no_grad():
        text = model.text_slots(ids, real, *sources).embedded[0, 4 : 4 + N]
        own = model.content_slots(sources.clean[:1], torch.arange(N).unsqueeze(0), groups[:1], 0, 0).embedded[0]
        torch.testing.assert_close(text - own, model.source_embedding.expand(N, -1))
        alone = model.states([model.text_slots(ids, real, *sources)])
        changed = ids.clone()
        changed[:, -1] = 7
        after = model.states([model.text_slots(changed, real, *sources)])
    torch.testing.assert_close(after[:, :-1], alone[:, :-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seen", ["features", "tokens"])
def test_a_model_may_see_a_part_of_its_sources(make_model, texts, tmp_path, seen):
    model = make_model(sources=seen, **({"vision_channels": None} if seen == "tokens" else {}))
    assert (model.source_embedding is None) == (seen == "features")
    model.save_pretrained(tmp_path)
    again = UniFluid.from_pretrained(tmp_path)
    tokens, order, groups = pictures()
    slot, given = (FEATURES, torch.randn(2, 4, 7)) if seen == "features" else (TOKENS, torch.randn(2, N, 5))
    ids, real = (F.pad(part, (given.shape[1], 0), value=value) for part, value in zip(texts, (slot, True), strict=True))
    how = {"features" if seen == "features" else "clean": given}
    assert torch.equal(*(m.draw_states(tokens, ids, real, order, groups, **how) for m in (model, again)))
    with pytest.raises(ValueError, match=f"expected as many as the ids have slots for, {given.shape[1] * 2}, got 0"):
        model.draw_states(tokens, ids, real, order, groups)


def test_gradients_reach_every_parameter(make_model, edits, asked):
    model = make_model(sources="both")
    tokens, order, groups = pictures()
    ids, real, sources = edits
    loss = model.draw_states(tokens, ids, real, order, groups, *sources).square().mean()
    loss = loss + model.answer_logits(torch.randn(2, 4, 7), *asked(), 2).square().mean()
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None and not name.startswith("head.")]
    assert without == []


def test_statistics(make_model):
    model = make_model()
    tokens = torch.randn(50, N, 5) * torch.tensor([1.0, 2, 3, 4, 5]) + 7
    model.set_statistics(tokens)
    normalized = model.normalized(tokens)
    torch.testing.assert_close(normalized.flatten(0, 1).mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalized.flatten(0, 1).std(0), torch.ones(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(model.denormalized(normalized), tokens)
    with pytest.raises(ValueError, match=r"tokens: expected shape \[..., 5\]"):
        model.set_statistics(torch.randn(4, N, 6))
    with pytest.raises(ValueError, match="channels that vary"):
        model.set_statistics(torch.ones(4, N, 5))


@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints(make_model, texts, asked, tmp_path, tied):
    model = make_model({"tie_word_embeddings": tied})
    model.set_statistics(torch.randn(50, N, 5))
    model.save_pretrained(tmp_path)
    assert ("backbone.lm_head.weight" in read_state(tmp_path)) == (not tied)
    again = UniFluid.from_pretrained(tmp_path)
    assert (again.backbone.lm_head.weight is again.backbone.get_input_embeddings().weight) == tied
    tokens, order, groups = pictures()
    assert torch.equal(states(again, texts, tokens, order, groups), states(model, texts, tokens, order, groups))
    features = torch.randn(2, 4, 7)
    assert torch.equal(again.answer_logits(features, *asked(), 2), model.answer_logits(features, *asked(), 2))
    assert torch.equal(again.token_std, model.token_std)
    assert again.text_tokenizer("a seven").input_ids == model.text_tokenizer("a seven").input_ids
    other = make_model({"tie_word_embeddings": tied}, seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(states(other, texts, tokens, order, groups), states(model, texts, tokens, order, groups))


def test_a_checkpoint_of_another_model_is_refused(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_depth": 3}))
    with pytest.raises(CheckpointError, match="missing"):
        UniFluid.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "uniflow"}))
    with pytest.raises(ValueError, match="model_type 'unifluid'"):
        UniFluid.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        UniFluid.from_pretrained(tmp_path / "nothing")


def test_a_pretrained_backbone_is_taken_as_it_is(make_model, text_tokenizer, tmp_path):
    first = make_model()
    first.backbone.save_pretrained(tmp_path)
    backbone = read_backbone(tmp_path)
    model = UniFluid(UniFluidConfig(backbone.config.to_dict(), 5, (3, 4), 32, 2), text_tokenizer, backbone)
    for name, value in first.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value)
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(UniFluid.from_pretrained(tmp_path / "whole").place_embedding, model.place_embedding)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        read_backbone(tmp_path / "nothing")


def test_statistics_stay_float32(make_model):
    model = make_model()
    tokens = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    model.set_statistics(tokens)
    mean, std = model.token_mean.clone(), model.token_std.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert model.to(dtype).dtype == dtype
        assert torch.equal(model.token_mean, mean)
        assert torch.equal(model.token_std, std)
    assert model.to("meta").token_mean.device.type == "meta"


def test_another_text_tokenizer_is_refused(make_model, tmp_path):
    model = make_model(text_tokenizer=ids_fingerprint(make_model().text_tokenizer))
    model.save_pretrained(tmp_path)
    assert UniFluid.from_pretrained(tmp_path).config == model.config
    make_text_tokenizer(["something else"], 300).save_pretrained(str(tmp_path / "text_tokenizer"))
    with pytest.raises(ValueError, match="text_tokenizer: has other ids than the one that the model was trained with"):
        UniFluid.from_pretrained(tmp_path)


def test_copies_and_pickles(make_model, texts):
    model = make_model()
    picture = pictures()
    before = states(model, texts, *picture)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(states(other, texts, *picture), before)


def test_bad_input(make_model, texts, asked, text_tokenizer):
    model = make_model()
    tokens, order, groups = pictures()
    ids, real = texts
    with pytest.raises(ValueError, match=r"tokens: expected shape \(2, 12, 5\), got \(2, 12, 4\)"):
        model.draw_states(tokens[..., :4], ids, real, order, groups)
    with pytest.raises(ValueError, match=r"order: expected shape \(2, 12\)"):
        model.draw_states(tokens, ids, real, order[:, :3], groups)
    with pytest.raises(ValueError, match=r"features: expected shape \[P, M, 7\]"):
        model.answer_logits(torch.randn(2, 4, 6), *asked(), 2)
    for features in (torch.randn(2, 3, 7), torch.randn(1, 4, 7), torch.empty(0, 4, 7)):
        with pytest.raises(ValueError, match=r"slots for, 8, got [0-6]"):
            model.answer_logits(features, *asked(), 2)
    with pytest.raises(ValueError, match="features: expected as many as the ids have slots for, 0, got 8"):
        model.answer_logits(torch.randn(2, 4, 7), *texts, 2)
    with pytest.raises(ValueError, match="clean: the model was made without such sources"):
        model.draw_states(tokens, ids, real, order, groups, clean=tokens)
    with pytest.raises(ValueError, match="positions for 64 tokens, got 72"):
        model.draw_states(tokens, ids.repeat(1, 12), real.repeat(1, 12), order, groups)
    with pytest.raises(ValueError, match="positions for 64 tokens, got 84"):
        model.answer_logits(torch.randn(2, 79, 7), *asked(79), 2)
    with pytest.raises(ValueError, match="reads no pictures"):
        make_model(vision_channels=None).answer_logits(torch.randn(2, 4, 7), *asked(), 2)
    with pytest.raises(ValueError, match="more than the vocab_size of the backbone \\(32\\)"):
        make_model({"vocab_size": 32})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_channels": 0}, "token_channels: expected an integer of at least 1"),
        ({"grid": (3, 0)}, "grid: expected lines"),
        ({"grid": (3,)}, "grid: expected lines"),
        ({"head": "gan"}, "head: expected one of flow, ddpm, mean_flow, self_distillation"),
        ({"order": "spiral"}, "order: expected one of random, raster"),
        ({"vision_channels": 0}, "vision_channels: expected an integer"),
        ({"backbone": {"model_type": "vit"}}, "backbone: no language model"),
        ({"backbone": {"model_type": "no such"}}, "backbone: no language model"),
        ({"backbone": {"model_type": "gemma3"}}, "backbone: no language model.* of the kind 'gemma3' cannot be used"),
        ({"backbone": {"num_hidden_layers": 10**9}}, "backbone: no language model.* expected at most 1024"),
        ({"backbone": {"quantization_config": {}}}, "backbone: no language model.* is not supported"),
        ({"backbone": {"vocab_size": -1}}, "backbone: "),
        ({"grid": (2**20, 2**20)}, "grid: expected lines"),
        ({"grid": 3}, "grid: expected lines"),
        ({"grid": ("a", 2)}, "grid: expected lines"),
        ({"head_depth": 10**30}, "head_depth: expected an integer of at most 1024"),
        ({"head_depth": 1e30}, "head_depth: expected an integer of at least 1"),
        ({"head_width": 10**9}, "head_width: expected an integer of at most"),
        ({"token_channels": 2**40}, "token_channels: expected an integer of at most"),
        ({"vision_layers": 3}, "vision_layers: expected an integer of at most 2"),
        ({"sources": "all"}, "sources: expected one of features, tokens, both, got 'all'"),
        ({"sources": "both", "vision_channels": None}, "sources: both of pictures need vision_channels"),
        ({"tokenizer": 3}, "tokenizer: expected a fingerprint, got 3"),
    ],
)
def test_configurations_that_cannot_be(make_model, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_model(**changes)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "changes",
    [
        {"head_depth": 1000},
        {"head_width": 1 << 17},
        {"grid": [1000, 1000]},
        {"backbone": {**LLAMA, "num_hidden_layers": 1000}},
        {"backbone": {**LLAMA, "hidden_size": 1 << 20}},
        {"backbone": {**LLAMA, "vocab_size": 1 << 30}},
    ],
)
def test_a_config_larger_than_its_weights_is_not_built(make_model, tmp_path, changes):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=r"does not hold this model: its config\.json is of"):
        UniFluid.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.layers.1.mlp.up_proj.weight"), r"missing \(1\): model.layers.1.mlp.up_proj"),
        (lambda state: state.pop("lm_head.weight"), r"missing \(1\): lm_head.weight"),
        (lambda state: state.update({"model.layers.2.x": torch.ones(1)}), r"unexpected \(1\): model.layers.2.x"),
        (
            lambda state: state.update({"model.norm.weight": torch.ones(3)}),
            r"of another shape \(1\): model.norm.weight",
        ),
    ],
)
def test_weights_that_a_backbone_lacks_are_not_made_up(make_model, tmp_path, change, message):
    """transformers gives them random numbers."""
    make_model().backbone.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"does not hold this model; keys {message}"):
        read_backbone(tmp_path)


def test_nothing_in_a_folder_runs(make_model, tmp_path, monkeypatch):
    """Not after a "y" on stdin, be it a model's, a backbone's or a text tokenizer's."""
    model = make_model()
    model.save_pretrained(tmp_path / "whole")
    model.backbone.save_pretrained(tmp_path / "backbone")
    classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil")
    auto_map = {"auto_map": {**classes, "AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    for folder in (tmp_path / "whole", tmp_path / "backbone", tmp_path / "whole" / "text_tokenizer"):
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for path in (tmp_path / "backbone" / "config.json", tmp_path / "whole/text_tokenizer/tokenizer_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | auto_map))
    (tmp_path / "whole/text_tokenizer/config.json").write_text(json.dumps({"model_type": "own", **auto_map}))
    config = json.loads((tmp_path / "whole/config.json").read_text())
    config["backbone"] |= auto_map
    (tmp_path / "whole/config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked for the hub"))
    assert torch.equal(UniFluid.from_pretrained(tmp_path / "whole").place_embedding, model.place_embedding)
    read_backbone(tmp_path / "backbone")
    path = tmp_path / "whole/text_tokenizer/tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "Evil", **auto_map}))
    (tmp_path / "whole/text_tokenizer/tokenizer.json").unlink()
    with pytest.raises(ValueError, match="holds no tokenizer that the transformers package can read"):
        UniFluid.from_pretrained(tmp_path / "whole")
    assert not (tmp_path / "ran").exists()


def test_groups_may_differ_from_picture_to_picture(make_model, texts):
    model = make_model()
    tokens, order, _ = pictures()
    torch.manual_seed(3)
    groups = draw_groups(2, N, torch.device("cpu"))
    assert not torch.equal(groups[0], groups[1])
    together = states(model, texts, tokens, order, groups)
    for row in range(2):
        one = slice(row, row + 1)
        alone = states(model, (texts[0][one], texts[1][one]), tokens[one], order[one], groups[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backbone", [{}, {"model_type": "gemma3_text", "sliding_window": 4}])
def test_reset_parameters_leaves_nothing_as_it_was(make_model, backbone):
    config, text_tokenizer = make_model(backbone).config, make_model(backbone).text_tokenizer
    check_reset(lambda: UniFluid(config, text_tokenizer))
