import math
import warnings

import pytest
import torch

from tests.uniflow_kernels.test_graphs import Nowhere, StandIn
from uniflow.unifluid import drawing, steps
from uniflow.unifluid.asking import answer
from uniflow.unifluid.drawing import draw_pictures, draw_tokens, see_sources
from uniflow.unifluid.guidance import SCHEDULES, guidance_scales
from uniflow.unifluid.orders import draw_orders, group_sizes
from uniflow_kernels import FlowHead, graphs

N = 12


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def as_on_a_gpu(monkeypatch):
    """All steps of the transformer have the same shapes, and are replayed by the stand-in for a graph."""
    monkeypatch.setattr(StandIn, "captures", 0)
    monkeypatch.setattr(graphs, "Graph", StandIn)
    monkeypatch.setattr(graphs, "Place", Nowhere)
    monkeypatch.setattr(steps, "all_alike", lambda device: True)
    monkeypatch.setattr(steps, "why_not_graph", lambda device, read: None)


@pytest.mark.parametrize(
    "backbone",
    [{}, {"model_type": "gpt2"}, *({"model_type": kind, "sliding_window": 4} for kind in ("gemma3_text", "mistral"))],
    ids=["llama", "gpt2", "gemma3", "mistral"],
)
@pytest.mark.parametrize("alike", [False, True], ids=["growing", "alike"])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_the_cache_changes_nothing(make_model, texts, monkeypatch, backbone, cfg, alike):
    # every state that a token was drawn under is that of the whole sequence without a cache
    model = make_model(backbone)
    if alike:
        as_on_a_gpu(monkeypatch)
    before = StandIn.captures
    seen = []
    draw = drawing._Head.draw
    monkeypatch.setattr(
        drawing._Head, "draw", lambda self, model, states, *cfg: seen.append(states) or draw(self, model, states, *cfg)
    )
    order = draw_orders(2, N, "random", torch.device("cpu"), seeded())
    tokens = draw_tokens(model, *texts, 5, head_steps=3, cfg=cfg, order=order, generator=seeded())
    groups = torch.arange(5).repeat_interleave(torch.tensor(group_sizes(N, 5))).expand(2, N)
    states = torch.cat(seen, dim=1)
    with torch.no_grad():
        expected = model.draw_states(tokens, *texts, order, groups)
        torch.testing.assert_close(states[:2], expected, rtol=1e-5, atol=1e-5)
        assert len(states) == (2 if cfg == 1.0 else 4)
        if cfg != 1.0:  # the null branch has bos for a text
            bos = torch.full((2, 1), model.text_tokenizer.bos_token_id)
            null = model.draw_states(tokens, bos, torch.ones_like(bos, dtype=torch.bool), order, groups)
            torch.testing.assert_close(states[2:], null, rtol=1e-5, atol=1e-5)
    assert StandIn.captures - before == alike  # steps of 1 to 4 tokens, and one graph


@torch.inference_mode()
@pytest.mark.parametrize("backbone", [{}, {"model_type": "gemma2", "sliding_window": 4}], ids=["llama", "gemma2"])
def test_steps_that_are_alike_draw_the_same(make_model, edits, monkeypatch, backbone):
    """From sources too, in float64; each drawing has graphs of its own."""
    model = make_model(backbone, sources="both").double()
    *prompts, sources = edits
    how = {"sources": sources, "cfg": 2.0, "cfg_source": 1.5, "head_steps": 2}
    expected = draw_tokens(model, *prompts, 6, generator=seeded(), **how)
    as_on_a_gpu(monkeypatch)
    found = [draw_tokens(model, *prompts, 6, generator=seeded(), **how) for _ in range(2)]
    assert torch.equal(*found)
    assert StandIn.captures == 2
    assert (found[0] - expected).abs().max() < 1e-6 * expected.abs().max()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a kind of step that does not come back would be one of too many
        draw_tokens(model, *prompts, 12, generator=seeded(), **how)


def test_hooks_of_the_transformer_keep_their_calls(make_model, texts, monkeypatch):
    model = make_model()
    as_on_a_gpu(monkeypatch)
    calls = []
    model.layers()[0].register_forward_hook(lambda *_: calls.append(1))
    draw_tokens(model, *texts, 5, head_steps=2, generator=seeded())
    assert (len(calls), StandIn.captures) == (5, 0)


def test_guidance_scales():
    # MAR's 1 + (cfg - 1) * share of drawn tokens; RAR's cosine of it; both end at the scale itself
    assert guidance_scales(3.0, (1, 2, 5)) == [3.0, 3.0, 3.0]
    assert guidance_scales(3.0, (1, 2, 5), "linear") == [1.25, 1.75, 3.0]
    expected = [2 - math.cos(math.pi / 8), 2 - math.cos(math.pi * 3 / 8), 3.0]
    assert guidance_scales(3.0, (1, 2, 5), "cosine") == pytest.approx(expected, abs=1e-12)
    assert guidance_scales(0.0, (1, 1), "linear") == [0.5, 0.0]
    for schedule in SCHEDULES:
        assert guidance_scales(1.0, (1, 2, 5), schedule) == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="cfg_schedule: expected one of constant, linear, cosine, got 'cos'"):
        guidance_scales(1.0, (1,), "cos")


