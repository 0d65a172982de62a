"""The blocks of a latent flow transformer: adaptive norms around attention and an MLP.

A block leaves its last gated residual to the next one, whose norm reads the same rows: one pass over memory instead of
two, by `uniflow_kernels.gated_residual_norm`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from uniflow.transformer import MLP, RMSNorm
from uniflow_kernels import attention, gated_residual_norm, modulated_norm
from uniflow_kernels.modules.flow_layers import SwiGLU

_BASE = 100.0  # of the frequencies, for lines of tens of tokens (Heo et al. 2024); text has 10000


class Stream(NamedTuple):
    """The residual stream [B, N, W] and what is still to be added to it: gate * branch."""

    x: Tensor
    gate: Tensor | None = None
    branch: Tensor | None = None

    def normed(self, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The stream with all added, and its adaptive norm."""
        if self.gate is None or self.branch is None:
            return self.x, modulated_norm(self.x, shift, scale, norm="rms")
        return gated_residual_norm(self.x, self.gate, self.branch, shift, scale, norm="rms")


class Rotation(NamedTuple):
    """Cosines and sines of the angles [N, 1, D/2] by which the tokens' queries and keys are turned."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, grid: tuple[int, int], channels: int, device: torch.device) -> Rotation:
        """Half of the pairs of channels turn with the line, half with the column.

        Args:
            grid: lines of tokens, and tokens a line.
            channels: D of an attention head, a multiple of 4.
            device: where they are wanted.

        Source: rotary embedding (Su et al. 2021) by two axes, as in EVA-02 and LightningDiT.
        """
        count = channels // 4
        exponents = torch.arange(count, dtype=torch.float32, device=device) / count
        frequencies = _BASE**-exponents
        lines, columns = (torch.arange(extent, dtype=torch.float32, device=device) for extent in grid)
        places = torch.cartesian_prod(lines, columns).view(-1, 2, 1)
        angles = (places * frequencies).flatten(1).unsqueeze(1)
        return cls(angles.cos(), angles.sin())

    def __call__(self, x: Tensor) -> Tensor:
        """Queries or keys [B, N, H, D], turned: channel d with d + D/2; in x's dtype, computed in float32."""
        first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
        cos, sin = self.cos, self.sin
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head attention among all tokens, queries and keys normalised head by head and, if asked, rotated."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        """[B, N, W] -> [B, N, W]."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        # under autocast the norms' weights, and so their results, are of another dtype than v
        return self.proj(attention(q.to(v.dtype), k.to(v.dtype), v).flatten(2))


class Block(nn.Module):
    """Attention and an MLP, each between an adaptive norm and a gated residual (adaLN-Zero).

    Args:
        width: W.
        heads: of the attention.
        mlp: "swiglu" or "gelu".

    Source: DiT (Peebles and Xie 2023, figure 3); RMS norms, SwiGLU and normalised queries and keys as in LightningDiT.
    """

    def __init__(self, width: int, heads: int, mlp: str) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.mlp = SwiGLU(width, _hidden(width)) if mlp == "swiglu" else MLP(width, 4 * width, "gelu_pytorch_tanh")
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, stream: Stream, condition: Tensor, rotation: Rotation | None) -> Stream:
        """The stream behind this block; the condition, after SiLU, is [B, 1, W], [B, N, W] or [1, W]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        x, h = stream.normed(shift1, scale1)
        x, h = gated_residual_norm(x, gate1, self.attn(h, rotation), shift2, scale2, norm="rms")
        return Stream(x, gate2, self.mlp(h))


class AdaptiveNorm(nn.Module):
    """The end of a stream: all added, and modulated as in DiT's last layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, stream: Stream, condition: Tensor) -> Tensor:
        """[B, N, W]; the condition as `Block` takes it."""
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        return stream.normed(shift, scale)[1]


def _hidden(width: int) -> int:
    """Of a SwiGLU with about as many weights as an MLP four times as wide."""
    return -(-8 * width // (3 * 64)) * 64
