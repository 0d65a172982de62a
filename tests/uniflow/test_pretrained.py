import copy
import dataclasses
import io
import json
import shutil
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import check_reset, randomize
from uniflow import CheckpointError, EncoderTeacher, UniFlow, UniFlowConfig, UniFlowObjective
from uniflow.cli import explain
from uniflow.cli.inputs import Named, load_model
from uniflow.encoder import Embeddings
from uniflow.latents import EncodedPicture, LatentsError, read_latents, write_latents
from uniflow.pretrained import pretrained_encoder

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 4}
DECODER = {"latent_ch": 8, "global_blocks_depth": 1, "num_decoder_layers": 2}
STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
PREFIX = {"ViT": 1, "ViTForImageClassification": 1, "Dinov2": 1, "Dinov2WithRegisters": 4, "CLIPVision": 1}
PREFIX |= {"SiglipVision": 0, "Siglip2Vision": 0, "DINOv3ViT": 3, "ViTMAE": 1, "InternVLVision": 1, "Aimv2Vision": 0}

pytestmark = pytest.mark.filterwarnings("ignore:flow_width. a flow head of width 32:UserWarning")


def hugging_face(kind, **changes):
    transformers = pytest.importorskip("transformers")
    size = {"num_patches": 16} if kind == "Siglip2Vision" else {"image_size": 16}
    if kind == "Dinov2WithRegisters":
        size["num_register_tokens"] = 3
    if kind == "DINOv3ViT":
        size["num_register_tokens"] = 2
    if kind == "InternVLVision":
        size |= {"image_size": [16, 16], "patch_size": [4, 4]}
    name = kind.partition("For")[0]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **size, **changes})
    torch.manual_seed(0)
    return getattr(transformers, kind if "For" in kind else f"{kind}Model")(config).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def hidden_states(model, images):
    arguments = {"pixel_values": images}
    if type(model).__name__ == "Siglip2VisionModel":  # rows of pixels, channels last
        rows = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(2, 16, 48)
        mask, grid = torch.ones(2, 16, dtype=torch.long), torch.full((2, 2), 4)
        arguments = {"pixel_values": rows, "pixel_attention_mask": mask, "spatial_shapes": grid}
    if type(model).__name__ == "ViTMAEModel":  # which leaves out none, and keeps their order, if told to
        model.config.mask_ratio = 0.0
        arguments |= {"noise": torch.arange(images[0, 0].numel() // 16).expand(2, -1), "interpolate_pos_encoding": True}
    return model(**arguments, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("kind", PREFIX)
def test_the_states_are_those_of_the_transformers_package(kind, images, tmp_path):
    model = randomize(hugging_face(kind))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = hidden_states(model, images)
    found = UniFlow.from_encoder(tmp_path, **DECODER).hidden_states(images)
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == (2, PREFIX[kind] + 16, 32)
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("DINOv3ViT", {}), ("ViTMAE", {}), ("InternVLVision", {}), ("Aimv2Vision", {"is_native": True})],
)
def test_at_other_sizes_too(kind, changes):
    model, images = randomize(hugging_face(kind, **changes)), torch.randn(2, 3, 8, 24)
    with torch.no_grad():
        expected = hidden_states(model, images)
    found = UniFlow.from_encoder(model, **DECODER).hidden_states(images)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_an_aimv2_takes_sizes_that_the_package_refuses():
    """As one whose table was interpolated for good."""
    model, images = randomize(hugging_face("Aimv2Vision")), torch.randn(2, 3, 24, 24)
    with pytest.raises(RuntimeError):
        hidden_states(model, images)
    larger = hugging_face("Aimv2Vision", image_size=24)
    table = model.embeddings.position_embedding.weight.detach().unflatten(0, (4, 4)).permute(2, 0, 1)[None]
    table = nn.functional.interpolate(table, (6, 6), mode="bicubic").flatten(2)[0].T
    state = {**model.state_dict(), "embeddings.position_embedding.weight": table}
    larger.load_state_dict(state)
    with torch.no_grad():
        expected = hidden_states(larger, images)
    assert torch.allclose(UniFlow.from_encoder(model, **DECODER).hidden_states(images)[-1], expected[-1], atol=1e-5)


def test_rotations_are_those_of_evaluation_in_float32(images):
    """The package stretches them at random in training, and rounds their frequencies if a model's dtype is changed."""
    model = UniFlow.from_encoder(randomize(hugging_face("DINOv3ViT")), **DECODER).eval()
    expected = model.hidden_states(images)[-1]
    assert torch.equal(model.train().hidden_states(images)[-1], expected)
    cosines = model.embeddings.positions(images)[0]
    changed = copy.deepcopy(model).bfloat16()
    assert torch.equal(changed.embeddings.positions(images)[0], cosines.bfloat16())
    assert changed.hidden_states(images)[-1].dtype == torch.bfloat16
    assert torch.equal(changed.float().embeddings.positions(images)[0], cosines)
    moved = copy.deepcopy(model).to("meta")
    assert moved.embeddings.rotations.rope.inv_freq.is_meta


@pytest.mark.parametrize("kind", ["Dinov2WithRegisters", "CLIPVision", "Siglip2Vision", "DINOv3ViT"])
def test_a_described_encoder_can_be_made_anew(kind):
    config = UniFlow.from_encoder(hugging_face(kind), **STATISTICS, **DECODER).config
    check_reset(lambda: UniFlow(config))


@pytest.mark.parametrize("kind", ["Dinov2WithRegisters", "Siglip2Vision", "DINOv3ViT", "ViTMAE", "Aimv2Vision"])
def test_a_tokenizer_around_it(kind, images):
    """Encodes, decodes, and trains beside a copy of its encoder: every parameter has a gradient, as DDP wants it."""
    model = UniFlow.from_encoder(hugging_face(kind), **DECODER)
    objective = UniFlowObjective(model, chunk_tokens=16)
    assert model.encode(images).shape == (2, 16, 8)
    assert model(images, steps=1).shape == images.shape
    assert model(torch.randn(2, 3, 8, 24), steps=1).shape == (2, 3, 8, 24)
    for part in (model.chal_proj, model.chal_unproj, model.global_blocks, model.flow_head):
        randomize(part)  # a new head's output is zero: the encoder would learn from the second step on
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = objective(images)
    assert losses.distill.abs() < 1e-6
    losses.total.backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    optimizer.step()
    assert objective(images).distill > 1e-6


@pytest.mark.parametrize("kind", PREFIX)
def test_saved_and_made_again_of_nothing_but_the_folder(kind, tmp_path, images, monkeypatch):
    """As it was to the bit, in its dtype; no random number is drawn, and the official type is not claimed."""
    model = UniFlow.from_encoder(randomize(hugging_face(kind)), **STATISTICS, **DECODER).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "uniflow_with_encoder"
    assert not {"architectures", "auto_map", "extra"} & set(config)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = torch.get_rng_state()
    again = UniFlow.from_pretrained(tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    assert again.config == UniFlowConfig.from_pretrained(tmp_path)
    assert again.config.encoder == model.config.encoder
    assert again.state_dict().keys() == model.state_dict().keys()
    noise = torch.randn(2, 16, 48)
    for ours, theirs in zip(again.hidden_states(images), model.hidden_states(images), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(again(images, steps=1, noise=noise), model(images, steps=1, noise=noise))
    assert torch.equal(EncoderTeacher.from_pretrained(tmp_path)(images)[-1], model.hidden_states(images)[-1])
    around = UniFlow.from_encoder(tmp_path, latent_ch=4, global_blocks_depth=0, num_decoder_layers=1)
    assert torch.equal(around.hidden_states(images)[-1], model.hidden_states(images)[-1])
    assert around.config.encoder == model.config.encoder
    model.bfloat16().save_pretrained(tmp_path)
    half = UniFlow.from_pretrained(tmp_path)
    assert half.dtype == next(half.encoder.parameters()).dtype == torch.bfloat16
    assert torch.equal(half.encode(images), model.encode(images))


def test_latents_are_of_a_model_with_its_encoder(tmp_path):
    """Written by a tokenizer, read by the one that was saved; not by one around another encoder."""
    model = UniFlow.from_encoder(hugging_face("Dinov2"), **DECODER)
    model.save_pretrained(tmp_path)
    latents, pictures = [torch.randn(16, 8)], [EncodedPicture("a.png", 16, 16)]
    write_latents(tmp_path / "latents", latents, pictures, model)
    read, _ = read_latents(tmp_path / "latents", UniFlow.from_pretrained(tmp_path))
    assert torch.equal(read[0], latents[0])
    for other in (
        UniFlow.from_encoder(hugging_face("Dinov2"), **STATISTICS, **DECODER),
        UniFlow.from_encoder(hugging_face("ViT"), **DECODER),
        UniFlow(dataclasses.replace(model.config, encoder=None)),
    ):
        other.load_state_dict({k: v for k, v in model.state_dict().items() if "chal" in k}, strict=False)
        with pytest.raises(LatentsError, match="another model: encoder"):
            read_latents(tmp_path / "latents", other)


def test_other_readers_do_not_take_it_for_an_official_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    UniFlow.from_encoder(hugging_face("ViT"), **DECODER).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="uniflow_with_encoder"):
        transformers.AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": None}, "config.json lacks encoder"),
        ({"encoder": {"kind": "vit"}}, "encoder: expected kind, config, mean, std, got"),
        ({"kind": "uniflux"}, "encoder: transformers .* has no model of the kind 'uniflux'"),
        ({"config": {"hidden_size": "wide"}}, "encoder: transformers makes no vit of its config: .*hidden_size"),
        ({"config": 3}, "encoder: transformers makes no vit of its config"),
        ({"mean": [0.5]}, r"mean: expected 3 numbers, one a channel, got \[0.5\]"),
        ({"std": [0.5, 0, 1]}, "std: expected 3 positive numbers"),
        ({"hidden_size": 64, "vit_hidden_size": 64}, "hidden_size: expected 32, as the encoder has it, got 64"),
        ({"num_hidden_layers": 3}, "num_hidden_layers: expected 2, as the encoder has it, got 3"),
    ],
)
def test_descriptions_that_make_no_such_encoder(tmp_path, changes, message):
    UniFlow.from_encoder(hugging_face("ViT"), **DECODER).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in changes.items():
        (config["encoder"] if name in ("kind", "config", "mean", "std") else config)[name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^{message}"):
        UniFlow.from_pretrained(tmp_path)


def test_an_encoder_that_its_configuration_does_not_make_is_not_saved(tmp_path):
    model = hugging_face("Dinov2")
    del model.encoder.layer[1:]
    tokenizer = UniFlow.from_encoder(model, **DECODER)
    assert tokenizer.config.encoder is None
    with pytest.raises(ValueError, match=r"^save_pretrained: expected an encoder of the InternViT kind"):
        tokenizer.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_its_own_statistics(images):
    model, mean, std = hugging_face("CLIPVision"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    pixels = (
        images * torch.tensor([0.229, 0.224, 0.225])[:, None, None] + torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    )
    own = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        expected = hidden_states(model, own)
    found = EncoderTeacher.from_pretrained(model, mean, std)(images)
    assert torch.allclose(found[-1], expected[-1], atol=1e-5)


def test_a_folder_of_the_transformers_package(tmp_path, images):
    """With the statistics that it says, unless others are given."""
    model = hugging_face("Dinov2")
    model.save_pretrained(tmp_path)
    assert torch.equal(EncoderTeacher.from_pretrained(tmp_path)(images)[-1], hidden_states(model, images)[-1])
    preprocessor = {f"image_{name}": values for name, values in STATISTICS.items()}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    found = UniFlow.from_encoder(tmp_path, **DECODER)
    expected = UniFlow.from_encoder(hugging_face("Dinov2"), **STATISTICS, **DECODER)
    assert torch.equal(found.hidden_states(images)[-1], expected.hidden_states(images)[-1])
    assert found.config == expected.config
    given = pretrained_encoder(tmp_path, mean=(0.1, 0.2, 0.3)).fields["encoder"]
    assert (given["mean"], given["std"]) == ([0.1, 0.2, 0.3], [0.2, 0.3, 0.4])
    (tmp_path / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"preprocessor_config.json is no configuration: expected a JSON object"):
        pretrained_encoder(tmp_path)


def test_the_same_encoder_in_both_roles_keeps_its_mode():
    model = hugging_face("ViT").train()
    pretrained_encoder(model)
    assert model.embeddings.training
    assert model.training


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_internvit(golden_folder, golden_model, tmp_path, prefix):
    """The encoder goes into UniFlow's own, and the result is saved and read like any other."""
    state = load_file(golden_folder / "model.safetensors")
    own = {prefix + k: v for k, v in state.items() if k.startswith(("embeddings.", "encoder."))}
    config = json.loads((golden_folder / "config.json").read_text())
    config = {**config, "model_type": "intern_vit_6b"}
    source = tmp_path / "internvit"
    source.mkdir()
    save_file(own | {"language_model.weight": torch.ones(2)}, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"vision_config": config} if prefix else config))

    model = UniFlow.from_encoder(source, latent_ch=8, global_blocks_depth=1, num_decoder_layers=2).eval()
    images = torch.randn(1, 3, config["image_size"], config["image_size"])
    for ours, theirs in zip(model.hidden_states(images), golden_model.hidden_states(images), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(EncoderTeacher.from_pretrained(source)(images), model.hidden_states(images), strict=True):
        assert torch.equal(ours, theirs)
    model.save_pretrained(tmp_path / "saved")
    again = UniFlow.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.encode(images), model.encode(images))
    assert again.config.latent_ch == 8


