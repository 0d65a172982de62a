"""Vision transformers of the transformers package as UniFlow's encoders: what their modules have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from uniflow.encoder import resize_position_embedding
from uniflow.normalization import IMAGENET_MEAN, IMAGENET_STD
from uniflow.recomputation import RecomputingLayer

NORM = "pre_layrnorm"  # CLIP's, under the name that it has there


def vision_part(model: nn.Module) -> nn.Module:
    """The vision model in a classifier, or in a pair of an image and a text encoder; else the model itself."""
    if not hasattr(model, "embeddings"):  # DINOv3's base model is its layers alone
        model = getattr(model, "base_model", model)
    return getattr(model, "vision_model", model)


def used_parts(model: nn.Module) -> list[nn.Module]:
    """What an encoder is made of in a vision model: its embeddings, CLIP's norm behind them, and its layers.

    Raises:
        ValueError: if it has no embeddings or no layers.
    """
    norm = getattr(model, NORM, None)
    return [_part(model, "embeddings"), *([] if norm is None else [norm]), layers_of(model)]


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers of a vision model.

    Raises:
        ValueError: if they are nowhere where the package has them.
    """
    for place in (model, getattr(model, "encoder", None), getattr(model, "model", None)):
        for name in ("layers", "layer"):
            layers = getattr(place, name, None)
            if isinstance(layers, nn.ModuleList) and len(layers):
                return layers
    raise ValueError(
        f"encoder: expected a vision transformer of the transformers package, with its layers as `layers` or "
        f"`encoder.layer`; {type(model).__name__} has neither"
    )


def _part(model: nn.Module, name: str) -> nn.Module:
    part = getattr(model, name, None)
    if not isinstance(part, nn.Module):
        raise ValueError(f"encoder: expected a vision transformer, but {type(model).__name__} has no {name}")
    return part


