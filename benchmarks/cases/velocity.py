"""Flow matching on patches: the noisy input, and the loss of the predicted velocity."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.case import Case, Problem, Work, at
from uniflow_kernels import interpolate, seeded_noise, velocity_loss

PATCH = 14
SEED = 1


def _images_and_noise(batch: int, image: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, image, image), torch.randn(batch, (image // PATCH) ** 2, 3 * PATCH * PATCH)


def build_interpolate(batch: int, image: int) -> Problem:
    images, noise = _images_and_noise(batch, image)
    t = torch.rand(noise.shape[:2])
    return Problem(
        inputs=(images, t, PATCH, noise),
        ours=interpolate,
        plain=reference.interpolate,
        tokens=t.numel(),
        forward=Work.of(3 * noise.numel(), images, t, noise, noise),
    )


def build_loss(batch: int, image: int, dtype: str) -> Problem:
    images, noise = _images_and_noise(batch, image)
    velocity = torch.randn(noise.shape, dtype=getattr(torch, dtype)).requires_grad_()
    return Problem(
        inputs=(velocity, images, PATCH, noise),
        ours=velocity_loss,
        plain=reference.velocity_loss,
        tokens=noise.shape[0] * noise.shape[1],
        forward=Work.of(4 * noise.numel(), velocity, images, noise),
        # the difference could be kept by the forward pass as the gradient: then only scaled, so one read and one write
        backward=Work.of(noise.numel(), velocity, velocity),
    )


def build_seeded_loss(batch: int, image: int, dtype: str) -> Problem:
    """Ours makes the noise again; the plain form is given it, so what storing it costs is not counted.

    Who has no noise draws it: the form of that name draws as many numbers, and is given these all the same.
    """
    images, _ = _images_and_noise(batch, image)
    shape = (batch, (image // PATCH) ** 2, 3 * PATCH * PATCH)
    noise = seeded_noise(shape[0] * shape[1], shape[2], SEED, device=images.device).view(shape)
    velocity = torch.randn(shape, dtype=getattr(torch, dtype)).requires_grad_()
    return Problem(
        inputs=(velocity, images, PATCH, noise),
        ours=lambda velocity, images, patch, noise: velocity_loss(velocity, images, patch, seed=SEED),
        plain=reference.velocity_loss,
        libraries={"plain, drawing": lambda: drawing},
        tokens=shape[0] * shape[1],
        forward=Work.of(4 * noise.numel(), velocity, images),
        backward=Work.of(noise.numel(), velocity, velocity),
    )


def drawing(velocity: Tensor, images: Tensor, patch: int, noise: Tensor) -> Tensor:
    torch.randn(noise.shape, device=noise.device)
    return reference.velocity_loss(velocity, images, patch, noise)


CASES = (
    Case(
        "interpolate",
        "How fast is x_t made from images, noise and a time for every token?",
        build_interpolate,
        cuda=(
            at(batch=8, image=448),
            at(batch=32, image=448, quick=True, compile=True),
            at(batch=128, image=448),
        ),
        cpu=(at(batch=1, image=224, quick=True), at(batch=4, image=224, quick=True, compile=True)),
    ),
    Case(
        "velocity_loss",
        "How fast is the flow matching loss and its gradient?",
        build_loss,
        cuda=(
            at(batch=8, image=448, dtype="bfloat16"),
            at(batch=32, image=448, dtype="bfloat16", quick=True, compile=True),
            at(batch=128, image=448, dtype="bfloat16"),
        ),
        cpu=(
            at(batch=1, image=224, dtype="float32", quick=True),
            at(batch=4, image=224, dtype="float32", quick=True, compile=True),
        ),
        check_at_most={"batch": 32},
    ),
    Case(
        "velocity_loss_seeded",
        "And with noise that is not stored but made again from its seed?",
        build_seeded_loss,
        cuda=(at(batch=32, image=448, dtype="bfloat16", quick=True, compile=True),),
        cpu=(
            at(batch=1, image=224, dtype="float32", quick=True),
            at(batch=4, image=224, dtype="float32", quick=True, compile=True),
        ),
        check_at_most={"batch": 4},
    ),
)
