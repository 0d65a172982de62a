"""Weights under prefixes, in dictionaries and beside others, as training leaves them."""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import smooth_picture
from uniflow import CheckpointError, EncoderTeacher, UniFlow
from uniflow.cli import run
from uniflow.training.optimization import MovingAverage


@pytest.fixture
def state(tiny):
    return tiny().state_dict()


@pytest.fixture
def folder(tiny, tmp_path):
    tiny().save_config(tmp_path)
    return tmp_path


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def compiled_inside(state):
    """Each layer compiled by itself, in an FSDP module that recomputes."""
    layer = "_fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod."
    return {
        ".".join([*parts[:3], layer + parts[3]])
        if (parts := name.split(".", 3))[:2] == ["encoder", "layers"]
        else name: x
        for name, x in state.items()
    }


def other(state):
    return {name: tensor + 1 for name, tensor in state.items()}


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
BESIDE = {"epoch": 3, "optimizer": OPTIMIZER, "scaler": {"scale": 1.0}, "args": {"model": "UniFlow"}}
ONE = {
    "compiled": lambda s: under("_orig_mod.", s),
    "DDP": lambda s: under("module.", s),
    "compiled, DDP": lambda s: under("module._orig_mod.", s),
    "DDP, compiled": lambda s: under("_orig_mod.module.", s),
    "layers": compiled_inside,
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(7), **under("module.", s)},
    "Lightning": lambda s: {"state_dict": under("tokenizer.", s) | {"loss.logvar": torch.zeros(())}, **BESIDE},
    "model": lambda s: {"model": s, **BESIDE},
    "model of DDP": lambda s: {"model": under("module.", s), "step": torch.tensor(7), **BESIDE},
    "another's": lambda s: {"model": s, "discriminator": {"conv.weight": torch.zeros(3)}, "teacher": {"encoder": {}}},
    "nested": lambda s: {"checkpoint": {"state_dict": s}},
}
SEVERAL = {
    "model, model_ema": lambda s: {"model": other(s), "model_ema": s, **BESIDE},
    "state_dict, ema.module": lambda s: {"state_dict": other(s), "ema": under("module.", s), **BESIDE},
    "online_model, ema_model": lambda s: {**under("online_model.", other(s)), **under("ema_model.", s)},
    "one whose keys have no prefix, ema": lambda s: {**other(s), "ema": s},
}


def assert_same(model, state):
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("layout", ONE)
def test_the_one_model_of_a_file_is_read_and_said(folder, state, layout):
    torch.save(ONE[layout](state), folder / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="taken (off|out of)") as said:
        model = UniFlow.from_pretrained(folder)
    assert_same(model, state)
    assert len(said) == 1
    assert "\n" not in str(said[0].message)


