"""Sizes of a model, its teacher and its averages, and the rate of drop path, whatever the encoder."""

import copy

import pytest
import torch

from tests.conftest import randomize
from tests.uniflow.test_pretrained import DECODER, PREFIX, hugging_face
from uniflow import EncoderTeacher, UniFlow, UniFlowConfig, UniFlowObjective
from uniflow.flow_decoder import sincos_position_embedding

KINDS = ["own", *PREFIX]

pytestmark = pytest.mark.filterwarnings("ignore:flow_width. a flow head of width 32:UserWarning")


def tokenizer(kind, **changes):
    if kind == "own":
        torch.manual_seed(0)
        return randomize(UniFlow(UniFlowConfig.preset("tiny", image_size=16, num_decoder_layers=1, **changes))).eval()
    return randomize(UniFlow.from_encoder(randomize(hugging_face(kind, **changes)), **DECODER)).eval()


def pictures(size, seed=0):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_resized_model_is_the_same_function_of_pictures_of_the_new_size(kind, tmp_path):
    model = tokenizer(kind)
    model.embeddings.requires_grad_(False)
    images, latents = pictures(24), torch.randn(2, 36, model.config.latent_ch)
    states, condition = model.hidden_states(images), model.condition(latents)
    before = dict(model.named_parameters())
    averages = {name: parameter + 1 for name, parameter in before.items()}
    model.resize(24, averages)
    for found, expected in zip(model.hidden_states(images), states, strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(model.condition(latents), condition)
    changed = [name for name, parameter in model.named_parameters() if parameter is not before[name]]
    assert sorted(averages) == sorted(before)
    assert len(changed) == (2 if kind == "DINOv3ViT" else 3)  # which turns instead
    for name, parameter in model.named_parameters():
        assert averages[name].shape == parameter.shape
        assert torch.allclose(averages[name], parameter + 1, atol=1e-5)  # as the interpolation's weights sum to 1
        assert parameter.requires_grad == before[name].requires_grad

    assert model.config.image_size == 24
    model.save_pretrained(tmp_path)
    again = UniFlow.from_pretrained(tmp_path)
    assert (again.config.image_size, again.config.encoder) == (24, model.config.encoder)
    assert torch.equal(again.encode(images), model.encode(images))
    assert again.encode(pictures(16)).shape == (2, 16, model.config.latent_ch)


def test_an_encoder_at_the_size_and_rate_that_are_asked_for(tmp_path):
    given = hugging_face("Dinov2", drop_path_rate=0.1)
    given.save_pretrained(tmp_path)
    model = UniFlow.from_encoder(tmp_path, image_size=32, drop_path_rate=0.25, **DECODER)
    assert model.config.image_size == 32
    layers = [layer.layer for layer in model.encoder.layers]
    assert [layer.drop_path.drop_prob for layer in layers] == [0.25, 0.25]
    for own, its in zip(model.encoder.parameters(), given.encoder.parameters(), strict=True):
        assert torch.equal(own, its)
    # nothing has been learnt behind the encoder: positions there are those of a new model, not interpolated ones
    assert torch.equal(model.decoder_pos_embed, sincos_position_embedding(32, 8).view_as(model.decoder_pos_embed))
    model.save_pretrained(tmp_path / "out")
    again = UniFlow.from_pretrained(tmp_path / "out")
    assert again.config.encoder == model.config.encoder
    assert [layer.layer.drop_path.drop_prob for layer in again.encoder.layers] == [0.25, 0.25]
    again.set_drop_path_rate(0.0)
    again.resize(16)  # of which the rate stays
    again.save_pretrained(tmp_path / "out")
    none = UniFlow.from_pretrained(tmp_path / "out").train()
    assert isinstance(none.encoder.layers[0].layer.drop_path, torch.nn.Identity)
    assert torch.equal(none.encode(pictures(16)), none.encode(pictures(16)))


def test_the_rate_of_drop_path_of_our_own_layers(tmp_path):
    model = tokenizer("own", num_hidden_layers=3, drop_path_rate=0.1)
    model.save_pretrained(tmp_path)
    model = UniFlow.from_encoder(tmp_path, drop_path_rate=0.5)
    assert [layer.drop_path2.rate for layer in model.encoder.layers] == [0, 0.25, 0.5]
    assert model.config.drop_path_rate == 0.5
    with pytest.raises(ValueError, match=r"drop_path_rate: expected a probability in \[0, 1\), got 1.5"):
        model.set_drop_path_rate(1.5)
    with pytest.raises(ValueError, match="drop_path_rate: an encoder of the kind siglip_vision_model has none"):
        tokenizer("SiglipVision").set_drop_path_rate(0.1)


@pytest.mark.parametrize("kind", ["own", "Dinov2"])
def test_a_teacher_is_resized_from_the_size_that_it_was_trained_at(kind):
    """So that it is the same wherever a run was interrupted, whether it was lowered before or after."""
    model = tokenizer(kind)
    direct, others = EncoderTeacher.copy_of(model), [EncoderTeacher.copy_of(model) for _ in range(3)]
    direct.resize(24)
    for other in others[:2]:
        other.resize(8)
    images = pictures(24)
    lowered = [teacher.lowered(torch.bfloat16) for teacher in (direct, others[1])]
    lowered[1].resize(24)
    others[0].resize(24)
    assert torch.equal(others[0](images)[-1], direct(images)[-1])
    assert torch.equal(lowered[1](images)[-1], lowered[0](images)[-1])
    assert torch.allclose(others[2](images)[-1], direct(images)[-1], atol=1e-5)  # interpolated in the call
    assert not any(parameter.requires_grad for parameter in direct.parameters())
    assert len(copy.deepcopy(direct).state_dict()) == len(direct.state_dict())


def test_an_objective_at_another_size():
    objective = UniFlowObjective(tokenizer("Dinov2"))
    objective.resize(24)
    assert objective.image_size == objective.student.config.image_size == 24
    losses = objective(pictures(24))
    assert losses.distill.abs() < 1e-6
    losses.total.backward()
    assert objective.student.embeddings.embed.position_embeddings.grad.shape[1] == 37
    assert objective.teacher.embeddings.embed.position_embeddings.shape[1] == 37


def test_sizes_that_cannot_be():
    model = tokenizer("own")
    for size, message in ((18, r"a multiple of the patch \(4\), got 18"), (2, "at least 4, got 2"), ("x", "integer")):
        with pytest.raises(ValueError, match=f"image_size: expected .*{message}"):
            model.resize(size)
    assert model.config.image_size == 16


def test_models_of_one_config_are_of_their_own_sizes():
    config = UniFlowConfig.preset("tiny", image_size=16, num_decoder_layers=1)
    one, other = UniFlow(config), UniFlow(config)
    one.resize(24)
    assert other.config.image_size == config.image_size == 16
