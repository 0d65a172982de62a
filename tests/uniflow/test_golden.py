"""The official release's own numbers, in float32 within 1e-5 relative."""

import pytest
import torch

TOLERANCE = 1e-5


def assert_golden(actual, expected):
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE, f"relative error {error:.2e}"


@pytest.fixture(scope="module", autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


def test_hidden_states(golden_model, golden):
    states = golden_model.hidden_states(golden["in.pixel_values"])
    assert len(states) == 4
    for i, state in enumerate(states):
        assert_golden(state, golden[f"out.hidden_states.{i}"])


def test_latent(golden_model, golden):
    assert_golden(golden_model.encode(golden["in.pixel_values"]), golden["out.latent"])


def test_condition(golden_model, golden):
    assert_golden(golden_model.condition(golden["out.latent"]), golden["out.condition"])


def test_velocity_with_a_time_per_token(golden_model, golden):
    noise, t = golden["in.noise"].view(2, 16, 588), golden["in.t"].view(2, 16)
    velocity = golden_model.velocity(noise, t, golden["out.condition"])
    assert_golden(velocity.flatten(0, 1), golden["out.velocity"])


def test_flow_head_on_rows(golden_model, golden):
    head = golden_model.flow_head.net
    velocity = head(golden["in.noise"], 1000 * golden["in.t"], golden["out.condition"].flatten(0, 1))
    assert_golden(velocity, golden["out.velocity"])


SAMPLERS = {
    "linear_1": {"steps": 1},
    "linear_4": {"steps": 4},
    "pow_0.25_4": {"steps": 4, "schedule": "pow_0.25"},
    "linear_4_cfg_2": {"steps": 4, "cfg": 2.0},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_images(golden_model, golden, name):
    noise = golden["in.noise"].view(2, 16, 588)
    images = golden_model.decode(golden["out.latent"], noise=noise, **SAMPLERS[name])
    assert_golden(images, golden[f"out.image.{name}"])
    assert_golden(golden_model(golden["in.pixel_values"], noise=noise, **SAMPLERS[name]), golden[f"out.image.{name}"])


def test_the_configured_number_of_steps_is_the_default(golden_model, golden):
    noise = golden["in.noise"].view(2, 16, 588)
    assert_golden(golden_model.decode(golden["out.latent"], noise=noise), golden["out.image.linear_1"])
    golden_model.config.num_sampling_steps = "4"
    assert_golden(golden_model.decode(golden["out.latent"], noise=noise), golden["out.image.linear_4"])
