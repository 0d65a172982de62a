"""What UniFluid is trained on: the next token of answers, and flow matching (or diffusion) of image tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniflow.diffusion import Diffusion, noise_loss
from uniflow.flow import sample_intervals, sample_t
from uniflow.normalization import normalize
from uniflow.unifluid.features import VisionFeatures
from uniflow.unifluid.model import UniFluid
from uniflow.unifluid.orders import draw_groups, draw_orders
from uniflow.unifluid.texts import no_text
from uniflow.unifluid.tokens import image_tokens
from uniflow_kernels import interpolate, mean_flow_loss, self_distillation_loss, velocity_loss

if TYPE_CHECKING:
    from uniflow.unifluid.captions import Drawings, Readings
    from uniflow.unifluid.tokens import ImageTokenizer


@dataclass(frozen=True)
class UniFluidLosses:
    """What one call of the objective gives; scalars in float32.

    `total` = text + image_weight * image carries the gradient. `text` is the mean cross-entropy of the answers' ids,
    `image` the mean loss of the head over image tokens; 0 where the batch has none.
    """

    total: Tensor
    text: Tensor
    image: Tensor
    image_weight: Tensor

    def measured(self) -> dict[str, Tensor]:
        """What a log shows."""
        return {"text": self.text, "image": self.image, "image_weight": self.image_weight}


class UniFluidObjective(nn.Module):
    """The training loss of UniFluid.

    Args:
        student: the model to train, with the image tokenizer's statistics (see `UniFluid.set_statistics`).
        tokenizer: makes the image tokens; frozen.
        vision: makes the features of pictures that are read; frozen. None for a model that only draws, or that has an
            encoder of its own.
        image_weight: lambda, what the loss of the image tokens is multiplied by.
        head_repeats: k, how many times and noises the head is trained on for each token.
        t_distribution: of the times, but for a "ddpm" head, see `uniflow.flow.sample_t` and `sample_intervals`.
        guidance: the scale of guidance that a head of two times learns, so that drawing needs none; see
            `uniflow_kernels.mean_flow_loss`. A second pass of the transformer, without gradients, gives what it leads
            away from.
        share_equal: of such a head's times, see `sample_intervals`.

    Raises:
        ValueError: for guidance of a head that cannot learn it; if tokenizer or vision do not fit the student, or are
            others than it was trained with.

    Source: the UniFluid paper; repeats and the "ddpm" head as in MAR.
    """

    def __init__(
        self,
        student: UniFluid,
        tokenizer: ImageTokenizer,
        vision: VisionFeatures | None = None,
        image_weight: float = 1.0,
        head_repeats: int = 4,
        t_distribution: str = "lognormal",
        guidance: float = 1.0,
        share_equal: float = 0.75,
    ) -> None:
        super().__init__()
        if guidance != 1.0 and student.head.times != 2:
            raise ValueError(
                f"guidance: expected 1 for a head that is no mean_flow or self_distillation, got {guidance}"
            )
        if head_repeats < 1:
            raise ValueError(f"head_repeats: expected at least 1, got {head_repeats}")
        sample_intervals((0,), share_equal, t_distribution)  # what cannot be fails here, not in the first step
        check_tokenizer(student, tokenizer)
        if vision is not None:
            check_vision(student, vision)
        if student.vision is not None and not {*student.vision.parameters()}.isdisjoint(tokenizer.parameters()):
            raise ValueError("vision: the student's encoder is a part of the tokenizer too, which stays as it is")
        self.student = student
        self.tokenizer = tokenizer
        self.frozen_vision = vision
        self.head_repeats = head_repeats
        self.t_distribution = t_distribution
        self.guidance = guidance
        self.share_equal = share_equal
        self.image_weight: Tensor
        self.register_buffer(
            "image_weight",
            torch.tensor(float(image_weight), dtype=torch.float32, device=student.device),
            persistent=False,
        )

    def forward(self, drawings: Drawings, readings: Readings) -> UniFluidLosses:
        """The losses of a batch; either part may have no rows.

        Raises:
            ValueError: if a text is too long, or there are readings without `vision`.
        """
        image, text = self._draw(drawings), self._read(readings)
        return UniFluidLosses(text + self.image_weight * image, text.detach(), image.detach(), self.image_weight)

    def _draw(self, drawings: Drawings) -> Tensor:
        images, ids, real, sources, seen = drawings
        student = self.student
        if not len(images):
            return self.image_weight.new_zeros(())
        tokenizer = self.tokenizer_for(images)
        tokens = student.normalized(image_tokens(tokenizer, images))
        batch, count, _ = tokens.shape
        order = draw_orders(batch, count, student.config.order, tokens.device)
        groups = draw_groups(batch, count, tokens.device)
        features, clean = self.looked_at(sources, seen)
        states = student.draw_states(tokens, ids, real, order, groups, features, clean, tokenizer.grid)
        ordered = tokens.gather(1, order.unsqueeze(-1).expand_as(tokens))
        if student.head.times == 1:
            return self._loss_at_times(states, ordered)
        if self.guidance == 1.0:
            return self._loss_of_intervals(states, ordered)
        alone = no_text(student.text_tokenizer, batch, ids.device)
        with torch.no_grad():
            everything = torch.ones_like(alone, dtype=torch.bool)
            null = student.draw_states(tokens, alone, everything, order, groups, grid=tokenizer.grid)
        given = (real.sum(1) > alone.shape[1]).unsqueeze(1).expand(batch, count)  # a caption, or sources
        return self._loss_of_intervals(states, ordered, torch.where(given, self.guidance, 1.0), null)

    def tokenizer_for(self, pictures: Tensor) -> ImageTokenizer:
        """The tokenizer at the size of pictures, uint8 [B, 3, H, W]; a student of one size has one alone."""
        if self.student.config.grids is None:
            return self.tokenizer
        return self.tokenizer.at_size((pictures.shape[-2], pictures.shape[-1]))

    def looked_at(self, sources: Tensor | None, seen: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Features and clean tokens of the pictures that are drawn from, as far as the student sees them.

        Of a batch without such pictures they are those of none, through which all parameters have a gradient: processes
        that exchange gradients must have them of the same parameters.
        """
        config = self.student.config
        features = clean = None
        if seen is not None and config.sources in ("features", "both"):
            if self.vision is not None:
                features = self.vision(normalize(seen))
            elif len(seen):
                raise ValueError("drawings: the objective was made without vision, expected no sources")
        if sources is not None and config.sources in ("tokens", "both"):
            if len(sources):
                clean = self.student.normalized(image_tokens(self.tokenizer_for(sources), sources))
            else:
                clean = self.student.token_mean.new_empty(0, 1, config.token_channels)
        return features, clean

    @property
    def vision(self) -> VisionFeatures | None:
        """What sees the pictures: the student's own encoder, or the frozen one."""
        return self.frozen_vision if self.student.vision is None else self.student.vision

    def _loss_of_intervals(
        self, condition: Tensor, tokens: Tensor, cfg: float | Tensor = 1.0, null: Tensor | None = None
    ) -> Tensor:
        """Of a head of two times; condition and null condition [B, N, D], tokens [B, N, C], the scales [B, N]."""

        def repeated(given: Tensor) -> Tensor:
            return given.expand(self.head_repeats, *given.shape).flatten(0, 1)

        student, data = self.student, repeated(tokens.float())
        times = sample_intervals(data.shape[:2], self.share_equal, self.t_distribution, tokens.device)
        loss = mean_flow_loss if student.config.head == "mean_flow" else self_distillation_loss
        return loss(
            student.head,
            repeated(condition),
            data,
            times,
            torch.randn_like(data),
            cfg=repeated(cfg) if isinstance(cfg, Tensor) else cfg,
            null_condition=None if null is None else repeated(null),
            time_scale=student.time_scale,
        )

    def _loss_at_times(self, condition: Tensor, tokens: Tensor) -> Tensor:
        """Of condition [B, N, D] and tokens [B, N, C]; the repeats share the embedded condition."""
        head, k = self.student.head, self.head_repeats
        batch, count, channels = tokens.shape
        embedded = head.cond_embed(condition)
        if self.student.config.head == "ddpm":
            return noise_loss(head, embedded, tokens.expand(k, -1, -1, -1), Diffusion())
        # to the operations a token is a picture's patch of one pixel
        pixels = tokens.transpose(1, 2).unsqueeze(2)
        noise = torch.randn(k * batch, count, channels, dtype=torch.float32, device=tokens.device)
        t = sample_t((k * batch, count), self.t_distribution, tokens.device)
        x_t = interpolate(pixels, t, 1, noise, repeats=k, dtype=embedded.dtype)
        y = head.time_embed(self.student.time_scale * t).unflatten(0, (k, batch)) + embedded
        velocity = head.from_embedding(x_t.unflatten(0, (k, batch)), y).flatten(0, 1)
        return velocity_loss(velocity, pixels, 1, noise, repeats=k)

    def _read(self, readings: Readings) -> Tensor:
        images, ids, real, answer = readings
        if not len(ids):
            return self.image_weight.new_zeros(())
        if self.vision is None:
            raise ValueError("readings: the objective was made without vision, expected no readings")
        last = answer.shape[1]
        logits = self.student.answer_logits(self.vision(normalize(images)), ids, real, last)
        expected = ids[:, -last:].where(answer, -100)
        return F.cross_entropy(logits.flatten(0, 1).float(), expected.flatten())


