"""A UniFlow in fp8: which layers are, on whose parameters, and what becomes of its numbers and of what it saves."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.conftest import randomize
from uniflow import UniFlow, UniFlowConfig
from uniflow.export.programs import export_programs
from uniflow_kernels.modules.fp8_linear import Fp8Linear


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "vit_hidden_size": 64}
    config = UniFlowConfig.preset("tiny", **shape, image_size=16, num_hidden_layers=2, global_blocks_depth=1)
    return randomize(UniFlow(config)).eval()


def images(batch=3):
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def in_fp8(model):
    return sorted(name for name, module in model.named_modules() if type(module) is Fp8Linear)


def cosine(a, b):
    return torch.cosine_similarity(a.double(), b.double(), dim=-1).mean()


def test_which_layers_are_and_what_they_do_to_the_numbers(model):
    lowered = model.at_precision("fp8")
    of_a_layer = ("attn.proj", "attn.qkv", "mlp.fc1", "mlp.fc2")
    layers = ("encoder.layers.0", "encoder.layers.1", "global_blocks.0")
    assert in_fp8(lowered) == [f"{layer}.{name}" for layer in layers for name in of_a_layer]
    assert (lowered.precision, model.precision, in_fp8(model)) == ("fp8", None, [])
    with torch.inference_mode():
        for ours, exact in zip(lowered.hidden_states(images())[1:], model.hidden_states(images())[1:], strict=True):
            assert 0.99 < cosine(ours, exact) < 0.99999
        latents = model.encode(images())
        assert 0.99 < cosine(lowered.encode(images()), latents) < 0.99999
        assert 0.99 < cosine(lowered.condition(latents), model.condition(latents)) < 0.99999
        half = copy.deepcopy(lowered).bfloat16()
        assert cosine(half.encode(images()), latents) > 0.99
    with pytest.raises(ValueError, match="it is for inference and has no gradient"):
        lowered.encode(images())


def test_the_parameters_are_those_of_the_model(model):
    lowered = model.at_precision("fp8")
    assert all(a is b for a, b in zip(lowered.parameters(), model.parameters(), strict=True))
    assert list(lowered.state_dict()) == list(model.state_dict())
    assert model.at_precision(None) is model
    assert lowered.at_precision("fp8") is lowered.at_precision(None) is lowered
    with torch.inference_mode():
        before = lowered.encode(images())
        for other in (copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered)), copy.deepcopy(model).lower("fp8")):
            assert torch.equal(other.encode(images()), before)
    with torch.no_grad():
        model.encoder.layers[1].mlp.fc2.weight.mul_(2)
        changed = lowered.encode(images())
    assert not torch.equal(changed, before)
    with torch.no_grad():
        assert torch.equal(model.at_precision("fp8").encode(images()), changed)


def test_what_is_saved_is_in_full_precision(model, tmp_path):
    model.at_precision("fp8").save_pretrained(tmp_path)
    again = UniFlow.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    lowered = UniFlow.from_pretrained(tmp_path, precision="fp8")
    assert lowered.precision == "fp8"
    encoder = lowered.compile_encoder(3)
    with torch.inference_mode():
        assert torch.equal(encoder(images()), model.at_precision("fp8").encode(images()))
        assert torch.equal(model.compile_encoder(3, precision="fp8")(images()), encoder(images()))


def test_no_program_is_made_of_it(model):
    with pytest.raises(ValueError, match="model: expected it in full precision, as other runtimes have it, got fp8"):
        export_programs(model.at_precision("fp8"))


def test_an_encoder_of_the_transformers_package(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16, "patch_size": 4}
    encoder = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    model = UniFlow.from_encoder(encoder, latent_ch=8, global_blocks_depth=1, num_decoder_layers=1).eval()
    lowered = model.at_precision("fp8")
    kinds = [type(part) for part in lowered.encoder.modules() if isinstance(part, nn.Linear)]
    assert kinds == [Fp8Linear] * 12
    with torch.inference_mode():
        assert 0.99 < cosine(lowered.encode(images()), model.encode(images())) < 0.99999


def test_layers_of_other_sizes_stay(model):
    odd = UniFlow(UniFlowConfig.preset("tiny", intermediate_size=100, image_size=16)).eval()
    lowered = odd.at_precision("fp8")
    assert not [name for name in in_fp8(lowered) if name.startswith("encoder") and "mlp" in name]
    assert "encoder.layers.0.attn.qkv" in in_fp8(lowered)
    with pytest.raises(ValueError, match="precision: expected one of fp8, got 'int8'"):
        model.at_precision("int8")
    with pytest.raises(ValueError, match="precision: expected one of fp8, got 'int8'"):
        model.lower("int8")