@pytest.mark.parametrize("head", ["flow", "ddpm", "mean_flow"])
def test_schedules_of_every_head(make_model, texts, head):
    # they change what is drawn with guidance; without it they change nothing, and no second branch is made
    model = make_model(head=head)

    def draw(**how):
        return draw_tokens(model, *texts, 3, head_steps=2, generator=seeded(1), **how)

    assert not torch.allclose(draw(cfg=2.0), draw(cfg=2.0, cfg_schedule="linear"))
    rows = []
    model.backbone.base_model.register_forward_hook(lambda *call: rows.append(len(call[2].last_hidden_state)))
    assert torch.equal(draw(), draw(cfg_schedule="cosine"))
    assert set(rows) == {2}


@pytest.mark.parametrize(
    ("cfg", "cfg_source", "schedule"),
    [
        *((*both, "constant") for both in ((1.0, 1.0), (2.0, 1.0), (1.5, 2.5), (1.0, 0.0))),
        *((2.0, 1.0, kind) for kind in ("linear", "cosine")),
        *((1.5, 2.5, kind) for kind in ("linear", "cosine")),
    ],
)
def test_text_and_sources_are_guided_apart(make_model, edits, cfg, cfg_source, schedule):
    # the definition: one token after the other without a cache, the head step by step under three states
    model = make_model(sources="both", backbone={"max_position_embeddings": 128})
    ids, real, sources = edits
    order = draw_orders(2, N, "random", torch.device("cpu"), seeded())
    how = {"sources": sources, "cfg": cfg, "cfg_source": cfg_source, "cfg_schedule": schedule}
    drawn = draw_tokens(model, ids, real, head_steps=3, order=order, generator=seeded(1), **how)
    bos = torch.full((2, 1), model.text_tokenizer.bos_token_id)
    without = torch.cat([ids[:, :32], bos], 1)
    prompts = [
        (ids, real, *sources),
        (without, torch.ones_like(without, dtype=torch.bool), *sources),
        (bos, torch.ones_like(bos, dtype=torch.bool), None, None),
    ]
    tokens, groups, noise = torch.zeros(2, N, 5), torch.arange(N).expand(2, N), seeded(1)
    with torch.no_grad():
        for rank in range(N):
            both, source, none = (
                model.draw_states(tokens, prompt, which, order, groups, *seen)[:, rank]
                for prompt, which, *seen in prompts
            )
            x = torch.randn(2, 1, 5, generator=noise)[:, 0]
            share = {"constant": 1.0, "linear": (rank + 1) / N}.get(
                schedule, math.sin(math.pi / 2 * (rank + 1) / N) ** 2
            )
            of_text, of_source = (1 + (scale - 1) * share for scale in (cfg, cfg_source))
            for step in range(3):
                t = torch.full((2,), 1000 * step / 3)
                v, v_source, v_none = (model.head(x, t, state) for state in (both, source, none))
                x = x + (v_none + of_source * (v_source - v_none) + of_text * (v - v_source)) / 3
            tokens[torch.arange(2), order[:, rank]] = x
    torch.testing.assert_close(drawn, model.denormalized(tokens), rtol=1e-4, atol=1e-4)


def test_sources_that_do_not_fit(make_model, texts, edits):
    ids, real, sources = edits
    model = make_model(sources="both", backbone={"max_position_embeddings": 128})
    with pytest.raises(ValueError, match="features: expected as many as the ids have slots for, 16, got 0"):
        draw_tokens(model, ids, real)
    with pytest.raises(ValueError, match="cfg_source: expected 1 without sources, or of a head that is no flow; got 2"):
        draw_tokens(model, *texts, cfg_source=2.0)
    with pytest.raises(ValueError, match="cfg_source: expected 1 without sources, or of a head that is no flow; got 2"):
        draw_tokens(make_model(sources="both", head="ddpm"), ids, real, sources=sources, cfg_source=2.0)
    with pytest.raises(ValueError, match="sources: the model draws from text alone"):
        see_sources(make_model(), None, None, torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="vision: the model sees features of its sources, expected their encoder"):
        see_sources(model, None, None, torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="sources: expected as many for each of 3 captions, got 4"):
        draw_pictures(model, None, ["a", "b", "c"], sources=sources)


