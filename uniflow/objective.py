"""What UniFlow is trained on: flow matching on patches, and self-distillation of the encoder by a frozen copy."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uniflow.flow import sample_t
from uniflow.model import UniFlow
from uniflow_kernels import interpolate, layerwise_distillation, velocity_loss


@dataclass(frozen=True)
class Losses:
    """What one call of the objective gives; scalars and per-layer values are float32.

    `total` = flow_weight*flow + distill_weight*distill carries the gradient. `alpha` [L] is each layer's mean cosine
    distance to the teacher, `weights` [L] what it weighed; both are empty where there is no distillation.
    """

    total: Tensor
    flow: Tensor
    distill: Tensor
    alpha: Tensor
    weights: Tensor


class EncoderTeacher(nn.Module):
    """A frozen copy of a UniFlow's encoder; always in evaluation mode."""

    def __init__(self, model: UniFlow) -> None:
        super().__init__()
        self.embeddings = copy.deepcopy(model.embeddings)
        self.encoder = copy.deepcopy(model.encoder)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> EncoderTeacher:
        """Stay in evaluation mode, whatever the student does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, C, H, W] to the L+1 states [B, 1+N, D] of the encoder."""
        return self.encoder(self.embeddings(images.to(self.embeddings.position_embedding.dtype)))


class UniFlowObjective(nn.Module):
    """The training loss of UniFlow.

    Args:
        student: the model to train.
        teacher: a module that gives the L+1 hidden states of images, as `UniFlow.hidden_states` does; None takes a
            frozen copy of the student's encoder now (none is made if `distill_weight` is 0).
        beta: see `uniflow_kernels.layerwise_distillation`.
        flow_weight: of the flow matching loss.
        distill_weight: of the distillation loss; 0 leaves the teacher out.
        t_distribution: see `uniflow.flow.sample_t`.
        t_per: "token" draws a time for every patch, "image" one for all patches of an image.

    Raises:
        ValueError: for an unknown `t_per`.

    Source: the UniFlow paper; both losses weigh the same in its best run, and beta = 2 is its best. No LPIPS, no GAN.
    """

    def __init__(
        self,
        student: UniFlow,
        teacher: nn.Module | None = None,
        beta: float = 2.0,
        flow_weight: float = 1.0,
        distill_weight: float = 1.0,
        t_distribution: str = "fat_lognormal",
        t_per: str = "token",
    ) -> None:
        super().__init__()
        if t_per not in ("token", "image"):
            raise ValueError(f"t_per: expected 'token' or 'image', got {t_per!r}")
        sample_t((0,), t_distribution)  # an unknown distribution fails here, not in the first step
        self.student = student
        if teacher is None and distill_weight:
            teacher = EncoderTeacher(student)
        self.teacher = teacher
        self.beta = beta
        self.flow_weight = flow_weight
        self.distill_weight = distill_weight
        self.t_distribution = t_distribution
        self.t_per = t_per

    def forward(self, images: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> Losses:
        """The losses of a batch.

        Args:
            images: [B, C, H, W], normalised.
            t: [B] or [B, N] in [0, 1]; drawn from `t_distribution` if not given.
            noise: [B, N, C*P*P]; drawn if not given.

        Raises:
            ValueError: if a shape does not fit.
        """
        student = self.student
        patch = student.config.patch_size
        states = student.hidden_states(images)
        latents = student.latents(states[-1])
        condition = student.condition(latents, (images.shape[-2], images.shape[-1]))

        batch, tokens, _ = latents.shape
        if noise is None:
            noise = torch.randn(batch, tokens, images.shape[1] * patch * patch, device=images.device)
        if t is None:
            t = sample_t((batch, tokens) if self.t_per == "token" else (batch,), self.t_distribution, images.device)
        velocity = student.velocity(interpolate(images, t, patch, noise), t, condition)
        flow = velocity_loss(velocity, images, patch, noise)

        if self.teacher is None or not self.distill_weight:
            nothing = flow.new_zeros(0)
            return Losses(self.flow_weight * flow, flow.detach(), flow.new_zeros(()), nothing, nothing)
        with torch.no_grad():
            taught = self.teacher(images)
        # the embeddings are no layer, and the class token does not count
        distill, alpha, weights = layerwise_distillation(states[1:], taught[1:], self.beta, skip_tokens=1)
        total = self.flow_weight * flow + self.distill_weight * distill
        return Losses(total, flow.detach(), distill.detach(), alpha, weights)
