"""What a picture looks like to UniFluid when it reads: the tokens of a frozen vision encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from uniflow.checkpoint import as_dtype
from uniflow.latents import hash_weights
from uniflow.model import UniFlow
from uniflow.pretrained import pretrained_encoder
from uniflow.teachers import EncoderTeacher


class VisionFeatures(nn.Module):
    """The output of an encoder's last layer for the patches; frozen, and always in evaluation mode.

    Class and register tokens are left out: not every encoder has them, and UniFlow's training, which distils the
    patches only, leaves its own free. A norm that the encoder may have behind its last layer is not applied.

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
        if isinstance(source, UniFlow):
            embeddings, layers = source.embeddings, source.encoder
            side, width, patch = source.config.image_size, source.config.vit_hidden_size, source.config.patch_size
        else:
            embeddings, layers, fields = pretrained_encoder(source, mean, std)
            side, width, patch = fields["image_size"], fields["vit_hidden_size"], fields["patch_size"]
        if merge < 1 or side // patch % merge:
            raise ValueError(f"merge: expected a divisor of the {side // patch} patches of a side, got {merge}")
        self.encoder = EncoderTeacher(embeddings, layers, as_dtype(dtype))
        self.merge = merge
        self.width = width * merge**2
        self.image_size = (side, side)
        self.tokens = (side // patch // merge) ** 2

    def train(self, mode: bool = True) -> VisionFeatures:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images to features.

        Args:
            images: [B, 3, H, W] of `image_size`, normalised as by `uniflow.normalize`.

        Returns:
            [B, M, D], one row of `width` D a patch, or square of patches, in raster order, without a gradient, float32.

        Raises:
            ValueError: for images of another shape.
        """
        if tuple(images.shape[1:]) != (3, *self.image_size):
            raise ValueError(f"images: expected shape {['B', 3, *self.image_size]}, got {list(images.shape)}")
        if not len(images):  # layers of the transformers package need some
            return images.new_empty(0, self.tokens, self.width, dtype=torch.float32)
        with torch.autocast(images.device.type, enabled=False):
            patches = self.encoder.last(images)[:, self.encoder.prefix_tokens :].float()
        side = math.isqrt(self.tokens)
        form = {"h": side, "w": side, "a": self.merge, "b": self.merge}
        return rearrange(patches, "n (h a w b) d -> n (h w) (a b d)", **form)

    def fingerprint(self) -> str:
        """A hash of the encoder's weights."""
        return hash_weights(self.encoder)
