"""LoRA: what is trained, checkpoints, merging, and what is refused."""

import shutil
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from tests.uniflow.test_cli import contents, fails, ok
from tests.uniflow.unifluid.conftest import LLAMA
from tests.uniflow.unifluid.test_cli import RECIPE, last, losses, no_bars, place, run_file
from uniflow.unifluid.config import Lora, UniFluidConfig
from uniflow.unifluid.model import UniFluid

__all__ = ["no_bars", "place", "run_file"]  # fixtures

QWEN = {"model_type": "qwen2"}  # with biases, and a window that is not used
SIZES = {"token_channels": 5, "grid": (3, 4), "head_width": 32, "head_depth": 1}
FEW = ("q_proj", "v_proj")


def states(model):
    generator = torch.Generator().manual_seed(0)
    ids, real = torch.randint(3, 290, (2, 5), generator=generator), torch.ones(2, 5, dtype=torch.bool)
    order = torch.stack([torch.randperm(12, generator=generator) for _ in range(2)])
    tokens = torch.randn(2, 12, 5, generator=generator).to(model.dtype)
    with torch.no_grad():
        return model.draw_states(tokens, ids, real, order, torch.arange(12).expand(2, 12))


def learnt(model):
    """What training may have made of the adapters."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("targets", ["all-linear", FEW], ids=["all", "few"])
@pytest.mark.parametrize("backbone", [{}, QWEN], ids=["llama", "qwen2"])
def test_adapters_begin_as_nothing_and_merge(make_model, tmp_path, monkeypatch, backbone, targets):
    plain = make_model(backbone)
    model = make_model(backbone, lora=Lora(rank=4, alpha=8, targets=targets))
    own = plain.state_dict()
    model.load_state_dict({**model.state_dict(), **{
        name: own[name.replace("base_layer.", "")] for name in model.state_dict() if "lora_" not in name
    }})  # fmt: skip
    assert torch.equal(states(model), states(plain))
    adapted = {name.split(".")[-4] for name in model.state_dict() if "lora_A" in name}
    few = set(FEW)
    assert adapted == (few if targets == FEW else few | {"k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})

    learnt(model).save_pretrained(tmp_path / "adapters")
    again = UniFluid.from_pretrained(tmp_path / "adapters")
    before = states(model)
    assert (before - states(plain)).abs().max() > 1e-2
    assert torch.equal(states(again), before)
    again.merge_adapters()
    torch.testing.assert_close(states(again), before, rtol=0, atol=1e-5)
    again.save_pretrained(tmp_path / "merged")
    monkeypatch.setitem(sys.modules, "peft", None)
    merged = UniFluid.from_pretrained(tmp_path / "merged")  # a plain one, which needs no peft
    assert merged.config == plain.config
    assert set(merged.state_dict()) == set(own)
    assert torch.equal(states(merged), states(again))
    with pytest.raises(ValueError, match="lora: the model has no adapters"):
        merged.merge_adapters()
    with pytest.raises(ImportError, match=r"peft package: pip install 'uniflow-kernels\[lora\]'"):
        UniFluid.from_pretrained(tmp_path / "adapters")


def test_a_merge_is_exact_where_numbers_are(make_model):
    model = learnt(make_model(lora=Lora(rank=4))).double()
    before = states(model)
    model.merge_adapters()
    torch.testing.assert_close(states(model), before, rtol=0, atol=1e-12)


def test_compiled_layers_have_them(make_model):
    model = learnt(make_model(lora=Lora(rank=2)))
    before = states(model)
    for layer in model.layers():
        layer.compile(backend="eager", fullgraph=True)
    assert torch.equal(states(model), before)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, r"lora\.rank: expected an integer of at least 1"),
        ({"alpha": float("nan")}, r"lora\.alpha: expected a number from 0"),
        ({"dropout": 1.0}, r"lora\.dropout: expected a number from 0.* got 1"),
        ({"targets": []}, r"lora\.targets: expected all-linear or a list of names, got an empty one"),
        ({"targets": "q_proj"}, r"lora\.targets: expected all-linear or a list of names, got 'q_proj'"),
        ({"ranks": 1}, "lora: unknown field ranks"),
        (3, "lora: expected the fields of adapters, got 3"),
    ],
)
def test_what_no_adapters_can_be(lora, message):
    with pytest.raises(ValueError, match=message):
        UniFluidConfig(LLAMA, **SIZES, lora=lora)


@pytest.mark.parametrize(
    ("backbone", "targets", "message"),
    [
        (
            {},
            ["q_proj", "wide"],
            r"a llama have no nn.Linear called wide; .* all-linear or some of down_proj, ga",
        ),
        ({}, ["lm_head"], r"a llama have no nn.Linear called lm_head"),
        ({"model_type": "gpt2"}, "all-linear", r"a gpt2 have no nn.Linear called all-linear; .* some of none"),
    ],
)
def test_targets_that_are_not_there(make_model, backbone, targets, message):
    with pytest.raises(ValueError, match=rf"lora\.targets: the layers of {message}"):
        make_model(backbone, lora=Lora(targets=targets))


def test_a_run_from_files(capsys, run_file, place, make_model):
    """Only adapters and what is new are trained; it goes on to the bit; merged, it draws and answers the same."""
    given = make_model()
    given.backbone.save_pretrained(place / "llama")
    given.text_tokenizer.save_pretrained(place / "llama")
    model = f"backbone: {place / 'llama'}, head_width: 32, head_depth: 1, checkpointing: all"
    lora = "lora: {rank: 4, alpha: 8, dropout: 0.1}"
    said = {"model": f"{{{model}, {lora}}}", "recipe": f"{{{RECIPE}, micro_batch_size: 2, ema_decay: 0.9}}"}
    run = place / "run"
    ok(capsys, "unifluid", "train", run_file(**said))
    whole, end = losses(run), contents(last(run))
    first, trained = (UniFluid.from_pretrained(run / "checkpoints" / f"step-0000000{step}") for step in (1, 4))
    now = trained.state_dict()
    changed = {name for name, value in first.state_dict().items() if not torch.equal(value, now[name])}
    own = {name.replace("base_layer.", ""): name for name in now if "lora_" not in name}
    for name, value in given.backbone.state_dict().items():
        assert torch.equal(now[own[f"backbone.{name}"]], value)
    beside = {name for name in now if not name.startswith("backbone.") and not name.startswith("token_")}
    assert changed == beside | {"token_proj.weight", "token_proj.bias"} | {name for name in now if "lora_" in name}

    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step-0000000{step}")
    ok(capsys, "unifluid", "train", run_file(**said), "--resume", "auto")
    assert losses(run) == whole
    for name in ("model.safetensors", "ema/model.safetensors", "optimizer.pt"):
        assert contents(last(run))[name] == end[name]
    other = {**said, "model": f"{{{model}, lora: {{rank: 2}}}}"}
    assert "its config.json has another lora" in fails(
        capsys, "unifluid", "train", run_file(**other), "--resume", last(run), "--out", place / "other"
    )

    printed = {}
    for name, folder in (("adapters", last(run)), ("averages", last(run) / "ema")):
        ok(capsys, "unifluid", "merge", folder, "--out", place / name)
        merged, before = UniFluid.from_pretrained(place / name), UniFluid.from_pretrained(folder)
        assert merged.config.lora is None
        shape = {"ids": torch.tensor([[5, 6, 7]]), "real": torch.ones(1, 3, dtype=torch.bool)}
        order, tokens = torch.arange(4).unsqueeze(0), torch.randn(1, 4, merged.config.token_channels)
        with torch.no_grad():
            found, expected = (m.draw_states(tokens, *shape.values(), order, order) for m in (merged, before))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for folder in (last(run), place / "adapters"):
        ask = ["unifluid", "ask", place / "data" / "0.png", "--question", "which colour?", "--checkpoint", folder]
        printed[folder] = ok(capsys, *ask, "--vision", place / "tokenizer", "--longest", 4)
    assert len(set(printed.values())) == 1
    assert "config.json exists" in fails(capsys, "unifluid", "merge", last(run), "--out", place / "adapters")
    assert "the model has no adapters" in fails(
        capsys, "unifluid", "merge", place / "adapters", "--out", place / "twice"
    )
    assert not (place / "twice").exists()


def test_runs_that_are_refused(capsys, monkeypatch, run_file, place, make_model):
    assert "lora: expected a pretrained backbone beside it" in fails(
        capsys, "unifluid", "train", run_file(model="{config: {model_type: llama}, lora: {rank: 4}}")
    )
    given = make_model()
    given.backbone.save_pretrained(place / "llama")
    given.text_tokenizer.save_pretrained(place / "llama")
    model = f"backbone: {place / 'llama'}, head_width: 32, head_depth: 1"
    assert "model.lora.ranks" in fails(capsys, "unifluid", "train", run_file(model=f"{{{model}, lora: {{ranks: 4}}}}"))
    wrong = fails(capsys, "unifluid", "train", run_file(model=f"{{{model}, lora: {{targets: [wide]}}}}"))
    assert "have no nn.Linear called wide" in wrong
    monkeypatch.setitem(sys.modules, "peft", None)
    wrong = fails(capsys, "unifluid", "train", run_file(model=f"{{{model}, lora: {{rank: 4}}}}"))
    assert "pip install 'uniflow-kernels[lora]'" in wrong
    assert not (place / "run" / "checkpoints").exists()