class HuggingFaceEmbeddings(nn.Module):
    """What a vision transformer of the transformers package does before its first layer.

    Args:
        model: the vision model.
        patch_size: P, in pixels.
        image_size: the side it was trained at, in pixels. What the patch leaves of an image is cut off.
        channels: of an image.
        mean, std: see `pretrained_encoder`.

    Raises:
        ValueError: if the tokens are not one a patch, in raster order behind the prefix.
    """

    embed: Any
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        patch_size: int,
        image_size: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.config: Any = model.config
        self.embed = _part(model, "embeddings")
        if isinstance(getattr(self.embed, "mask_token", None), nn.Parameter):
            self.embed.register_parameter("mask_token", None)  # one that never has a gradient stops DDP
        self.norm = getattr(model, NORM, nn.Identity())
        rotations = getattr(model, "rope_embeddings", None)  # DINOv3's
        self.rotations = None if rotations is None else Rotations(rotations)
        self.patch_size = patch_size
        self.image_size = image_size
        accepted = inspect.signature(self.embed.forward).parameters
        self.takes_patches = "spatial_shapes" in accepted  # SigLIP2: rows of pixels, and how they lie
        self.can_interpolate = "interpolate_pos_encoding" in accepted
        # AIMv2 has a row a patch, which it does not interpolate, or makes sines of any grid
        table = getattr(self.embed, "position_embedding", None)
        self.has_table = isinstance(table, nn.Embedding) and hasattr(self.embed, "rms_norm")
        # from ImageNet's statistics to its own: x*scale + shift
        statistics = torch.tensor([IMAGENET_MEAN, IMAGENET_STD, tuple(mean), tuple(std)], dtype=torch.float32)[
            :, :, None, None
        ]
        self.rescales = not torch.equal(statistics[:2], statistics[2:])
        self.register_buffer("scale", statistics[1] / statistics[3], persistent=False)
        self.register_buffer("shift", (statistics[0] - statistics[2]) / statistics[3], persistent=False)
        self.prefix_tokens = 0
        self.prefix_tokens = self._find_prefix(channels)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, prefix + (H//P)*(W//P), D]."""
        size = (images.shape[-2], images.shape[-1])
        if self.rescales:
            images = images * self.scale.to(images.dtype) + self.shift.to(images.dtype)
        images = images.to(next(self.embed.parameters()).dtype)
        patch = self.patch_size
        if self.takes_patches:
            down, across = size[0] // patch, size[1] // patch
            images = images[..., : down * patch, : across * patch]
            rows = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)
            grid = torch.tensor([[down, across]], device="cpu").expand(images.shape[0], 2)
            return self.norm(self.embed(rows, grid))
        if self.can_interpolate:
            return self.norm(self.embed(images, interpolate_pos_encoding=size != (self.image_size, self.image_size)))
        if self.has_table:
            tokens = self.embed.rms_norm(self.embed.patch_embed(images).flatten(2).transpose(1, 2))
            table = self.embed.position_embedding.weight[None]
            return self.norm(tokens + resize_position_embedding(table, (size[0] // patch, size[1] // patch)))
        return self.norm(self.embed(images))

    def positions(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the layers take beside the tokens of images [B, C, H, W]: DINOv3's cosines and sines [N, head width]."""
        return () if self.rotations is None else self.rotations(images.to(next(self.embed.parameters()).dtype))

    @torch.no_grad()
    def _find_prefix(self, channels: int) -> int:
        """How many tokens come before those of the patches, found by changing a patch at a time."""
        lines = self.image_size // self.patch_size
        side = lines * self.patch_size
        device = next(self.embed.parameters()).device
        places = sorted({0, min(1, lines * lines - 1), lines * lines - 1})
        images = torch.zeros(1 + len(places), channels, side, side, dtype=torch.float32, device=device)
        for image, place in zip(images[1:], places, strict=True):
            top, left = (self.patch_size * at for at in divmod(place, lines))
            image[:, top : top + self.patch_size, left : left + self.patch_size] = 1.0
        training = self.training
        try:
            tokens = self.eval()(images)
            length = tokens.shape[1]
        except Exception as error:  # whatever embeddings of another make do
            raise ValueError(f"encoder: its embeddings do not take pictures of {side}x{side}: {error}") from None
        finally:
            self.train(training)
        prefix = length - lines * lines
        for place, changed in zip(places, (tokens[1:] != tokens[:1]).any(-1), strict=True):
            found = changed.nonzero().flatten().tolist()
            if prefix < 0 or found != [prefix + place]:
                raise ValueError(
                    f"encoder: expected a token for each of the {lines}x{lines} patches, in raster order behind the "
                    f"class and register tokens; of its {tokens.shape[1]} tokens patch {place} changes {found}"
                )
        return prefix


class Rotations(nn.Module):
    """Where the patches lie, for layers that turn queries and keys by it: `rope_embeddings` of a DINOv3.

    Its places are the same in training, where the package stretches them at random: the teacher's are not stretched.
    Its frequencies stay in float32 whatever the dtype of the parameters, as in a model that the package reads.
    """

    rope: Any

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines [N, D/heads] for the patches of images [B, C, H, W], in their dtype."""
        return self.rope(images)

    def train(self, mode: bool = True) -> Rotations:
        """Stay in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotations:
        rope = self.rope
        rope.inv_freq = rope.inv_freq.view(torch.int32)  # a change of dtype leaves integers as they are
        super()._apply(fn, recurse)
        rope.inv_freq = rope.inv_freq.view(torch.float32)
        return self


class HuggingFaceLayer(RecomputingLayer):
    """A layer of the transformers package as one of tokens to tokens: no mask, and nothing but the tokens returned."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        # the first 5.x give the layers of encoders that never have a mask nothing but tokens
        takes = [p for p in inspect.signature(layer.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.without = (None,) if len(takes) > 1 else ()

    def compute(self, x: Tensor, *positions: Tensor) -> Tensor:
        """[B, S, D], and what `HuggingFaceEmbeddings.positions` gives -> [B, S, D]."""
        more = {"position_embeddings": positions} if positions else {}
        out = self.layer(x, *self.without, **more)
        return out[0] if isinstance(out, tuple) else out