def check_tokenizer(student: UniFluid, tokenizer: ImageTokenizer) -> None:
    """Raise a ValueError unless the image tokenizer is the one that the student is made for."""
    config = student.config
    if (tokenizer.channels, tuple(tokenizer.grid)) != (config.token_channels, config.grid):
        raise ValueError(
            f"tokenizer: gives {tokenizer.grid[0]}x{tokenizer.grid[1]} tokens of {tokenizer.channels} channels, "
            f"expected {config.grid[0]}x{config.grid[1]} of {config.token_channels}"
        )
    if config.tokenizer is not None and tokenizer.fingerprint() != config.tokenizer:
        raise ValueError("tokenizer: has other weights than the one that the model was trained with")


def read_vision(folder: str | Path | None, student: UniFluid) -> VisionFeatures:
    """The encoder that the student sees by: its own, or that in a folder, on its device.

    Raises:
        ValueError: for a folder beside an encoder of its own, which was trained with it; for none without one; if that
            in the folder is not the one that the student is made for.
    """
    _check_reads(student)
    if student.vision is not None:
        if folder is not None:
            raise ValueError("vision: the model has its encoder in its checkpoint, trained with it; expected no folder")
        return student.vision
    if folder is None:
        raise ValueError("vision: expected the folder of the encoder that the model was trained with")
    vision = VisionFeatures(folder, merge=student.config.vision_merge).to(student.device)
    check_vision(student, vision)
    return vision


def check_vision(student: UniFluid, vision: VisionFeatures) -> None:
    """Raise a ValueError unless the features are those that the student is made for."""
    _check_reads(student)
    config = student.config
    if student.vision is not None:
        raise ValueError("vision: the model has an encoder of its own, expected none beside it")
    if vision.merge != config.vision_merge:
        raise ValueError(f"vision: merges {vision.merge} patches a side, expected {config.vision_merge}")
    if vision.width != config.vision_channels:
        raise ValueError(f"vision: gives features of {vision.width} channels, expected {config.vision_channels}")
    if config.vision is not None and vision.fingerprint() != config.vision:
        raise ValueError("vision: has other weights than what the model was trained with")


def _check_reads(student: UniFluid) -> None:
    if student.config.vision_channels is None:
        raise ValueError("vision: the model was made without vision_channels, it reads no pictures")
