"""Bidirectional attention: PyTorch's scaled_dot_product_attention, or the flash-attn package where it is the faster.

The package is FlashAttention 2. On Hopper and Blackwell PyTorch takes cuDNN's attention by itself, from 2.11 on, which
others measured 1.7 to 2.3 times as fast as that on an H100, and slower on an A100 (huggingface/transformers 48163).
Nothing of this was measured here.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from uniflow_kernels.torch_private import constant, is_forward_mode
from uniflow_kernels.triton_kernels import architecture

_FLASH_ATTN_INSTALLED = importlib.util.find_spec("flash_attn") is not None
_FLASH_ATTN_MAX_HEAD_DIM = 256


def why_not_flash_attn(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the flash-attn package does not serve such an input; None where it does."""
    if not _FLASH_ATTN_INSTALLED:
        return "the flash-attn package is not installed"
    if device.type != "cuda":
        return f"flash-attn runs on CUDA, not on {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 and bfloat16, not {dtype}"
    if head_dim > _FLASH_ATTN_MAX_HEAD_DIM or head_dim % 8:
        return f"flash-attn takes head sizes that are multiples of 8 up to {_FLASH_ATTN_MAX_HEAD_DIM}, not {head_dim}"
    if _has_cudnns(device):
        return "PyTorch takes cuDNN's attention on this GPU, which others measured as the faster (unmeasured here)"
    return None


@constant
def _has_cudnns(device: torch.device) -> bool:
    """Whether PyTorch prefers cuDNN's attention on a GPU: those of compute capability 9 and 10."""
    return architecture(device) // 10 in (9, 10)


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, allow_flash_attn: bool = True) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for every head, without a mask.

    Args:
        q, k, v: [B, S, H, D], float; any strides with a contiguous last dimension.
        dropout: probability of dropping an attention weight; 0 outside training.
        allow_flash_attn: False keeps to PyTorch's own kernels.

    Returns:
        [B, S, H, D].

    Raises:
        TypeError: for another dtype.

    Source: Vaswani et al. 2017.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating point dtype, got {x.dtype}")
    forward_mode = is_forward_mode()
    if allow_flash_attn and not forward_mode and why_not_flash_attn(q.device, q.dtype, q.shape[-1]) is None:
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v, dropout_p=dropout)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if forward_mode:  # for which the fused kernels have no rule
        scores = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
        return (F.dropout(scores, dropout) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)
