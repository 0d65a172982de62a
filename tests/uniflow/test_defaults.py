"""Nobody else's defaults decide what is computed: the tokenizer and its losses give the same bits whatever they are."""

import pytest
import torch

from tests.conftest import randomize
from uniflow import UniFlowObjective, denormalize, normalize
from uniflow.diffusion import Diffusion, noise_loss, sample
from uniflow.flow import T_DISTRIBUTIONS, sample_t
from uniflow.normalization import to_uint8
from uniflow_kernels import FlowHead

PICTURES = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def of_pixels(model):
    images = normalize(PICTURES)
    return [images, denormalize(images), to_uint8(images)]


def of_model(model):
    images = normalize(PICTURES)
    latents = model.encode(images)
    condition = model.condition(latents)
    x = torch.randn(2, 16, 48, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        decoded = [model.decode(latents, steps=2, **how) for how in ({}, {"seed": 3}, {"cfg": 2.0, "noise": x})]
        drawn = model.decode(latents, steps=2, generator=torch.Generator().manual_seed(1))
    times = torch.linspace(0, 1, 2, dtype=torch.float32, device="cpu")
    return [*model.hidden_states(images), latents, condition, model.velocity(x, times, condition), *decoded, drawn]


def of_objective(model):
    values = []
    for options in ({}, {"t_per": "image", "layer_weights": "uniform", "chunk_tokens": 8}):
        losses = UniFlowObjective(model, **options)(PICTURES)
        gradients = torch.autograd.grad(losses.total, list(model.parameters()), allow_unused=True)
        values += [losses.total.detach(), losses.flow, losses.distill, losses.alpha, losses.weights, *gradients]
    return values


def of_diffusion(model):
    head = model.diffusing
    condition = torch.randn(3, 8, dtype=torch.float32, device="cpu")
    data = torch.randn(3, 6, dtype=torch.float32, device="cpu")
    loss = noise_loss(head, head.cond_embed(condition), data, Diffusion())
    return [loss, *(sample(head, condition, Diffusion(3), method) for method in ("ddpm", "ddim"))]


CALLS = {
    "pixels": of_pixels,
    "times": lambda model: [sample_t((5,), name, CPU) for name in T_DISTRIBUTIONS],
    "model": of_model,
    "objective": of_objective,
    "diffusion": of_diffusion,
}


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_whatever_the_defaults_are(name, tiny, same_bits):
    model = tiny()
    model.diffusing = randomize(FlowHead(6, 32, 12, 8, 1))
    same_bits(lambda: CALLS[name](model))
