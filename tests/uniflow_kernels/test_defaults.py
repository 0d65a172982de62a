"""Nobody else's defaults decide what is computed: every public name gives the same bits whatever they are."""

import pytest
import torch

import uniflow_kernels
from tests.conftest import randomize
from tests.dropin.stand_ins import PROJECTS, Canonical
from uniflow_kernels import (
    FlowHead,
    LayerwiseDistillation,
    attention,
    backend,
    compared_residual_norm,
    doctor,
    flow_matching_loss,
    fp8_linear,
    fused_flow_blocks,
    gated_residual_norm,
    interpolate,
    layerwise_distillation,
    mean_flow_loss,
    modulated_norm,
    noise_seed,
    patch,
    patched,
    patchify,
    residual_norm,
    seeded_noise,
    self_distillation_loss,
    to_images,
    unpatch,
    unpatchify,
    velocity_loss,
    verify,
)
from uniflow_kernels.dropin import verification

F32 = {"dtype": torch.float32, "device": "cpu"}
NORMALISED = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


class Inputs:
    """Made before a default is changed."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, **F32)

        self.images, self.pixels = normal(2, 3, 8, 12), torch.arange(576, dtype=torch.uint8).view(2, 3, 8, 12)
        self.noise, self.condition, self.other = normal(2, 6, 48), normal(2, 6, 24), normal(2, 6, 24)
        self.velocity = normal(2, 6, 48).requires_grad_()
        self.t = torch.rand(2, 6, generator=generator, **F32)
        self.mask = self.t < 0.7
        self.head = randomize(FlowHead(48, 32, 48, 24, 2))
        self.stepping = randomize(FlowHead(48, 32, 48, 24, 1, times=2))
        self.sampled = randomize(FlowHead(16, 32, 16, 24, 2))
        self.model = randomize(Canonical())


def with_gradients(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def distilled(given):
    pushed = LayerwiseDistillation(1, skip_tokens=1)
    student = given.condition.clone().requires_grad_()
    pushed.push(1, student, given.other)
    loss, alpha, weights = pushed.result()
    return [*with_gradients(loss, student), alpha, weights]


def distilled_at_once(given):
    student = given.condition.clone().requires_grad_()
    loss, alpha, weights = layerwise_distillation([student, student], [given.other, given.condition])
    return [*with_gradients(loss, student), alpha, weights]


def of_head(given):
    condition, head = given.condition[0], given.sampled
    drawn = [
        head.sample(
            condition, 2, cfg=cfg, null_condition=given.other[0, :1], generator=torch.Generator().manual_seed(1)
        )
        for cfg in (1, 2)
    ]
    return [given.head(given.noise[0], 0.5, condition), *drawn]


def of_loss(given):
    losses = []
    for chunk_tokens in (None, 6):
        condition = given.condition.clone().requires_grad_()
        loss = flow_matching_loss(
            given.head, condition, given.images, given.t, 4, seed=3, mask=given.mask, chunk_tokens=chunk_tokens
        )
        losses += with_gradients(loss, condition, *given.head.parameters())
        with torch.no_grad():
            arguments = given.head, condition, given.images, given.t, 4, given.noise
            losses.append(flow_matching_loss(*arguments, chunk_tokens=chunk_tokens))
    return losses


def of_blocks(given):
    net = given.head
    y = net.time_embed(given.t[0]) + net.cond_embed(given.condition[0])
    blocks, modulations, final = net.tensors()
    return [fused_flow_blocks(net.input_proj(given.noise[0]), y, blocks, modulations, final)]


def of_velocity(given):
    losses = []
    for images, options in ((given.images, {}), (given.pixels, NORMALISED)):
        for how in ({"noise": given.noise}, {"seed": 5}, {"seed": 5, "mask": given.mask, "reduction": "none"}):
            loss = velocity_loss(given.velocity, images, 4, **how, **options)
            losses += with_gradients(loss.sum(), given.velocity)
    return losses


def of_interpolate(given):
    points = []
    for images, options in ((given.images, {}), (given.pixels, NORMALISED)):
        t = given.t.clone().requires_grad_()
        points += with_gradients(interpolate(images, t, 4, seed=5, **options).sum(), t)
        points.append(interpolate(images, given.t.bfloat16(), 4, given.noise, dtype=torch.float16))
    return points


def of_patch(given):
    x, t, c = PROJECTS["MAR"].inputs
    with patched(given.model) as report:
        found = [str(report), given.model(x, t, c)]
    again = patch(given.model)
    unpatch(given.model)
    return [*found, str(again)]


def of_verify(given):
    report = verify(given.model, *PROJECTS["MAR"].inputs)
    return [report.ok, str([(c.mode, c.what, c.error, c.allowed) for c in report.comparisons])]


def of_residual(given):
    x, modulation = given.condition.clone().requires_grad_(), given.condition[:, :1]
    total, h = gated_residual_norm(x, modulation, x, modulation, modulation)
    total, h = residual_norm(total, h, modulation)
    total, h, distance = compared_residual_norm(total, h, modulation[0, 0], teacher=given.condition, skip_tokens=1)
    return [total, *with_gradients(h.square().sum() + distance, x)]


def of_few_steps(loss):
    def call(given):
        times = torch.stack([given.t, given.t.clamp(min=0.5)], -1)
        value = loss(
            given.stepping, given.condition, given.velocity.detach(), times, given.noise, cfg=2.0, chunk_rows=5
        )
        return with_gradients(value, *given.stepping.parameters())

    return call


CALLS = {
    "FlowHead": of_head,
    "LayerwiseDistillation": distilled,
    "attention": lambda given: [attention(*[given.condition.view(2, 6, 2, 12)] * 3)],
    "doctor": lambda given: [str(doctor())],
    "flow_matching_loss": of_loss,
    "fp8_linear": lambda given: [
        fp8_linear(given.noise, given.velocity.detach()[0].repeat(8, 1), given.noise[0, :, 0].repeat(8))
    ],
    "fused_flow_blocks": of_blocks,
    "compared_residual_norm": of_residual,
    "gated_residual_norm": of_residual,
    "residual_norm": of_residual,
    "interpolate": of_interpolate,
    "layerwise_distillation": distilled_at_once,
    "mean_flow_loss": of_few_steps(mean_flow_loss),
    "modulated_norm": lambda given: [modulated_norm(given.condition, *[given.condition[:, :1]] * 2)],
    "noise_seed": lambda given: [noise_seed(torch.Generator().manual_seed(4)), torch.manual_seed(4) and noise_seed()],
    "patch": of_patch,
    "patchify": lambda given: [patchify(given.pixels, 4), patchify(given.images, 4)],
    "self_distillation_loss": of_few_steps(self_distillation_loss),
    "seeded_noise": lambda given: [seeded_noise(5, columns, 3, 2) for columns in (8, 10)],
    "to_images": lambda given: [
        to_images(given.noise, 4, (8, 12), velocity=given.velocity, dt=0.5, dtype=dtype, **NORMALISED)
        for dtype in (None, torch.uint8)
    ],
    "unpatchify": lambda given: [unpatchify(given.noise, 4, (8, 12))],
    "velocity_loss": of_velocity,
    "verify": of_verify,
}
ALONG = {"PatchReport", "VerifyReport", "backend", "patched", "unpatch"}  # run by the calls, or compute nothing


def test_every_public_name_is_called():
    assert set(CALLS) | ALONG == set(uniflow_kernels.__all__)


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_whatever_the_defaults_are(name, same_bits, monkeypatch):
    monkeypatch.setattr(verification, "SECONDS", 0.0)
    monkeypatch.setattr(verification, "TURNS", 1)
    given = Inputs()
    with backend("auto"):
        same_bits(lambda: CALLS[name](given))