def test_each_token_is_drawn_by_the_head_under_its_state(make_model, texts):
    # the definition: one token after the other without a cache, the head step by step
    model = make_model()
    model.set_statistics(torch.randn(50, N, 5, generator=seeded()) * 3 + 1)
    order = draw_orders(2, N, "random", torch.device("cpu"), seeded())
    drawn = draw_tokens(model, *texts, head_steps=4, cfg=1.5, order=order, temperature=0.9, generator=seeded(1))
    ids, real = texts
    bos = torch.full((2, 1), model.text_tokenizer.bos_token_id)
    tokens = torch.zeros(2, N, 5)
    groups = torch.arange(N).expand(2, N)
    noise = seeded(1)
    with torch.no_grad():
        for rank in range(N):
            state = model.draw_states(tokens, ids, real, order, groups)[:, rank]
            null = model.draw_states(tokens, bos, torch.ones_like(bos, dtype=torch.bool), order, groups)[:, rank]
            x = torch.randn(2, 1, 5, generator=noise)[:, 0] * 0.9
            for step in range(4):
                t = torch.full((2,), 1000 * step / 4)
                v, null_v = model.head(x, t, state), model.head(x, t, null)
                x = x + (null_v + 1.5 * (v - null_v)) / 4
            tokens[torch.arange(2), order[:, rank]] = x
    torch.testing.assert_close(drawn, model.denormalized(tokens), rtol=1e-4, atol=1e-4)


def test_seeds_and_orders(make_model, texts):
    model = make_model()
    one = draw_tokens(model, *texts, 3, head_steps=2, generator=seeded(1))
    assert one.shape == (2, N, 5)
    assert torch.equal(one, draw_tokens(model, *texts, 3, head_steps=2, generator=seeded(1)))
    assert not torch.equal(one, draw_tokens(model, *texts, 3, head_steps=2, generator=seeded(2)))
    torch.manual_seed(0)
    assert torch.isfinite(draw_tokens(make_model(order="raster"), *texts, 3, head_steps=2)).all()


@pytest.mark.parametrize("head", ["ddpm", "mean_flow"])
def test_other_heads(make_model, texts, head):
    model = make_model(head=head)
    for cfg in (1.0, 2.0):
        tokens = draw_tokens(model, *texts, 3, head_steps=4, cfg=cfg, generator=seeded())
        assert tokens.shape == (2, N, 5)
        assert torch.isfinite(tokens).all()


def test_few_calls(make_model, texts, monkeypatch):
    # with guidance one pass of the transformer and one sampling of the head a step
    model = make_model()
    calls = []
    sample = FlowHead.sample
    monkeypatch.setattr(FlowHead, "sample", lambda self, *a, **k: calls.append("head") or sample(self, *a, **k))
    model.backbone.base_model.register_forward_hook(lambda *_: calls.append("transformer"))
    draw_tokens(model, *texts, 5, head_steps=2, cfg=2.0, generator=seeded())
    assert calls == ["transformer", "head"] * 5


def test_bad_input(make_model, texts):
    model = make_model()
    with pytest.raises(ValueError, match="steps: expected between 1 and 12"):
        draw_tokens(model, *texts, 13)
    with pytest.raises(ValueError, match=r"order: expected shape \(2, 12\)"):
        draw_tokens(model, *texts, order=torch.arange(N))
    ids, real = texts
    with pytest.raises(ValueError, match="positions for 64 tokens"):
        draw_tokens(model, ids.repeat(1, 12), real.repeat(1, 12))
    with pytest.raises(ValueError, match="schedule"):
        draw_tokens(model, *texts, schedule="sideways")


def test_answers_are_the_likeliest_ids(make_model, asked):
    model = make_model()
    ids, real = asked()
    features = torch.randn(2, 4, 7, generator=seeded())
    with torch.no_grad():
        expected = []
        for row in range(2):
            text = ids[row : row + 1, ~real[row].logical_not()]
            for _ in range(4):
                grown = torch.cat([text, text[:, -1:]], dim=1)  # whatever id stands in the place that is predicted
                logits = model.answer_logits(
                    features[row : row + 1], grown, torch.ones_like(grown, dtype=torch.bool), 1
                )
                text = torch.cat([text, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            found = text[0, -4:].tolist()
            end = model.text_tokenizer.eos_token_id
            expected.append(found[: found.index(end)] if end in found else found)
    answers = answer(model, features, ids, real, longest=4)
    assert answers == [text.strip() for text in model.text_tokenizer.batch_decode(expected, skip_special_tokens=True)]


def test_answers_end_with_the_context(make_model, asked):
    model = make_model({"max_position_embeddings": 12})
    ids, real = asked()
    features = torch.randn(2, 4, 7, generator=seeded())
    lengths = []
    model.backbone.base_model.register_forward_hook(
        lambda _, __, k, output: lengths.append(output.last_hidden_state.shape[1]), with_kwargs=True
    )
    answer(model, features, ids, real, longest=50)
    assert sum(lengths) <= 12
    with pytest.raises(ValueError, match="positions for 12 tokens, got 13"):
        answer(model, torch.randn(2, 7, 7), *asked(7))
