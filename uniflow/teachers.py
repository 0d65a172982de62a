"""What teaches the student: a frozen encoder, run layer by layer beside it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from uniflow.checkpoint import as_dtype
from uniflow.encoder import LayerStack, embedded
from uniflow.model import UniFlow
from uniflow.pretrained import pretrained_encoder
from uniflow.resizing import AnyEmbeddings, resize_embeddings
from uniflow.transformer import TransformerLayer
from uniflow_kernels.modules.fp8_linear import lower
from uniflow_kernels.ops.fp8_linear import check_precision
from uniflow_kernels.torch_private import has_autocast


class EncoderTeacher(nn.Module):
    """A frozen encoder; always in evaluation mode, and in its own precision under autocast if it has a lower one.

    Any module with a `states(images)` that yields the outputs of layers 1..L, [B, prefix_tokens + N, D], and with
    `prefix_tokens` can stand in for it.

    Args:
        embeddings: images [B, C, H, W] to tokens [B, prefix_tokens + N, D], as `uniflow.encoder.Embeddings`.
        encoder: its layers. Neither is copied.
        dtype: to run in; the parameters' own if not given.
    """

    def __init__(self, embeddings: nn.Module, encoder: LayerStack, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = encoder
        self.requires_grad_(False).eval().to(dtype)
        self._trained = (embeddings,)  # at the size they were trained at; in a tuple they are no part of this module

    @classmethod
    def copy_of(cls, model: UniFlow, dtype: torch.dtype | None = None) -> EncoderTeacher:
        """The encoder of a UniFlow as it is now; for `dtype` see `lowered`."""
        made = cls(copy.deepcopy(model.embeddings), copy.deepcopy(model.encoder))
        return made if dtype is None else made._lower(dtype, None)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: torch.dtype | str | None = None,
        weights: str | None = None,
        precision: str | None = None,
    ) -> EncoderTeacher:
        """Arguments and errors of `uniflow.pretrained.pretrained_encoder`; a module that is given is frozen.

        For `precision` see `lowered`, of whose copy the module that is given is no part.
        """
        chosen = as_dtype(dtype)
        pretrained = pretrained_encoder(source, mean, std, weights)
        made = cls(pretrained.embeddings, pretrained.encoder, chosen)
        return made if precision is None else made.lowered(precision=precision)

    def lowered(self, dtype: torch.dtype | None = None, precision: str | None = None) -> EncoderTeacher:
        """A copy in another dtype, its weights cast once, LayerScale folded into the projections before it.

        Args:
            dtype: of the copy; this one's own if not given.
            precision: "fp8" for products of its layers in 8-bit floats, see docs/fp8.md.

        Raises:
            ValueError: for a precision that is unknown, or that the device does not have.
        """
        check_precision(precision, next(self.parameters()).device)
        made = copy.deepcopy(self)._lower(dtype, precision)
        made._trained = self._trained  # positions are resized before they are cast
        return made

    def _lower(self, dtype: torch.dtype | None, precision: str | None) -> EncoderTeacher:
        for layer in self.encoder.layers:
            if isinstance(layer, TransformerLayer):
                layer.fold_layer_scale()
        if precision is not None:
            lower(self.encoder)
        return self.to(dtype)

    def resize(self, image_size: int) -> None:
        """Bring the positions to another size, see `embeddings_at`."""
        self.embeddings = self.embeddings_at(image_size)

    @torch.no_grad()
    def embeddings_at(self, image_size: int) -> nn.Module:
        """The embeddings for another size, their positions interpolated from those of the size they were trained at.

        Embeddings of one's own stay as they are.

        Args:
            image_size: side of the images, in pixels.

        Raises:
            ValueError: if those of the transformers package cannot be made for that size.
        """
        trained = self._trained[0]
        if not isinstance(trained, AnyEmbeddings):
            return self.embeddings
        made = copy.deepcopy(trained)
        resize_embeddings(made, image_size)
        return made.requires_grad_(False).eval().to(self.device, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.encoder.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next(self.encoder.parameters()).device

    @property
    def prefix_tokens(self) -> int:
        """How many tokens come before those of the patches."""
        return self.embeddings.prefix_tokens  # type: ignore[return-value]

    def train(self, mode: bool = True) -> EncoderTeacher:
        """Stay in evaluation mode, whatever the student does."""
        return super().train(False)

    def states(self, images: Tensor, patches: Tensor | None = None) -> Iterator[Tensor]:
        """Images [B, C, H, W] to the outputs of layers 1..L, each computed when it is asked for, without a gradient.

        `patches` are theirs, [B, N, C*P*P], if a student of the same P has made them.
        """
        with self._own_precision(images):
            states = self.encoder.states(*self._embed(images, patches))
        for _ in self.encoder.layers:
            with self._own_precision(images):
                state = next(states)
            yield state

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, C, H, W] to the L+1 states [B, prefix_tokens + N, D] of the encoder."""
        with self._own_precision(images):
            return self.encoder(*self._embed(images))

    @torch.no_grad()
    def last(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to the output of the last layer."""
        with self._own_precision(images):
            return self.encoder.last(*self._embed(images))

    def _embed(self, images: Tensor, patches: Tensor | None = None) -> tuple[Tensor, ...]:
        return embedded(self.embeddings, images.to(self.dtype), patches)

    def _own_precision(self, images: Tensor) -> AbstractContextManager[object]:
        """No autocast for what is in a lower precision already: it would make norms in float32 and cast them back."""
        kind = images.device.type
        if self.dtype == torch.float32 or not has_autocast(kind):
            return nullcontext()
        return torch.autocast(kind, enabled=False)
