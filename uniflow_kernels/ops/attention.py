"""Bidirectional attention: PyTorch's scaled_dot_product_attention on one of its backends, or a flash-attn package.

Which one is by what was measured on a GPU of its kind, for its dtype, head width and number of tokens: `measured.json`,
by `python -m benchmarks choices`. Where nothing was, PyTorch chooses among its own backends: from 2.11 on cuDNN's on
Hopper and Blackwell, which others measured 1.7 to 2.3 times as fast as FlashAttention 2 on an H100, and slower on an
A100 (huggingface/transformers 48163). Nothing of this was measured here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from uniflow_kernels.choice import is_in_graph
from uniflow_kernels.ops.flow_choice import UNMEASURED, fastest_first, measured_on
from uniflow_kernels.ops.registration import wants_gradient
from uniflow_kernels.torch_private import constant, is_forward_mode

OP = "attention"
OWN = "own choice"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PACKAGES = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface"}  # and the modules to import

_MAX_HEAD_DIM = 256  # of the packages
_SDPA = "scaled_dot_product_attention"
_RUNS = {
    OWN: f"{_SDPA}, PyTorch's choice of backend",
    **{name: f"{_SDPA}, backend {name}" for name in BACKENDS},
    **{name: name for name in PACKAGES},
}


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


_INSTALLED = {name: _is_installed(module) for name, module in PACKAGES.items()}


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, allow_flash_attn: bool = True) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for every head, without a mask.

    Args:
        q, k, v: [B, S, H, D], float; any strides with a contiguous last dimension, and nothing is copied.
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
    if is_forward_mode():  # for which the fused kernels have no rule
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)
        return (F.dropout(scores, dropout) @ v).transpose(1, 2)
    path = OWN
    if q.is_cuda:
        # a compiled graph is for any number of tokens: it takes what is the fastest for the most that were measured
        tokens = None if torch.compiler.is_compiling() else q.shape[1]
        training = torch.is_grad_enabled() and wants_gradient((q, k, v))
        path = choose_attention(q.device, q.dtype, q.shape[-1], tokens, training, dropout > 0, allow_flash_attn)
    return attend_on(path, q, k, v, dropout)


def attend_on(path: str, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, only: bool = False) -> Tensor:
    """The same on OWN, one of BACKENDS or of PACKAGES; with `only` an error where that one cannot serve."""
    if path in PACKAGES:
        return _function_of(path)(q, k, v, dropout)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if path == OWN:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)
    order = [BACKENDS[path], *([] if only else [other for name, other in BACKENDS.items() if name != path])]
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2)


def _function_of(package: str) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    if package == "flash-attn 2":
        from flash_attn import flash_attn_func

        return flash_attn_func
    from flash_attn_interface import flash_attn_func as without_dropout

    def attend(q: Tensor, k: Tensor, v: Tensor, _dropout: float) -> Tensor:
        made = without_dropout(q, k, v)
        return made[0] if isinstance(made, tuple) else made  # up to some version with the sums' logarithms

    return attend


@constant
def choose_attention(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    tokens: int | None,
    training: bool = False,
    drops: bool = False,
    allow_flash_attn: bool = True,
) -> str:
    """The fastest of OWN, BACKENDS and PACKAGES by what was measured that can serve; OWN where nothing was.

    Args:
        device, dtype, head_dim: of the heads.
        tokens: of a sample; None for the most that were measured.
        training: whether a backward pass follows.
        drops: whether attention weights are dropped.
        allow_flash_attn: False for none of the packages.
    """
    known = measured_on(device, dtype, head_dim, OP)
    rows = known[-1].rows if known and tokens is None else tokens
    order = fastest_first(known, rows or 0, training, is_in_graph())
    return next((path for path in order if _why_not(path, dtype, head_dim, drops, allow_flash_attn) is None), OWN)


def explain_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, allow_flash_attn: bool = True
) -> tuple[str, str]:
    """What serves attention by its tokens, and why: where that was measured, or what speaks against it."""
    if device.type != "cuda":
        return _SDPA, f"its backends and flash-attn are for CUDA, not for {device.type}"
    known = measured_on(device, dtype, head_dim, OP)
    if not known:
        there = [name for name, installed in _INSTALLED.items() if installed]
        return _RUNS[OWN], f"its backends{''.join(f' and {name}' for name in there)} are {UNMEASURED}"
    served, last = [], None
    for rows in (entry.rows for entry in known):
        both = [
            _RUNS[choose_attention(device, dtype, head_dim, rows, training, False, allow_flash_attn)]
            for training in (False, True)
        ]
        if both != last:
            served.append(f"from {rows} tokens {both[0]}" + ("" if both[0] == both[1] else f" (training: {both[1]})"))
            last = both
    faster = fastest_first(known, known[-1].rows, False, False)[0]
    reason = _why_not(faster, dtype, head_dim, False, allow_flash_attn)
    return "; ".join(served), f"measured on {known[-1].gpu}" + (f"; {faster}, the fastest: {reason}" if reason else "")


def _why_not(path: str, dtype: torch.dtype, head_dim: int, drops: bool, allow_flash_attn: bool) -> str | None:
    """Why a path cannot serve such heads on a GPU where it was measured."""
    if path not in PACKAGES:
        return None
    reasons = {
        "the config's use_flash_attn is false": not allow_flash_attn,
        f"the module {PACKAGES[path]} is not installed": not _INSTALLED[path],
        f"it takes float16 and bfloat16, not {dtype}": dtype not in (torch.float16, torch.bfloat16),
        f"it takes head sizes that are multiples of 8 up to {_MAX_HEAD_DIM}, not {head_dim}": bool(
            head_dim > _MAX_HEAD_DIM or head_dim % 8
        ),
        "it drops no attention weights": drops and path == "flash-attn 3",
    }
    return next((reason for reason, applies in reasons.items() if applies), None)
