"""Self-attention of vision transformers (timm, InternViT, UniFlow's release) that writes its scores out.

Such a layer is known by its submodules (`qkv`, `proj`, `num_heads`) and by its numbers. What replaces its forward is
the `attention` operation between its own linear layers and norms.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from uniflow_kernels.dropin.probe import TOLERANCE, NotOurs, Probe, check_untouched, difference, own_forward
from uniflow_kernels.ops.attention import attention
from uniflow_kernels.torch_private import children_of, is_hooked

LENGTH = 5


@dataclass(frozen=True)
class Attention:
    """A recognised attention layer. `norm` says over what queries and keys are normalised: nothing, a head, all."""

    heads: int
    norm: str | None
    first_argument: str

    is_whole: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"attention of {self.heads} heads; scaled_dot_product_attention, or flash-attn where it can serve"

    def prepare(self, module: nn.Module) -> None:
        """Nothing must be done before `forward` can be compiled."""

    def forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """What `module(*args, **kwargs)` computes; by its own forward where that drops or is watched."""
        given = [*args, *kwargs.values()]
        alone = len(given) == 1 and (bool(args) or self.first_argument in kwargs)
        if not alone or not isinstance(given[0], Tensor) or given[0].ndim != 3 or self._needs_scores(module):
            return type(module).forward(module, *args, **kwargs)
        return self.attend(module, given[0])

    def attend(self, module: nn.Module, x: Tensor, attention: Callable[..., Tensor] = attention) -> Tensor:
        """[B, S, W] -> [B, S, W]."""
        parts: Any = children_of(module)
        x = parts["proj"](self.between(module, parts["qkv"](x), attention))
        return parts["proj_drop"](x) if "proj_drop" in parts else x

    def between(self, module: nn.Module, qkv: Tensor, attention: Callable[..., Tensor] = attention) -> Tensor:
        """What lies between its products: queries, keys and values side by side, [B, S, 3W] -> [B, S, W]."""
        parts: Any = children_of(module)
        q, k, v = qkv.chunk(3, dim=-1)
        if self.norm == "all":
            q, k = parts["q_norm"](q), parts["k_norm"](k)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        if self.norm == "head":
            q, k = parts["q_norm"](q), parts["k_norm"](k)
        return attention(q, k, v).flatten(2)

    @staticmethod
    def _needs_scores(module: nn.Module) -> bool:
        """Whether attention weights are dropped, or a hook wants to see them."""
        drop = children_of(module).get("attn_drop")
        if drop is None:
            return False
        return is_hooked(drop) or (drop.training and getattr(drop, "p", 0.0) > 0)


def recognise(module: nn.Module) -> Attention | None:
    """The attention layer that `module` is; None if it does not even look like one.

    Raises:
        NotOurs: if it looks like one and is none, or has nothing to gain, saying why.
    """
    parts, heads = children_of(module), getattr(module, "num_heads", None)
    qkv, proj = parts.get("qkv"), parts.get("proj")
    if not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear) or not isinstance(heads, int):
        return None
    check_untouched(module)
    width = qkv.in_features
    if qkv.out_features != 3 * width or proj.weight.shape != (width, width) or width % heads:
        raise NotOurs(f"its projections are not {heads} heads of equal size")
    names = list(inspect.signature(own_forward(module)).parameters)[1:]
    normed = any(isinstance(parts.get(name), nn.Module) for name in ("q_norm", "k_norm"))
    with Probe(module) as probe:
        x = probe.rows(2, LENGTH, width)
        with _SeesAttention():
            own = probe.in_both_modes(lambda: own_forward(module)(probe.module, x))
        for norm in ("head", "all") if normed else (None,):
            tried = Attention(heads, norm, names[0])
            if _apart(tried, probe, x, own) < TOLERANCE:
                return tried
    raise NotOurs("its forward computes something else: a mask, positions, or another order")


class _SeesAttention(TorchFunctionMode):
    """Refuses calls of scaled_dot_product_attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            raise NotOurs("nothing to gain: it calls scaled_dot_product_attention already")
        return func(*args, **(kwargs or {}))


def _by_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What `attention` computes, [B, S, H, D], in products alone."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def _apart(tried: Attention, probe: Probe, x: Tensor, own: list[Tensor]) -> float:
    try:
        return difference(probe.in_both_modes(lambda: tried.attend(probe.module, x, _by_scores)), own)
    except NotOurs:  # norms of another size
        return float("inf")
