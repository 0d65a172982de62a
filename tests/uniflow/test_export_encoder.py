"""The encoder alone, for the transformers package and for InternViT's code: read back, its states are the same."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import randomize, smooth_picture
from tests.uniflow.test_pretrained import DECODER, PREFIX, STATISTICS, hidden_states, hugging_face
from uniflow import EncoderTeacher, UniFlow, UniFlowConfig, normalize
from uniflow.cli import run
from uniflow.export import encoders, write_encoder
from uniflow.pictures import to_tensor
from uniflow.pretrained import pretrained_encoder

FILES = ["config.json", "model.safetensors", "preprocessor_config.json"]
KINDS = [*(kind for kind in PREFIX if "For" not in kind), "DeiT", "Pixio", "IJepa"]

pytestmark = pytest.mark.filterwarnings("ignore:flow_width. a flow head of width 32:UserWarning")


def own_images(images, mean=STATISTICS["mean"], std=STATISTICS["std"]):
    """Those of `uniflow.normalize` as an encoder with other statistics takes them."""
    shape = (3, 1, 1)
    pixels = images * torch.tensor([0.229, 0.224, 0.225]).view(shape) + torch.tensor([0.485, 0.456, 0.406]).view(shape)
    return (pixels - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def read_back(folder, images):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        return model, hidden_states(model, images)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_read_back_by_the_transformers_package(kind, tmp_path, images):
    tokenizer = UniFlow.from_encoder(randomize(hugging_face(kind)), **STATISTICS, **DECODER).eval()
    randomize(tokenizer.encoder, seed=1)  # as training leaves it: other values than it came with
    randomize(tokenizer.embeddings, seed=2)
    paths = write_encoder(tokenizer, tmp_path / "encoder")
    assert [path.name for path in paths] == sorted(path.name for path in (tmp_path / "encoder").iterdir()) == FILES
    _, expected = read_back(tmp_path / "encoder", own_images(images))
    found = tokenizer.hidden_states(images)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    again = EncoderTeacher.from_pretrained(tmp_path / "encoder")(images)
    assert torch.allclose(again[-1], found[-1], atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False, "hidden_act": "silu"},
        {"layer_norm_eps": 1e-3, "hidden_act": "gelu_pytorch_tanh"},
    ],
)
@pytest.mark.parametrize("to", encoders.KINDS)
def test_an_official_one_is_an_internvit(to, changes, tiny, tmp_path, images):
    """For transformers the vision model of an InternVL, whose queries, keys and values are apart."""
    model = randomize(tiny(**changes)).eval()
    write_encoder(model, tmp_path, to)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    found = model.hidden_states(images)
    if to == "transformers":
        theirs, expected = read_back(tmp_path, images)
        assert type(theirs).__name__ == "InternVLVisionModel"
        for ours, other in zip(found, expected, strict=True):
            assert torch.allclose(ours, other, atol=1e-5)
        wide = torch.randn(2, 3, 8, 24)
        with torch.no_grad():
            assert torch.allclose(theirs(wide).last_hidden_state, model.hidden_states(wide)[-1], atol=1e-5)
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        assert (config["model_type"], config["architectures"]) == ("intern_vit_6b", ["InternVisionModel"])
        own = {
            name: tensor for name, tensor in model.state_dict().items() if name.startswith(("embeddings", "encoder"))
        }
        state = load_file(tmp_path / "model.safetensors")
        assert state.keys() == own.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in own.items())
    for ours, teacher in zip(found, EncoderTeacher.from_pretrained(tmp_path)(images), strict=True):
        assert torch.allclose(ours, teacher, atol=1e-5)


def test_its_images_are_those_that_the_preprocessor_makes(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = UniFlow.from_encoder(randomize(hugging_face("CLIPVision")), **STATISTICS, **DECODER).eval()
    write_encoder(tokenizer, tmp_path)
    picture = smooth_picture((16, 16), 0)
    made = transformers.AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"]
    _, expected = read_back(tmp_path, made)
    found = tokenizer.hidden_states(normalize(to_tensor(picture)[None]))
    assert torch.allclose(found[-1], expected[-1], atol=1e-4)
    patches = UniFlow.from_encoder(hugging_face("Siglip2Vision"), **DECODER)
    write_encoder(patches, tmp_path / "patches")
    said = json.loads((tmp_path / "patches" / "preprocessor_config.json").read_text())
    assert (said["image_processor_type"], said["patch_size"], said["max_num_patches"]) == (
        "Siglip2ImageProcessor",
        4,
        16,
    )


@pytest.mark.parametrize(("kind", "lacks"), [("Dinov2", "layernorm.weight"), ("CLIPVision", "post_layernorm.weight")])
def test_what_a_tokenizer_does_not_keep_comes_from_the_original(kind, lacks, tmp_path):
    """A last norm; a mask token where there is one. Not what training has changed."""
    source = randomize(hugging_face(kind))
    source.save_pretrained(tmp_path / "original")
    tokenizer = randomize(UniFlow.from_encoder(tmp_path / "original", **DECODER), seed=5)
    write_encoder(tokenizer, tmp_path / "without")
    write_encoder(tokenizer, tmp_path / "with", original=tmp_path / "original")
    without, beside = (load_file(tmp_path / name / "model.safetensors") for name in ("without", "with"))
    whole = load_file(tmp_path / "original" / "model.safetensors")
    assert beside.keys() == whole.keys()
    extra = beside.keys() - without.keys()
    assert any(name.endswith(lacks) for name in extra)
    assert all(torch.equal(beside[name], whole[name]) for name in extra)
    assert not any(torch.equal(beside[name], whole[name]) for name in without)
    hugging_face("SiglipVision").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"^original: expected a .*, as the encoder is, got a siglip_vision_model"):
        write_encoder(tokenizer, tmp_path / "with", original=tmp_path / "other")


def test_in_the_dtype_of_the_tokenizer(tiny, tmp_path):
    for name, model in (("own", tiny()), ("other", UniFlow.from_encoder(hugging_face("DINOv3ViT"), **DECODER))):
        write_encoder(model.bfloat16(), tmp_path / name)
        assert {tensor.dtype for tensor in load_file(tmp_path / name / "model.safetensors").values()} == {
            torch.bfloat16
        }
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_cannot_be(tiny, tmp_path):
    other = UniFlow.from_encoder(hugging_face("ViT"), **DECODER)
    for model, how, message in (
        (tiny(), {"to": "timm"}, r"^to: expected transformers or internvit, got 'timm'"),
        (
            other,
            {"to": "internvit"},
            r"^to: expected transformers for an encoder of the kind 'vit': it is no InternViT",
        ),
        (tiny(), {"original": tmp_path}, r"^original: expected none, since an InternViT has nothing that"),
        (tiny(qk_normalization=True, layer_norm_eps=1e-5), {}, r"^to: transformers normalises .* got 1e-05; internvit"),
    ):
        with pytest.raises(ValueError, match=message):
            write_encoder(model, tmp_path / "new", **how)
    assert not (tmp_path / "new").exists()


def test_nothing_is_half_written(tiny, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(encoders, "write_values", fails)
    with pytest.raises(OSError, match="the disk is full"):
        write_encoder(tiny(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command(tiny, tmp_path, capsys):
    tiny().save_pretrained(tmp_path / "official")
    UniFlow.from_encoder(hugging_face("Dinov2"), **DECODER).save_pretrained(tmp_path / "other")
    before = (tmp_path / "official" / "model.safetensors").read_bytes()

    def export(checkpoint, *more, out="new"):
        status = run(["export", "--checkpoint", str(tmp_path / checkpoint), "--out", str(tmp_path / out), *more])
        return status, capsys.readouterr()

    for checkpoint, to in (("official", "internvit"), ("other", "transformers")):
        status, said = export(checkpoint, "--to", to, out=to)
        assert (status, said.out) == (0, f"written to {tmp_path / to}: {', '.join(FILES)}\n"), said.err
        pretrained_encoder(tmp_path / to)
    for checkpoint, more, message in (
        ("official", ["--to", "timm"], "--to: expected one of onnx, pt2, transformers, internvit, got 'timm'"),
        (
            "official",
            ["--to", "internvit", "--steps", "2"],
            "--steps: expected with a decoder, and --to internvit writes",
        ),
        (
            "official",
            ["--to", "pt2", "--original", "x"],
            "--original: expected with --to transformers alone, got it with",
        ),
        ("other", ["--to", "internvit"], "to: expected transformers for an encoder of the kind 'dinov2'"),
        ("other", ["--to", "transformers", "--original", str(tmp_path / "none")], "no such folder"),
    ):
        status, said = export(checkpoint, *more)
        assert status == 2
        assert message in said.err
        assert said.err.count("\n") - said.err.count("warning: ") == 1
        assert not (tmp_path / "new").exists()
    status, said = export("official", "--to", "internvit", "--force", out="official")
    assert status == 2
    assert "--out: expected another folder than that of --checkpoint" in said.err
    assert (tmp_path / "official" / "model.safetensors").read_bytes() == before
    status, said = export("official", "--to", "internvit", out="internvit")
    assert (status, "config.json exists; --force overwrites it" in said.err) == (2, True)
    assert UniFlowConfig.from_pretrained(tmp_path / "official").encoder is None
