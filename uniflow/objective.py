"""What UniFlow is trained on: flow matching on patches, and self-distillation of the encoder by a frozen copy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uniflow.flow import sample_intervals, sample_t
from uniflow.flow_decoder import FLOW_LOSSES
from uniflow.model import UniFlow
from uniflow.normalization import normalize
from uniflow.teachers import EncoderTeacher
from uniflow_kernels import LayerwiseDistillation
from uniflow_kernels.ops.distillation import as_compared, check_layer_weights


@dataclass(frozen=True)
class Losses:
    """What one call of the objective gives; scalars and per-layer values are float32.

    `total` = flow_weight*flow + distill_weight*distill carries the gradient. `alpha` [L] is each layer's mean cosine
    distance to the teacher, `weights` [L] what it weighed; both are empty where there is no distillation, and zeros, as
    `distill` is, where the encoder is frozen.
    """

    total: Tensor
    flow: Tensor
    distill: Tensor
    alpha: Tensor
    weights: Tensor

    def measured(self) -> dict[str, Tensor]:
        """What the Trainer logs beside the total."""
        return {"flow": self.flow, "distill": self.distill, "alpha": self.alpha, "weights": self.weights}


class UniFlowObjective(nn.Module):
    """The training loss of UniFlow.

    Args:
        student: the model to train.
        teacher: an `EncoderTeacher` or what can stand in for it, which runs layer by layer beside the student; or any
            module that gives the L+1 hidden states of images in a list, as `UniFlow.hidden_states` does. None takes a
            frozen copy of the student's encoder now (none is made if `distill_weight` is 0).
        beta: see `uniflow_kernels.layerwise_distillation`.
        flow_weight: of the flow head's loss.
        distill_weight: of the distillation loss; 0 leaves the teacher out, and so does a frozen encoder, of whose
            distance it would give no gradient.
        t_distribution: see `uniflow.flow.sample_t`, and `sample_intervals` for a flow head of two times.
        t_per: "token" draws a time for every patch, "image" one for all patches of an image.
        layer_weights: "adaptive", or "uniform" for the mean over the layers, to compare with.
        chunk_tokens: how many tokens the flow head works on at a time, see `uniflow_kernels.flow_matching_loss`; None
            takes all, and keeps the head's activations for the backward pass.
        flow_loss: the flow head's: "flow_matching"; or, for a student whose config has `flow_times` 2, "mean_flow" or
            "self_distillation", see `uniflow_kernels.mean_flow_loss` and `self_distillation_loss`.
        share_equal: of those two, see `uniflow.flow.sample_intervals`.

    In training, noise is added to the latents of each picture if the student's config has `latent_noise`: its standard
    deviation is that of the channel in the batch, times a number drawn between 0 and `latent_noise`.

    Raises:
        ValueError: for an unknown `t_per`, `t_distribution`, `layer_weights` or `flow_loss`, a share that is none, or
            a loss that is not for the student's flow head.

    Source: the UniFlow paper; both losses weigh the same in its best run, and beta = 2 is its best. No LPIPS, no GAN.
    `latent_noise` is from RAE (Zheng et al. 2025, its code's noise_tau, in units of latents that are not standardised).
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
        layer_weights: str = "adaptive",
        chunk_tokens: int | Literal["auto"] | None = "auto",
        flow_loss: str = "flow_matching",
        share_equal: float = 0.75,
    ) -> None:
        super().__init__()
        if t_per not in ("token", "image"):
            raise ValueError(f"t_per: expected 'token' or 'image', got {t_per!r}")
        sample_intervals((0,), share_equal, t_distribution)  # what cannot be fails here, not in the first step
        if flow_loss not in FLOW_LOSSES:
            raise ValueError(f"flow_loss: expected one of {', '.join(FLOW_LOSSES)}, got {flow_loss!r}")
        times = student.config.flow_times
        if times != (1 if flow_loss == "flow_matching" else 2):
            raise ValueError(
                f"flow_loss: {flow_loss} is not for a flow head whose config has flow_times {times}; "
                "UniFlow.for_intervals() makes one of two times"
            )
        self.student = student
        if teacher is None and distill_weight:
            teacher = EncoderTeacher.copy_of(student)
        self.teacher = teacher
        self.beta = beta
        self.flow_weight = flow_weight
        self.distill_weight = distill_weight
        self.t_distribution = t_distribution
        self.t_per = t_per
        self.layer_weights = check_layer_weights(layer_weights)
        self.chunk_tokens = chunk_tokens
        self.flow_loss = flow_loss
        self.share_equal = share_equal

    def lower_frozen(self, dtype: torch.dtype) -> None:
        """Let the teacher run in a lower precision than float32, if it is an `EncoderTeacher` in that.

        The teacher that was given stays as it is: see `EncoderTeacher.lowered`.
        """
        if isinstance(self.teacher, EncoderTeacher) and self.teacher.dtype == torch.float32:
            self.teacher = self.teacher.lowered(dtype)

    def lower_teacher(self, precision: str) -> None:
        """Have the products of the teacher's layers in a lower precision, "fp8"; the one that was given stays as it is.

        Raises:
            ValueError: for another precision, or without an `EncoderTeacher`.
        """
        if not isinstance(self.teacher, EncoderTeacher):
            found = "none" if self.teacher is None else f"a {type(self.teacher).__name__}"
            raise ValueError(f"teacher_precision: expected an EncoderTeacher to teach, got {found}")
        self.teacher = self.teacher.lowered(precision=precision)

    @property
    def image_size(self) -> int:
        """Side of the images that the student is trained at, in pixels."""
        return self.student.config.image_size

    def check_image_size(self, image_size: int) -> None:
        """Raise an error unless `resize` can serve."""
        self.student.check_image_size(image_size)
        if isinstance(self.teacher, EncoderTeacher):
            self.teacher.embeddings_at(image_size)

    def resize(self, image_size: int, averages: dict[str, Tensor] | None = None) -> None:
        """Change the size that is trained at, see `UniFlow.resize`; that of an `EncoderTeacher` too.

        A teacher's positions come from those of the size that it was trained at, whatever sizes were before.
        """
        self.student.resize(image_size, averages)
        if isinstance(self.teacher, EncoderTeacher):
            self.teacher.resize(image_size)

    def forward(self, images: Tensor, t: Tensor | None = None, noise: Tensor | None = None) -> Losses:
        """The losses of a batch.

        Args:
            images: [B, C, H, W], normalised, or uint8 [B, 3, H, W], which `normalize` is applied to here.
            t: [B] or [B, N] in [0, 1]; [B, 2] or [B, N, 2] for a flow head of two times, begin and end. Drawn from
                `t_distribution` if not given.
            noise: [B, N, C*P*P]; drawn if not given.

        Raises:
            ValueError: if a shape does not fit, or the teacher has another number of layers than the student.
        """
        student = self.student
        if images.dtype == torch.uint8:
            images = normalize(images)
        # one read of the images for student, teacher and flow, where all are made of patches
        patches = student.patches(images)
        latents, distillation = self._encode(images, patches)
        latents = self._noisy(latents)
        condition = student.condition(latents, (images.shape[-2], images.shape[-1]))

        batch, tokens, _ = latents.shape
        if noise is None:
            noise = torch.randn(batch, tokens, student.config.patch_values, dtype=torch.float32, device=images.device)
        if t is None:
            t = self._times((batch, tokens) if self.t_per == "token" else (batch,), images.device)
        flow = student.flow_head.loss(
            condition, images, t, student.config.patch_size, noise, self.chunk_tokens, self.flow_loss, patches
        )

        if distillation is None:
            nothing = flow.new_zeros(student.config.num_hidden_layers if self._has_a_teacher else 0)
            return Losses(self.flow_weight * flow, flow.detach(), flow.new_zeros(()), nothing, nothing)
        distill, alpha, weights = distillation.result()
        total = self.flow_weight * flow + self.distill_weight * distill
        return Losses(total, flow.detach(), distill.detach(), alpha, weights)

    def _noisy(self, latents: Tensor) -> Tensor:
        """Latents [B, N, latent_ch] as a generator may make them: with the noise that the config asks for in training.

        It is in units of each channel's deviation in the batch, so that latents cannot outgrow it.
        """
        most = self.student.config.latent_noise
        if not (self.training and most):
            return latents
        deviation = latents.detach().float().std((0, 1), correction=0)
        amount = most * torch.rand(len(latents), 1, 1, device=latents.device)
        noise = torch.randn(latents.shape, dtype=torch.float32, device=latents.device)
        return latents + (amount * deviation * noise).to(latents.dtype)

    def _times(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        if self.flow_loss == "flow_matching":
            return sample_t(shape, self.t_distribution, device)
        return sample_intervals(shape, self.share_equal, self.t_distribution, device)

    def _encode(self, images: Tensor, patches: Tensor | None) -> tuple[Tensor, LayerwiseDistillation | None]:
        """The student's latents, and what its layers and the teacher's were compared in."""
        student = self.student
        if not self._has_a_teacher or self._learns_nothing():
            return student.encode(images, patches), None
        own = student.prefix_tokens
        its = getattr(self.teacher, "prefix_tokens", own)
        shared = min(own, its)  # prefix tokens do not count, but views from the front cost a copy of the gradient
        layers = student.config.num_hidden_layers
        distillation = LayerwiseDistillation(layers, self.beta, skip_tokens=shared, layer_weights=self.layer_weights)
        taught = self._taught(images, patches)
        features = self._features(taught, layers)
        if own == its:
            states = student.compared_states(images, patches, features, shared)
        else:
            states = ((state, None) for state in student.layer_states(images, patches))
        for layer, (state, distance) in enumerate(states, start=1):
            if distance is not None:
                distillation.put(layer, distance)
                continue
            feature = as_compared(next(features), state)
            distillation.push(layer, state[:, own - shared :], feature[:, its - shared :])
        if next(taught, None) is not None:
            raise ValueError(f"teacher: gives more layers than the student's {layers}")
        return student.latents(state), distillation

    def _features(self, taught: Iterator[Tensor], layers: int) -> Iterator[Tensor]:
        """What a teacher's layers give, of which there must be so many; none is held here while others are computed."""
        for layer in range(layers):
            with torch.no_grad():
                feature = next(taught, None)
            if feature is None:
                raise ValueError(f"teacher: gives {layer} layers, expected the student's {layers}")
            yield feature

    @property
    def _has_a_teacher(self) -> bool:
        return self.teacher is not None and self.distill_weight != 0

    def _learns_nothing(self) -> bool:
        """Whether a step is made of which the teacher changes nothing, since the encoder is frozen."""
        student = self.student
        return torch.is_grad_enabled() and not any(
            parameter.requires_grad for part in (student.embeddings, student.encoder) for parameter in part.parameters()
        )

    def _taught(self, images: Tensor, patches: Tensor | None) -> Iterator[Tensor]:
        """The outputs of the teacher's layers; where it can, each is computed when it is asked for."""
        teacher: Any = self.teacher
        with torch.no_grad():
            if isinstance(teacher, EncoderTeacher):
                return teacher.states(images, patches)
            # in a list of all states the embeddings are no layer
            return teacher.states(images) if hasattr(teacher, "states") else iter(teacher(images)[1:])
