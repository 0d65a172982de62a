"""The page in plain PyTorch computes what the official release does, and its losses are those of the objective."""

import pytest
import torch

from examples.plain_uniflow import PlainUniFlow, losses
from tests.conftest import randomize
from uniflow import EncoderTeacher, UniFlow, UniFlowObjective


def assert_golden(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_golden_numbers(golden_folder, golden):
    model = PlainUniFlow.from_pretrained(golden_folder)
    images, noise, t = golden["in.pixel_values"], golden["in.noise"].view(2, 16, 588), golden["in.t"].view(2, 16)
    for i, state in enumerate(model.hidden_states(images)):
        assert_golden(state, golden[f"out.hidden_states.{i}"])
    assert_golden(model.encode(images), golden["out.latent"])
    assert_golden(model.condition(golden["out.latent"]), golden["out.condition"])
    assert_golden(model.velocity(noise, t, golden["out.condition"]).flatten(0, 1), golden["out.velocity"])
    for steps in (1, 4):
        assert_golden(model.decode(golden["out.latent"], noise, steps), golden[f"out.image.linear_{steps}"])


@torch.no_grad()
def test_a_flow_head_of_a_width_of_its_own(tiny, tmp_path):
    model, noise = tiny(flow_width=96), torch.randn(2, 16, 48)
    model.save_pretrained(tmp_path)
    read, plain = UniFlow.from_pretrained(tmp_path), PlainUniFlow.from_pretrained(tmp_path)
    assert read.flow_head.net.model_channels == 96
    assert all(torch.equal(value, read.state_dict()[name]) for name, value in model.state_dict().items())
    latents = model.encode(torch.randn(2, 3, 16, 16))
    for steps in (1, 3):
        expected = model.decode(latents, steps, noise=noise)
        assert_golden(read.decode(latents, steps, noise=noise), expected)  # sums may depend on where a weight lies
        assert_golden(plain.decode(latents, noise, steps), expected)


def test_losses_and_gradients_are_those_of_the_objective(golden_folder, golden):
    plain, its_teacher = (PlainUniFlow.from_pretrained(golden_folder) for _ in range(2))
    ours, our_teacher = (UniFlow.from_pretrained(golden_folder).train() for _ in range(2))
    our_teacher.load_state_dict(randomize(its_teacher).state_dict())  # else the distance would be nothing
    images, noise, t = golden["in.pixel_values"], golden["in.noise"].view(2, 16, 588), golden["in.t"].view(2, 16)
    flow, distill = losses(plain, its_teacher, images, t, noise)
    expected = UniFlowObjective(ours, EncoderTeacher.copy_of(our_teacher))(images, t, noise)
    assert flow.item() == pytest.approx(expected.flow.item(), rel=1e-5)
    assert distill.item() == pytest.approx(expected.distill.item(), rel=1e-5)
    assert distill > 0.1
    (flow + distill).backward()
    expected.total.backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        assert_golden(theirs.pop(name).grad / parameter.grad.abs().max(), parameter.grad / parameter.grad.abs().max())
    assert not theirs
