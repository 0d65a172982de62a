"""The encoder: patch embeddings and a stack of transformer layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniflow.config import UniFlowConfig
from uniflow.transformer import TransformerLayer, compared_states, kernel_states, last_of
from uniflow_kernels import patchify
from uniflow_kernels.ops.fp8_linear import bytes_per_row
from uniflow_kernels.ops.patch_embedding import embeds_by_product, patch_embedding
from uniflow_kernels.torch_private import always, plain_parts


def resize_position_embedding(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position embedding of a square grid, [1, G*G, D], for another grid [1, h*w, D]: bicubic, in float32.

    Its own grid is returned unchanged to the bit. Source: `_get_pos_embed` of the official release.
    """
    side = round(embedding.shape[1] ** 0.5)
    if always(grid[0] == side) and always(grid[1] == side):
        return embedding
    planes = embedding.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, size=grid, mode="bicubic", align_corners=False)
    return planes.flatten(2).transpose(1, 2).to(embedding.dtype)


def resize_position_table(table: Tensor, side: int, mode: str = "bicubic", antialias: bool = False) -> Tensor:
    """A table of positions, [..., prefix + G*G, D], for a grid of `side` * `side`: [..., prefix + side*side, D].

    Args:
        table: rows of the prefix, which has less than 2*G + 1 tokens and is kept, then of a square grid.
        side: of the new grid.
        mode, antialias: of the interpolation; by default as `resize_position_embedding`, others as some encoders have.
    """
    rows = table.detach().reshape(1, -1, table.shape[-1])
    old = math.isqrt(rows.shape[1])
    prefix, spatial = rows.split([rows.shape[1] - old * old, old * old], dim=1)
    if side != old:
        planes = spatial.float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
        planes = F.interpolate(planes, size=(side, side), mode=mode, align_corners=False, antialias=antialias)
        spatial = planes.flatten(2).transpose(1, 2).to(table.dtype)
    return torch.cat([prefix, spatial], dim=1).reshape(*table.shape[:-2], -1, table.shape[-1])


def encoding_bytes_per_token(config: UniFlowConfig, dtype: torch.dtype, precision: str | None = None) -> int:
    """At most how many bytes a token encoding holds at a time beside weights and images.

    Args:
        config: of the model.
        dtype: of its parameters.
        precision: of the model, "fp8" or None.
    """
    # the sum, its norm, queries, keys, values and what attention makes of them, or the MLP's inner layer twice
    in_layers = 4 * config.hidden_size + max(6 * config.hidden_size, 2 * config.intermediate_size)
    images = config.patch_values * (8 + dtype.itemsize)  # as floats, normalised, and in the model's dtype
    in_fp8 = 0 if precision is None else bytes_of_layer(config.hidden_size, config.intermediate_size, dtype)
    return in_layers * dtype.itemsize + in_fp8 + images


def bytes_of_layer(width: int, mlp_width: int, dtype: torch.dtype) -> int:
    """At most how many bytes more a token holds in a transformer layer whose products are in fp8."""
    return max(bytes_per_row(width, max(3 * width, mlp_width), dtype), bytes_per_row(mlp_width, width, dtype))


