"""What a generator is trained on: flow matching of standardised latents, under their classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uniflow.flow import sample_t
from uniflow.generation.model import FlowTransformer
from uniflow_kernels import interpolate, velocity_loss


@dataclass(frozen=True)
class FlowLoss:
    """What one call of the objective gives: the mean squared error of the velocity, a scalar in float32."""

    total: Tensor

    def measured(self) -> dict[str, Tensor]:
        """Nothing else."""
        return {}


class FlowTransformerObjective(nn.Module):
    """The training loss of a generator.

    Args:
        student: with the latents' statistics, see `FlowTransformer.set_statistics`.
        label_dropout: how likely a picture's label is left out, so that guidance knows what there is without.
        t_distribution: of the times, one a picture, see `uniflow.flow.sample_t`; they are then moved as the student's
            `noise_shift` says.

    Raises:
        ValueError: for an unknown distribution, or a dropout that is no probability.

    Source: SiT (Ma et al. 2024), the linear path and the velocity; label dropout of Ho and Salimans 2022.
    """

    def __init__(self, student: FlowTransformer, label_dropout: float = 0.1, t_distribution: str = "lognormal") -> None:
        super().__init__()
        sample_t((0,), t_distribution)  # what cannot be fails here, not in the first step
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout: expected a probability, got {label_dropout}")
        self.student = student
        self.label_dropout = label_dropout
        self.t_distribution = t_distribution

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> FlowLoss:
        """The loss of a batch.

        Args:
            latents: [B, N, C], as the tokenizer makes them.
            labels: int64 [B]; none for a student without classes.
        """
        student = self.student
        if labels is not None and student.config.classes is not None:
            dropped = torch.rand(labels.shape, dtype=torch.float32, device=labels.device) < self.label_dropout
            labels = labels.masked_fill(dropped, student.config.classes)
        # to the operations a token is a picture's patch of one pixel
        pixels = student.standardised(latents).transpose(1, 2).unsqueeze(2)
        noise = torch.randn(latents.shape, dtype=torch.float32, device=latents.device)
        t = shifted(sample_t(latents.shape[:1], self.t_distribution, latents.device), student.config.noise_shift)
        velocity = student(interpolate(pixels, t, 1, noise), t, labels)
        return FlowLoss(velocity_loss(velocity, pixels, 1, noise))


def shifted(t: Tensor, shift: float) -> Tensor:
    """Times whose noise levels s = 1 - t become a*s / (1 + (a-1)*s); see `shift_of`."""
    return t / (shift - (shift - 1) * t)