def test_an_official_folder_is_a_teacher(golden_folder, golden_model):
    teacher = EncoderTeacher.from_pretrained(golden_folder, dtype=torch.bfloat16)
    size = golden_model.config.image_size
    states = list(teacher.states(torch.randn(1, 3, size, size)))
    assert len(states) == golden_model.config.num_hidden_layers
    assert states[0].dtype == torch.bfloat16
    assert not any(p.requires_grad for p in teacher.parameters())


def test_damaged_and_wrong_folders(golden_folder, tmp_path):
    with pytest.raises(FileNotFoundError):
        pretrained_encoder(tmp_path)
    shutil.copy(golden_folder / "config.json", tmp_path)
    save_file({"other.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no encoder: no key begins with"):
        pretrained_encoder(tmp_path)
    save_file({"encoder.layers.0.ls1": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing .*embeddings.class_embedding.*of another shape"):
        pretrained_encoder(tmp_path)
    with pytest.raises(ValueError, match="mean, std: expected ImageNet's, since encoders of the InternViT kind"):
        pretrained_encoder(tmp_path, mean=(0.5, 0.5, 0.5))
    (tmp_path / "config.json").write_text('{"model_type": "intern_vit_6b", "hidden_size": 8}')
    with pytest.raises(ValueError, match=r"config.json lacks image_size"):
        pretrained_encoder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json is no configuration"):
        pretrained_encoder(tmp_path)


def test_without_the_transformers_package(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'uniflow-kernels\[hf\]'"):
        pretrained_encoder(tmp_path)


def test_a_saved_tokenizer_without_the_transformers_package(tmp_path, monkeypatch):
    UniFlow.from_encoder(hugging_face("ViT"), **DECODER).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'uniflow-kernels\[hf\]'"):
        UniFlow.from_pretrained(tmp_path)
    with pytest.raises(ImportError) as error:
        load_model(Named(tmp_path), "cpu", "auto")
    assert "pip install 'uniflow-kernels[hf]'" in explain(error.value)  # the command's line


class Backwards(nn.Module):
    """Embeddings that give the patches from the last to the first."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images).flip(1)


def test_what_is_no_such_encoder_is_refused():
    with pytest.raises(ValueError, match=r"^encoder: expected a vision transformer .* Linear has neither"):
        pretrained_encoder(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"^from_encoder: expected fields of the decoder .*, got hidden_size"):
        UniFlow.from_encoder(hugging_face("ViT"), hidden_size=64)
    with pytest.raises(ValueError, match=r"^encoder: use_shared_relative_position_bias is not supported"):
        pretrained_encoder(hugging_face("Beit", use_shared_relative_position_bias=True))
    model = hugging_face("SiglipVision")
    model.embeddings = Backwards(model.embeddings)
    with pytest.raises(ValueError, match=r"in raster order .* of its 16 tokens patch 0 changes \[15\]"):
        pretrained_encoder(model)
    model.config = SimpleNamespace(patch_size=4)
    with pytest.raises(ValueError, match="SiglipVisionModel has no num_channels in its config"):
        pretrained_encoder(model)


def test_native_embeddings_say_what_their_prefix_is(tiny):
    assert Embeddings.prefix_tokens == tiny().prefix_tokens == 1


# folders that are hostile, incomplete or another model's


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.fixture
def vit_folder(tmp_path):
    hugging_face("ViT").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda state: state.pop("encoder.layer.1.output.dense.bias"), r"missing \(1\): .*layer.*1.*bias"),
        (lambda state: state.pop("embeddings.cls_token"), r"missing \(1\): embeddings.cls_token"),
        (lambda state: state.update({"encoder.layer.2.extra": torch.ones(1)}), r"unexpected \(1\): .*layer.*2.extra"),
        (
            lambda state: state.update({"embeddings.cls_token": torch.ones(3)}),
            r"of another shape \(1\): .*\[3\], expected",
        ),
        (lambda state: [state.pop(name) for name in list(state) if "layer" in name], r"missing \(32\): "),
    ],
)
def test_weights_that_an_encoder_lacks_are_not_made_up(vit_folder, changes, message):
    """transformers gives them random numbers."""
    state = load_file(vit_folder / "model.safetensors")
    changes(state)
    save_file(state, vit_folder / "model.safetensors", metadata={"format": "pt"})
    for read in (pretrained_encoder, EncoderTeacher.from_pretrained, UniFlow.from_encoder):
        with pytest.raises(CheckpointError, match=f"does not hold this model; keys {message}"):
            read(vit_folder)


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTMAEForPreTraining"])
def test_what_an_encoder_has_no_use_for_may_be_missing_or_there(kind, vit_folder, images):
    """The head of a classifier; a pooler; MAE's decoder."""
    whole = hugging_face(kind)
    whole.save_pretrained(vit_folder)
    found = EncoderTeacher.from_pretrained(vit_folder)(images)
    assert torch.equal(found[-1], hidden_states(getattr(whole, "vit", whole), images)[-1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "detr"}, "a model of the kind 'detr' cannot be used here"),
        ({"model_type": "qwen2_5_vl"}, "a model of the kind 'qwen2_5_vl' cannot be used here: .* windows of them"),
        ({"model_type": "swinv2"}, "a model of the kind 'swinv2' cannot be used here: its layers change the number of"),
        ({"model_type": "beit", "use_relative_position_bias": True}, "use_relative_position_bias is not supported"),
        ({"model_type": "uniflux"}, "has no model of the kind 'uniflux'"),
        ({"model_type": None}, "has no model of the kind None"),
        ({"model_type": ["vit"]}, r"has no model of the kind \['vit'\]"),
        ({"backbone": "org/model", "use_pretrained_backbone": True}, "'backbone' is not supported"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'quantization_config' is not supported"),
        ({"dtype": "load"}, "dtype: expected one of float32, bfloat16, float16, float64, got 'load'"),
        ({"to_dict": 3}, "transformers has no field to_dict"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers': expected at most 1024, got 1000000000"),
        ({"num_hidden_layers": 1000}, "its config.json is of a much larger one"),
        (
            {"hidden_size": 2**30, "intermediate_size": 2**30},
            "its config.json is of one of .* numbers, its weights are",
        ),
        ({"image_size": 2**31}, "'image_size': expected at most 2147483647"),
        ({"image_size": 2**14}, "its config.json is of one of|of another shape"),
        ({"layer_norm_eps": float("nan")}, "expected finite numbers, got nan"),
        ({"hidden_act": "x" * 10**6}, "transformers makes no vit of its config"),
    ],
)
def test_configurations_that_an_encoders_folder_may_not_have(vit_folder, values, message):
    change(vit_folder, **values)
    with pytest.raises(ValueError, match=message) as caught:
        pretrained_encoder(vit_folder)
    assert len(str(caught.value)) < 700


def test_nothing_in_a_folder_runs_and_nothing_is_asked_for(vit_folder, monkeypatch):
    """Not after a "y" on stdin, and not what a configuration says about how it is run."""
    (vit_folder / "evil.py").write_text(f"open({str(vit_folder / 'ran')!r}, 'w')\n")
    classes = dict.fromkeys(("AutoConfig", "AutoModel", "AutoBackbone"), "evil.Evil")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked for the hub"))
    change(vit_folder, auto_map=classes, attn_implementation="org/kernel", _attn_implementation="org/kernel")
    said = pretrained_encoder(vit_folder).fields["encoder"]["config"]
    assert not {"auto_map", "attn_implementation", "_attn_implementation", "_name_or_path"} & set(said)
    change(vit_folder, model_type="of its own")
    with pytest.raises(ValueError, match="has no model of the kind 'of its own'"):
        pretrained_encoder(vit_folder)
    UniFlow.from_encoder(hugging_face("ViT"), **DECODER).save_pretrained(vit_folder)
    description = json.loads((vit_folder / "config.json").read_text())["encoder"]
    for kind, more in (("vit", {"auto_map": classes}), ("detr", {"backbone": "org/model"}), ("dpt", {"backbone": "x"})):
        change(vit_folder, encoder={**description, "kind": kind, "config": {**description["config"], **more}})
        if kind == "vit":
            UniFlow.from_pretrained(vit_folder)
        else:
            with pytest.raises(ValueError, match=f"encoder: a model of the kind '{kind}' cannot be used here"):
                UniFlow.from_pretrained(vit_folder)
    assert not (vit_folder / "ran").exists()


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "SiglipVision", "Siglip2Vision"])
def test_a_patch_that_leaves_a_rest_of_the_picture(kind, tmp_path):
    """SigLIP so400m has patches of 14 in pictures of 384: the encoder leaves out the rest, the tokenizer too."""
    changes = {"num_patches": 16} if kind == "Siglip2Vision" else {"image_size": 18}
    model = hugging_face(kind, **changes)
    model.save_pretrained(tmp_path / "encoder")
    tokenizer = UniFlow.from_encoder(tmp_path / "encoder", **DECODER).eval()
    assert tokenizer.config.image_size == 16
    side = 16 if kind == "Siglip2Vision" else 18
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = hidden_states(model, images[..., :16, :16] if kind == "Siglip2Vision" else images)
    for pictures in (images, images[..., :16, :16]):
        assert torch.allclose(tokenizer.hidden_states(pictures)[-1], expected[-1], atol=1e-5)
        assert torch.allclose(EncoderTeacher.from_pretrained(model)(pictures)[-1], expected[-1], atol=1e-5)
        assert tokenizer(pictures, steps=1).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"multiples of the patch \(4\), got 22x22"):
        tokenizer.encode(torch.zeros(1, 3, 22, 22))
    tokenizer.save_pretrained(tmp_path / "saved")
    again = UniFlow.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.encode(images), tokenizer.encode(images))


def test_an_encoder_is_not_made_on_the_meta_device(vit_folder):
    with torch.device("meta"), pytest.raises(ValueError, match="encoder: it has weights, which the meta device cannot"):
        UniFlow.from_encoder(vit_folder)


def test_a_teachers_dtype_by_its_name(vit_folder):
    teacher = EncoderTeacher.from_pretrained(vit_folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match=r"dtype: expected one of float32, .*, got 'int8'"):
        EncoderTeacher.from_pretrained(vit_folder, dtype="int8")
