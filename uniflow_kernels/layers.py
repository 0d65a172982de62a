"""Pure layers as Hugging Face `kernels` takes them: a forward alone, put in place of the forward of another class.

Each works on the submodules and parameters of the layer that it serves, under the names given; none has an `__init__`
or anything else of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from uniflow_kernels.ops.attention import attention
from uniflow_kernels.ops.flow_blocks import Affine, Block
from uniflow_kernels.ops.flow_head import fused_flow_blocks


class SimpleMLPAdaLN(nn.Module):
    """For the head of MAR and of those who took it over as it is.

    Parts: `time_embed`, `cond_embed`, `input_proj`, `res_blocks` (of `in_ln`, `mlp` and `adaLN_modulation`) and
    `final_layer` (of `linear` and `adaLN_modulation`). All norms are layer norms with an eps of 1e-6.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """x [M, in], t [M] as `time_embed` takes it, c [M, z] -> [M, out]."""
        final: Any = self.final_layer
        blocks: Any = self.res_blocks
        out = fused_flow_blocks(
            self.input_proj(x),  # type: ignore[operator]
            self.time_embed(t) + self.cond_embed(c),  # type: ignore[operator]
            [Block(_affine(block.in_ln), _affine(block.mlp[0]), _affine(block.mlp[2])) for block in blocks],
            [_affine(block.adaLN_modulation[1]) for block in blocks],
            _affine(final.adaLN_modulation[1]),
            recompute="block" if getattr(self, "grad_checkpointing", False) else "none",
        )
        return final.linear(out)


class Attention(nn.Module):
    """For the self-attention of timm and InternViT without norms: `qkv`, `num_heads`, `attn_drop`, `proj`, `proj_drop`.

    Dropped attention weights are other ones than the layer's own forward would drop.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, W] -> [B, S, W]."""
        this: Any = self
        q, k, v = (part.unflatten(-1, (this.num_heads, -1)) for part in this.qkv(x).chunk(3, dim=-1))
        out = attention(q, k, v, this.attn_drop.p if self.training else 0.0)
        return this.proj_drop(this.proj(out.flatten(2)))


def _affine(layer: nn.Module) -> Affine:
    return Affine(layer.weight, layer.bias)  # type: ignore[arg-type]
