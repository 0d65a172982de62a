"""The per-token velocity network: an MLP with adaptive LayerNorm, keys and numbers of the official SimpleMLPAdaLN.

Everything is applied to the last dimension; the others may have any number and broadcast, so that what is the same for
many rows (the time embedding of a shared t, the modulation of a shared condition) is computed once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class TimestepEmbedding(nn.Module):
    """Sinusoids of t through a two-layer MLP.

    Source: `TimestepEmbedder` of the official release: 256 frequencies as cat(cos, sin), max_period 1e4, in float32.
    """

    frequencies = 256
    max_period = 10000.0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.frequencies, width), nn.SiLU(), nn.Linear(width, width))

    @property
    def dtype(self) -> torch.dtype:
        """Of the MLP's weights; the sinusoids are rounded to it."""
        return next(self.mlp.parameters()).dtype

    def forward(self, t: Tensor) -> Tensor:
        """t [...] as the network was trained with (UniFlow: 1000 times the time in [0, 1]) -> [..., W]."""
        half = self.frequencies // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float().unsqueeze(-1) * torch.exp(-math.log(self.max_period) * exponents)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.dtype))


class FlowBlock(nn.Module):
    """x + gate * MLP(LN(x) * (1 + scale) + shift), with shift, scale, gate = Linear(activated condition).

    Source: `ResBlock` of the official release, with SiLU of the condition taken out: it is the same for every block.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        """x [..., W] and a = SiLU(y), [..., W] or broadcastable to x -> [..., W]."""
        shift, scale, gate = self.adaLN_modulation[1](a).chunk(3, dim=-1)
        h = torch.addcmul(shift, self.in_ln(x), 1 + scale)
        return torch.addcmul(x, gate, self.mlp(h))


class FinalLayer(nn.Module):
    """Linear(LN(x) * (1 + scale) + shift). Source: `FinalLayer` of the official release (from DiT)."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        """x [..., W] and a = SiLU(y), [..., W] or broadcastable to x -> [..., out_channels]."""
        shift, scale = self.adaLN_modulation[1](a).chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, self.norm_final(x), 1 + scale))


class FlowHead(nn.Module):
    """Predicts, token by token, the velocity at x and t under a condition c.

    Args:
        in_channels: size of a row of x.
        model_channels: width W.
        out_channels: size of a row of the output.
        z_channels: size of a row of the condition.
        num_res_blocks: number of flow blocks.
        grad_checkpointing: recompute each block in the backward pass instead of keeping its activations.

    Source: `SimpleMLPAdaLN` of the official release (first in MAR); same parameter names, shapes and numbers.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        z_channels: int,
        num_res_blocks: int,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.z_channels = z_channels
        self.num_res_blocks = num_res_blocks
        self.grad_checkpointing = grad_checkpointing

        self.time_embed = TimestepEmbedding(model_channels)
        self.cond_embed = nn.Linear(z_channels, model_channels)
        self.input_proj = nn.Linear(in_channels, model_channels)
        self.res_blocks = nn.ModuleList(FlowBlock(model_channels) for _ in range(num_res_blocks))
        self.final_layer = FinalLayer(model_channels, out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in MAR: Xavier for products, std 0.02 for the time MLP, zero for modulations and output, so that v = 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if "adaLN_modulation" in name or name == "final_layer.linear":
                    nn.init.zeros_(module.weight)
                elif name.startswith("time_embed"):
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, t: Tensor | float, c: Tensor) -> Tensor:
        """Velocity at x and t under the condition c.

        Args:
            x: [M, in_channels].
            t: [M], or one t for all rows: a number, a 0-d tensor or [1].
            c: [M, z_channels], or [1, z_channels]: one condition for all rows (its modulations are computed once).

        Returns:
            [M, out_channels].

        Raises:
            ValueError: if the shapes do not fit together.
        """
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device) if not isinstance(t, Tensor) else t
        if x.ndim != 2 or x.shape[1] != self.in_channels:
            raise ValueError(f"x: expected shape [M, {self.in_channels}], got {tuple(x.shape)}")
        if t.shape not in ((), (1,), x.shape[:1]):
            raise ValueError(f"t: expected a scalar or shape [{x.shape[0]}], one t a row of x, got {tuple(t.shape)}")
        if c.ndim != 2 or c.shape[1] != self.z_channels or c.shape[0] not in (1, x.shape[0]):
            raise ValueError(f"c: expected shape [{x.shape[0]} or 1, {self.z_channels}], got {tuple(c.shape)}")
        return self.from_embedding(x, self.time_embed(t) + self.cond_embed(c))

    def from_embedding(self, x: Tensor, y: Tensor) -> Tensor:
        """The head behind its embeddings.

        Args:
            x: [..., in_channels].
            y: time embedding plus condition embedding, before SiLU: [..., W], broadcastable to x's rows.

        Returns:
            [..., out_channels].
        """
        x = self.input_proj(x)
        a = F.silu(y)
        for block in self.res_blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, a, use_reentrant=False)
            else:
                x = block(x, a)
        return self.final_layer(x, a)
