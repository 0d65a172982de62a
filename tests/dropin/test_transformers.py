"""The heads inside transformers, on its own code: numbers, gradients and samples before and after `patch`."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import randomize
from tests.dropin.stand_ins import only_ours, rows
from tests.dropin.test_heads import compare, outputs_and_gradients
from uniflow_kernels import patch

pytestmark = pytest.mark.usefixtures("served")

WIDTH, LATENT, COND = 16, 6, 10


def vibevoice():
    models = pytest.importorskip("transformers.models.vibevoice")
    config = models.configuration_vibevoice.VibeVoiceDiffusionHeadConfig(
        hidden_size=WIDTH, latent_size=LATENT, num_hidden_layers=2, intermediate_size=48
    )
    head = models.modeling_vibevoice.VibeVoiceDiffusionHead(config)
    return head, (rows(5, LATENT), torch.tensor([0.0, 7.0, 999.0, 400.0, 31.0]), rows(5, WIDTH, seed=1))


def talking(name, prefix):
    models = pytest.importorskip(f"transformers.models.{name}")
    config = getattr(models, f"configuration_{name}").__dict__[f"{prefix}FlowHeadConfig"](
        hidden_size=WIDTH, latent_dim=LATENT, condition_dim=COND, num_hidden_layers=2
    )
    head = getattr(models, f"modeling_{name}").__dict__[f"{prefix}FlowHead"](config)
    return head, (rows(5, LATENT), rows(5, COND, seed=1))


HEADS = {
    "VibeVoice": vibevoice,
    "Pocket TTS": lambda: talking("pocket_tts", "PocketTTS"),
    "Gradium Phonon": lambda: talking("gradium_phonon_tts", "GradiumPhononTTS"),
}
TIMES = [torch.rand(5, 1, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


@pytest.mark.parametrize("name", HEADS)
def test_numbers_and_gradients(name, within_twice, monkeypatch):
    head, inputs = HEADS[name]()
    randomize(head)
    calls = [lambda one, *given: one(*given)]
    if name != "VibeVoice":  # a list of times, or none
        calls.append(lambda one, *given: one(*given, times=[t.to(given[0].dtype) for t in TIMES]))
    exact = copy.deepcopy(head).double()

    def found(one, dtype):
        return [outputs_and_gradients(Called(one, call), inputs, {}, dtype) for call in calls]

    expected = list(zip(found(head, torch.float32), found(exact, torch.float64), strict=True))
    patch(head, strict=True)
    only_ours(head, monkeypatch)
    for after, (before, reference) in zip(found(head, torch.float32), expected, strict=True):
        compare(after, before, reference, within_twice, floor=1e-6)


class Called(torch.nn.Module):
    def __init__(self, head, call):
        super().__init__()
        self.head, self.call = head, call

    def forward(self, *given):
        return self.call(self.head, *given)


@pytest.mark.parametrize("name", ["pocket_tts", "gradium_phonon_tts"])
def test_samples_of_flow_heads(name):
    prefix = {"pocket_tts": "PocketTTS", "gradium_phonon_tts": "GradiumPhononTTS"}[name]
    head, (noise, condition) = talking(name, prefix)
    randomize(head)
    modeling = getattr(pytest.importorskip(f"transformers.models.{name}"), f"modeling_{name}")
    sample = modeling.__dict__[f"{prefix}ForConditionalGeneration"].sample_latent
    model = SimpleNamespace(config=SimpleNamespace(flow_head_config=SimpleNamespace(flow_type="lsd")), flow_head=head)
    expected = sample(model, condition, noise, 4)
    patch(head, strict=True)
    torch.testing.assert_close(sample(model, condition, noise, 4), expected, rtol=1e-4, atol=1e-4)


def test_samples_of_a_diffusion_head():
    generation = pytest.importorskip("transformers.models.vibevoice.generation_vibevoice")
    schedulers = pytest.importorskip("diffusers.schedulers")
    head, (_, _, condition) = vibevoice()
    randomize(head)
    model = SimpleNamespace(
        model=SimpleNamespace(diffusion_head=head),
        config=SimpleNamespace(audio_config=SimpleNamespace(hidden_size=LATENT)),
    )

    def sample():
        torch.manual_seed(0)
        scheduler = schedulers.DDIMScheduler(prediction_type="v_prediction")
        make = generation.VibeVoiceGenerationMixin._sample_audio_latent
        return make(model, condition, 0 * condition, scheduler, 4, 1.5)

    expected = sample()
    patch(head, strict=True)
    torch.testing.assert_close(sample(), expected, rtol=1e-3, atol=1e-3)