@pytest.mark.parametrize("layout", SEVERAL)
def test_of_several_models_one_is_chosen(folder, state, layout):
    torch.save(SEVERAL[layout](state), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds several models, ") as refused:
        UniFlow.from_pretrained(folder)
    names = [name if " " in name else repr(name) for name in layout.split(", ")]
    assert all(name in str(refused.value) for name in names)
    with warnings.catch_warnings(action="error"):
        assert_same(UniFlow.from_pretrained(folder, weights="ema"), state)
    with pytest.raises(CheckpointError, match=r"holds no one model called 'swa'; it holds "):
        UniFlow.from_pretrained(folder, weights="swa")


def test_safetensors_with_prefixes_and_both_parts_of_a_name(folder, state):
    save_file({**under("module.", other(state)), **under("ema.module.", state)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"several models, '(ema.)?module', '(ema.)?module'; choose"):
        UniFlow.from_pretrained(folder)
    assert_same(UniFlow.from_pretrained(folder, weights="ema"), state)
    assert_same(UniFlow.from_pretrained(folder, weights="module"), other(state))  # all of a name is that name


def test_what_is_asked_for_must_be_there(folder, state):
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="no one model called 'ema'; it holds one whose keys have no prefix"):
        UniFlow.from_pretrained(folder, weights="ema")


def test_what_does_not_fit_is_named_by_the_models_own_keys(folder, state):
    del state["chal_proj.c_fc.bias"]
    torch.save({"model": {**state, "more": torch.zeros(1)}, **BESIDE}, folder / "pytorch_model.bin")
    with (
        pytest.warns(UserWarning, match="5 other entries are left"),
        pytest.raises(CheckpointError, match=r"missing \(1\): chal_proj.c_fc.bias; unexpected \(1\): more"),
    ):
        UniFlow.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:.*is taken off its keys")
@pytest.mark.parametrize(
    "odd",
    [{"chal_proj.c_fc.weight": [1]}, {"model": {"chal_proj.c_fc.weight": 3}}, {"model": {"a": "b"}}],
    ids=str,
)
def test_what_holds_no_model_is_refused(folder, odd):
    torch.save(odd, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected a dictionary of tensors, got "):
        UniFlow.from_pretrained(folder)


def test_a_dictionary_within_itself_is_opened_once(folder, state):
    values = {"model": state}
    values["self"] = values
    values["again"] = [values]
    torch.save(values, folder / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="under 'model.'"):
        assert_same(UniFlow.from_pretrained(folder), state)
    torch.save({**under("_orig_mod.", state), **state}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds tensors twice"):
        UniFlow.from_pretrained(folder)


@pytest.mark.parametrize("layout", ONE)
def test_load_state_dict_takes_the_same(tiny, state, layout):
    model = tiny()
    with torch.no_grad():
        model.decoder_pos_embed.zero_()
    with pytest.warns(UserWarning, match="state_dict"):
        model.load_state_dict(ONE[layout](state))
    assert_same(model, state)


def test_states_of_modules_around_a_model(tiny, state):
    model = tiny()
    compiled = torch.compile(model, backend="eager")
    average = MovingAverage(model, 0.5)
    with warnings.catch_warnings(action="error"):
        compiled.load_state_dict(compiled.state_dict())
        model.load_state_dict(state)
        assert model.load_state_dict({"chal_proj.c_fc.bias": torch.zeros(64)}, strict=False).missing_keys
        assert model.load_state_dict(average.values, strict=False).unexpected_keys == []
    with pytest.warns(UserWarning, match="'_orig_mod.'|torch.compile"):
        model.load_state_dict(compiled.state_dict())
    with pytest.raises(CheckpointError, match="several models"):
        model.load_state_dict({"model": state, "ema": state | {}})


def test_encoders_and_teachers_of_such_files(folder, tiny, state):
    torch.save({"model": other(state), "ema": state}, folder / "pytorch_model.bin")
    teacher = EncoderTeacher.from_pretrained(folder, weights="ema")
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(teacher.last(images), tiny().hidden_states(images)[-1])
    assert torch.equal(
        UniFlow.from_encoder(folder, weights="ema").encoder.last(teacher.embeddings(images)), teacher.last(images)
    )
    with pytest.raises(CheckpointError, match="several models"):
        EncoderTeacher.from_pretrained(folder)


def test_the_vision_part_of_an_internvl(folder, tiny, state):
    """Both forms: with code of its own, in the layers of UniFlow; and that of the transformers package."""
    config = json.loads((folder / "config.json").read_text())
    config = {"model_type": "internvl_chat", "vision_config": {**config, "model_type": "intern_vit_6b"}}
    (folder / "config.json").write_text(json.dumps(config))
    encoder = {name: x for name, x in state.items() if name.startswith(("embeddings.", "encoder."))}
    rest = {"language_model.model.layers.0.mlp.weight": torch.zeros(2), "mlp1.0.weight": torch.zeros(3)}
    save_file({**under("vision_model.", encoder), **rest}, folder / "model.safetensors")
    images = torch.rand(1, 3, 16, 16)
    with warnings.catch_warnings(action="error"):
        model = UniFlow.from_encoder(folder)
    assert torch.equal(model.hidden_states(images)[-1], tiny().hidden_states(images)[-1])

    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    vision = transformers.InternVLVisionConfig(**sizes, image_size=[16, 16], patch_size=[4, 4])
    native = transformers.AutoModel.from_config(vision).eval()
    config = {"model_type": "internvl", "vision_config": vision.to_dict(), "text_config": {"model_type": "qwen2"}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({**under("model.vision_tower.", native.state_dict()), **rest}, folder / "model.safetensors")
    teacher = EncoderTeacher.from_pretrained(folder)
    assert teacher.prefix_tokens == 1
    with torch.no_grad():
        assert torch.allclose(teacher.last(images), native(images).last_hidden_state, atol=1e-5)
    UniFlow.from_encoder(folder, global_blocks_depth=1, num_decoder_layers=1).save_pretrained(folder / "around")
    again = UniFlow.from_pretrained(folder / "around")
    assert torch.allclose(again.hidden_states(images)[-1], teacher.last(images), atol=1e-5)


def test_the_command_says_what_it_takes_and_asks(folder, state, tmp_path, capsys):
    smooth_picture((16, 16), 0).save(tmp_path / "a.png")
    arguments = [
        "encode",
        str(tmp_path / "a.png"),
        "--checkpoint",
        str(folder),
        "--out",
        str(tmp_path / "x.safetensors"),
    ]
    torch.save({"model": state, "ema": other(state)}, folder / "pytorch_model.bin")
    assert run(arguments) == 2
    assert "several models, 'model', 'ema'; choose one of them as weights" in capsys.readouterr().err
    assert run([*arguments, "--weights", "ema"]) == 0
    assert "warning" not in capsys.readouterr().err
    torch.save({"model": under("module.", state)}, folder / "pytorch_model.bin")
    assert run([*arguments, "--force"]) == 0
    assert "uniflow: warning: " in (said := capsys.readouterr().err)
    assert "under 'model.module.'" in said