class Embeddings(nn.Module):
    """Patch, class and position embeddings. Source: `UniFlowVisionEmbeddings` of the official release."""

    prefix_tokens = 1  # tokens before those of the patches: the class token

    def __init__(self, config: UniFlowConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + config.tokens, width))

    def positions(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the layers take beside the tokens of images [B, C, H, W]: nothing, they have their positions in them."""
        return ()

    def takes_patches(self) -> bool:
        """Whether the tokens of images are a product on their patches."""
        weight = self.patch_embedding.weight
        return embeds_by_product(weight) and plain_parts([self.patch_embedding], _CONVOLUTION) is not None

    def forward(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        """[B, C, H, W] -> [B, 1 + (H/P)*(W/P), D], the class token first.

        `patches` are what `patchify` makes of the images, [B, N, C*P*P], if that was made and `takes_patches`.
        """
        convolution = self.patch_embedding
        patch = convolution.kernel_size[0]
        if patches is not None or self.takes_patches():
            tokens = patch_embedding(images, convolution.weight, convolution.bias, patches)
        else:
            tokens = convolution(images).flatten(2).transpose(1, 2)
        position = self.position_embedding
        spatial = resize_position_embedding(position[:, 1:], (images.shape[2] // patch, images.shape[3] // patch))
        class_token = (self.class_embedding + position[:, :1]).expand(images.shape[0], -1, -1)
        tokens = tokens + spatial
        return torch.cat([class_token.to(tokens.dtype), tokens], dim=1)


_CONVOLUTION = frozenset({nn.Conv2d})


def patches_for(embeddings: nn.Module, images: Tensor) -> Tensor | None:
    """What `patchify` makes of images [B, C, H, W], if the embeddings are a product on that: for all that read them."""
    if not isinstance(embeddings, Embeddings) or not embeddings.takes_patches():
        return None
    return patchify(images, embeddings.patch_embedding.kernel_size[0])


def embedded(embeddings: Any, images: Tensor, patches: Tensor | None = None) -> tuple[Tensor, ...]:
    """What the layers take: the tokens of images [B, C, H, W], [B, prefix + N, D], and the positions beside them.

    Args:
        embeddings: `Embeddings`, or those of an encoder of another make.
        images: in the dtype of the parameters.
        patches: what `patches_for` made for embeddings of such patches; others read the images.
    """
    positions = embeddings.positions(images)
    if patches is None or not isinstance(embeddings, Embeddings) or not embeddings.takes_patches():
        return embeddings(images), *positions
    return embeddings(images, patches.to(images.dtype)), *positions


class LayerStack(nn.Module):
    """Layers that map tokens [B, S, D] to tokens [B, S, D], one after the other.

    All of them are given the same positions, which the `positions` of the embeddings says.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, *positions: Tensor) -> list[Tensor]:
        """Embeddings [B, S, D] -> L+1 tensors [B, S, D]: the embeddings, then the output of every layer."""
        return [x, *self.states(x, *positions)]

    def states(self, x: Tensor, *positions: Tensor) -> Iterator[Tensor]:
        """Embeddings [B, S, D] -> the output of every layer, each computed when it is asked for."""
        fused = None if positions else kernel_states(self.layers, x)
        if fused is not None:
            yield from fused
            return
        for layer in self.layers:
            x = layer(x, *positions)
            yield x

    def compared(
        self, x: Tensor, *positions: Tensor, features: Iterator[Tensor], skip_tokens: int
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """`states`, each with its mean cosine distance to the next of a teacher's features, where layers make it.

        Where the distance is None the features were not asked for: it is left to the caller. See `compared_states`.
        """
        fused = None if positions else compared_states(self.layers, x, features, skip_tokens)
        yield from ((state, None) for state in self.states(x, *positions)) if fused is None else fused

    def last(self, x: Tensor, *positions: Tensor) -> Tensor:
        """Embeddings [B, S, D] -> the output of the last layer; the others are let go as soon as possible."""
        fused = None if positions else kernel_states(self.layers, x)
        if fused is not None:
            return last_of(fused, x)
        for layer in self.layers:
            x = layer(x, *positions)
        return x


def drop_path_rates(config: UniFlowConfig) -> list[float]:
    """Of each layer: they rise linearly to the config's."""
    return torch.linspace(0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()


class Encoder(LayerStack):
    """The transformer layers. Source: `UniFlowVisionEncoder` of the official release."""

    def __init__(self, config: UniFlowConfig) -> None:
        super().__init__(
            TransformerLayer(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                norm_type=config.norm_type,
                eps=config.layer_norm_eps,
                act=config.hidden_act,
                qkv_bias=config.qkv_bias,
                qk_normalization=config.qk_normalization,
                layer_scale=config.initializer_factor,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                drop_path=rate,
                allow_flash_attn=config.use_flash_attn,
            )
            for rate in drop_path_rates(config)
        )
