"""The decoder's parts: the channel projections around the latent, and the flow decoder over patches."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from uniflow.config import UniFlowConfig
from uniflow_kernels import FlowHead, flow_matching_loss, mean_flow_loss, patchify, self_distillation_loss
from uniflow_kernels.modules.flow_layers import affine_of
from uniflow_kernels.ops.mlp import mlp
from uniflow_kernels.ops.transformer_layers import may_have_kernels
from uniflow_kernels.torch_private import plain_parts

FLOW_LOSSES = ("flow_matching", "mean_flow", "self_distillation")  # the last two of heads of two times


class ChannelProjection(nn.Sequential):
    """Linear, GELU, Linear under the release's names: c_fc, gelu, c_proj."""

    c_fc: nn.Linear
    c_proj: nn.Linear

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        layers = [("c_fc", nn.Linear(inputs, hidden)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(hidden, outputs))]
        super().__init__(OrderedDict(layers))

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        """[B, N, inputs] -> [B, N, outputs], with a position [1, N, outputs] added to it."""
        if may_have_kernels(x, self.c_fc.out_features) and plain_parts(list(self), _PARTS) is not None:
            return mlp(x, affine_of(self.c_fc), affine_of(self.c_proj), "gelu", position)
        made = super().forward(x)
        return made if position is None else made + position


_PARTS = frozenset({nn.Linear, nn.GELU})


def sincos_position_embedding(width: int, side: int) -> Tensor:
    """[1, side*side, width]: sines and cosines of the column in the first half, of the row in the second."""
    frequencies = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    angles = [np.outer(position.ravel(), frequencies) for position in (columns, rows)]
    embedding = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(embedding).float().unsqueeze(0)


class FlowDecoder(nn.Module):
    """The patch-wise pixel flow decoder. Source: `FlowDecoder` of the official release."""

    time_scale = 1000.0  # the network is trained on 1000 t

    def __init__(self, config: UniFlowConfig) -> None:
        super().__init__()
        row = config.patch_values
        width, condition = config.head_width, config.vit_hidden_size
        self.net = FlowHead(row, width, row, condition, config.num_decoder_layers, times=config.flow_times)

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """x [B, N, C*P*P], t broadcastable to [B, N], condition [B, N, D] -> [B, N, C*P*P]."""
        net = self.net
        if net.times == 2:
            t = t.unsqueeze(-1).expand(*t.shape, 2)
        return net.from_embedding(x, net.time_embed(self.time_scale * t) + net.cond_embed(condition))

    def loss(
        self,
        condition: Tensor,
        images: Tensor,
        t: Tensor,
        patch_size: int,
        noise: Tensor,
        chunk_tokens: int | Literal["auto"] | None,
        kind: str = "flow_matching",
        patches: Tensor | None = None,
    ) -> Tensor:
        """One of `FLOW_LOSSES` under the condition [B, N, D], see the function of its name.

        t is [B] or [B, N], or where intervals begin and end, [B, 2] or [B, N, 2], of a head of two times. `patches` are
        those of the images, [B, N, C*P*P], where something else has made them: then the images are not read.
        """
        if kind != "flow_matching":
            data = patchify(images, patch_size) if patches is None else patches
            times = (t.unsqueeze(1) if t.ndim == 2 else t).expand(*data.shape[:2], 2)
            loss = mean_flow_loss if kind == "mean_flow" else self_distillation_loss
            return loss(self.net, condition, data, times, noise, time_scale=self.time_scale, chunk_rows=chunk_tokens)
        if patches is not None:  # each is an image of one patch
            t = t[:, None].expand(patches.shape[:2]) if t.ndim == 1 else t
            images = patches.view(-1, images.shape[1], patch_size, patch_size)
            condition, noise, t = (rows.flatten(0, 1).unsqueeze(1) for rows in (condition, noise, t))
        return flow_matching_loss(
            self.net, condition, images, t, patch_size, noise, time_scale=self.time_scale, chunk_tokens=chunk_tokens
        )
