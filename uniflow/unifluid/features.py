"""What a picture looks like to UniFluid when it reads: the tokens of a vision encoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from uniflow.checkpoint import as_dtype
from uniflow.config import LARGEST_WIDTH, UniFlowConfig
from uniflow.encoder import Encoder, embedded
from uniflow.latents import hash_weights
from uniflow.model import UniFlow
from uniflow.pretrained import encoder_fields, new_encoder, pretrained_encoder


class VisionFeatures(nn.Module):
    """The output of an encoder's last layer for the patches; frozen, and always in evaluation mode.

    Class and register tokens are left out: not every encoder has them, and UniFlow's training, which distils the
    patches only, leaves its own free. A norm that the encoder may have behind its last layer is not applied. A
    UniFluid may have it for a part of its own, see `unfreeze`.

    Args:
        source: a UniFlow; or what `uniflow.pretrained.pretrained_encoder` takes, a checkpoint folder (of a UniFlow, an
            InternViT, or one for transformers' AutoModel) or a vision model of the transformers package. A module is
            frozen and brought to `dtype`, not copied.
        mean, std: what the encoder's images are normalised with, as there.
        dtype: to compute in, also within autocast; the parameters' own if not given.
        merge: of how many patches a side, which lie next to each other, one feature is made: `merge`^2 times as wide,
            and as many fewer of them. Source: the pixel shuffle of InternVL.

    Raises:
        As `pretrained_encoder`; ValueError if the patches of a side are no multiple of `merge`.
    """

    def __init__(
        self,
        source: str | Path | nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: torch.dtype | str | None = None,
        merge: int = 1,
    ) -> None:
        super().__init__()
        self.embeddings: Any
        if isinstance(source, UniFlow):
            self.embeddings, self.encoder = source.embeddings, source.encoder
            self._fields = encoder_fields(source.config)
        else:
            self.embeddings, self.encoder, self._fields = pretrained_encoder(source, mean, std)
        self._start(merge)
        self.to(as_dtype(dtype))

    @classmethod
    def described(
        cls, fields: dict[str, Any], merge: int = 1, state: Mapping[str, Tensor] | None = None
    ) -> VisionFeatures:
        """Features by an encoder as `fields` describe it, on the CPU; what is in its parameters is yet to be given.

        Args:
            fields: those that another one has.
            merge: as of the class.
            state: the tensors that it shall hold, by its names: if given, an encoder that is much larger is refused
                before it is made.

        Raises:
            ImportError, CheckpointError: as of `uniflow.pretrained.new_encoder`.
            ValueError: if they describe no encoder.
        """
        features = cls.__new__(cls)
        nn.Module.__init__(features)
        try:
            config = UniFlowConfig(**fields, flow_width=LARGEST_WIDTH)  # of a flow head, which is not made
        except TypeError as error:
            raise ValueError(f"vision_encoder: {error}") from None
        features.embeddings, features.encoder, features._fields = new_encoder(config, state)
        features._start(merge)
        return features

    def _start(self, merge: int) -> None:
        side, patch = self._fields["image_size"], self._fields["patch_size"]
        if merge < 1 or side // patch % merge:
            raise ValueError(f"merge: expected a divisor of the {side // patch} patches of a side, got {merge}")
        self.merge = merge
        self.width = self._fields["vit_hidden_size"] * merge**2
        self.image_size = (side, side)
        self.tokens = (side // patch // merge) ** 2
        self.frozen = True
        self.requires_grad_(False).eval()

    @property
    def fields(self) -> dict[str, Any]:
        """What `described` makes such an encoder of: fields of a `UniFlowConfig`.

        Raises:
            ValueError: if its configuration alone would make another one.
        """
        if not isinstance(self.encoder, Encoder) and self._fields["encoder"] is None:
            raise ValueError(
                "vision: expected an encoder that is made again from its configuration alone, to be trained; keep this "
                "one frozen"
            )
        return self._fields

    def unfreeze(self) -> VisionFeatures:
        """Be a part of a model that is trained: it then computes under autocast, as the model does.

        Features have a gradient where the parameters have one. It stays in evaluation mode: nothing is dropped.
        """
        self.frozen = False
        return self.requires_grad_()

    def train(self, mode: bool = True) -> VisionFeatures:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images to features.

        Args:
            images: [B, 3, H, W] of `image_size`, normalised as by `uniflow.normalize`.

        Returns:
            [B, M, D], one row of `width` D a patch, or square of patches, in raster order, float32; without a gradient
            if it is frozen.

        Raises:
            ValueError: for images of another shape.
        """
        if tuple(images.shape[1:]) != (3, *self.image_size):
            raise ValueError(f"images: expected shape {['B', 3, *self.image_size]}, got {list(images.shape)}")
        if not len(images):  # layers of the transformers package need some, and what is trained needs a gradient
            if self.frozen:
                return images.new_empty(0, self.tokens, self.width, dtype=torch.float32)
            return self(images.new_zeros(1, *images.shape[1:]))[:0]
        parameter = next(self.parameters())
        own = torch.autocast(images.device.type, enabled=False) if self.frozen else nullcontext()
        with own, torch.set_grad_enabled(torch.is_grad_enabled() and parameter.requires_grad):
            tokens = self.encoder.last(*embedded(self.embeddings, images.to(parameter.dtype)))
            patches = tokens[:, self.embeddings.prefix_tokens :].float()
            side = math.isqrt(self.tokens)
            form = {"h": side, "w": side, "a": self.merge, "b": self.merge}
            return rearrange(patches, "n (h a w b) d -> n (h w) (a b d)", **form)

    def fingerprint(self) -> str:
        """A hash of the encoder's weights."""
        return hash_weights(self.embeddings, self.encoder)
