"""The layers that a flow head is built of, with the parameter names of the official release.

Everything is applied to the last dimension; the others may have any number and broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from uniflow_kernels.ops.flow_blocks import Affine, Block, Form, final_norm, flow_block, layer_norm, swiglu
from uniflow_kernels.ops.flow_tangents import Dual, Rules
from uniflow_kernels.ops.registration import is_watched, wants_gradient
from uniflow_kernels.packing import may_last
from uniflow_kernels.torch_private import children_of, is_forward_mode, parameters_of


class TimestepEmbedding(nn.Module):
    """Sinusoids of t through a two-layer MLP.

    Source: `TimestepEmbedder` of the official release: 256 frequencies as cat(cos, sin), max_period 1e4, in float32
    (of t in float64 in float64).
    """

    frequencies = 256
    max_period = 10000.0

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        first, second = nn.Linear(self.frequencies, width, bias), nn.Linear(width, width, bias)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    @property
    def dtype(self) -> torch.dtype:
        """Of what the first layer computes with, to which the sinusoids are rounded.

        Of its weight; where that is quantized, of its bias or another layer's numbers; else float32.
        """
        first: Any = self.mlp[0]  # replicas of DataParallel have no parameters()
        for held in (first.weight, getattr(first, "bias", None)):
            if isinstance(held, Tensor) and held.is_floating_point():
                return held.dtype
        return next((p.dtype for p in self.mlp.parameters() if p.is_floating_point()), torch.float32)

    def forward(self, t: Tensor) -> Tensor:
        """t [...] as the network was trained with (UniFlow: 1000 times the time in [0, 1]) -> [..., W].

        Raises:
            TypeError: if t is complex.
        """
        angles = self._angles(t)
        if is_watched(t) or is_forward_mode() or wants_gradient((t,)):
            return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.dtype))
        sinusoids = angles.new_empty(*t.shape, self.frequencies, dtype=self.dtype)
        cos, sin = sinusoids.chunk(2, dim=-1)
        torch.cos(angles, out=cos)  # rounded on the way: two launches less
        torch.sin(angles, out=sin)
        return self.mlp(sinusoids)

    def with_tangent(self, t: Tensor, dt: Tensor, rules: Rules) -> Dual:
        """The same with its derivative along dt, of t's shape."""
        angles = self._angles(t)
        cos, sin = angles.cos(), angles.sin()
        along = torch.cat([-sin, cos], dim=-1) * self._angles(dt).repeat((1,) * dt.ndim + (2,))
        first, last = (affine_of(cast(nn.Module, children_of(self.mlp)[place])) for place in ("0", "2"))
        sinusoids = Dual(torch.cat([cos, sin], dim=-1).to(self.dtype), along.to(self.dtype))
        return rules.linear(rules.silu(rules.linear(sinusoids, first)), last)

    def _angles(self, t: Tensor) -> Tensor:
        """Every frequency times t [...]: [..., 128]."""
        if t.is_complex():
            raise TypeError(f"t: expected real numbers, got {t.dtype}")
        times = t.to(torch.promote_types(t.dtype, torch.float32)).unsqueeze(-1)
        kept = not is_watched(t) and may_last(t.device)  # they are four launches
        made = _kept_frequencies if kept else _frequencies
        return times * made(self.frequencies // 2, self.max_period, t.device)


def _frequencies(count: int, max_period: float, device: torch.device) -> Tensor:
    exponents = torch.arange(count, dtype=torch.float32, device=device) / count
    return torch.exp(-math.log(max_period) * exponents)


@lru_cache(16)
def _kept_frequencies(count: int, max_period: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in that mode could not be used outside it
        return _frequencies(count, max_period, device)


class IntervalEmbedding(nn.ModuleList):
    """The mean of two embeddings: of the time where a step begins and of the one where it ends.

    Source: `SimpleMLPAdaLN` with two time conditions of pocket-tts (Kyutai), whose parameter names it has.
    """

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__(TimestepEmbedding(width, bias) for _ in range(2))

    def forward(self, t: Tensor) -> Tensor:
        """t [..., 2] -> [..., W]."""
        begin, end = (embed(at) for embed, at in zip(self, t.unbind(-1), strict=True))
        return (begin + end) / 2

    def with_tangent(self, t: Tensor, dt: Tensor, rules: Rules) -> Dual:
        """The same with its derivative along dt, of t's shape."""
        both = zip(cast(Iterable[TimestepEmbedding], self), t.unbind(-1), dt.unbind(-1), strict=True)
        begin, end = (embed.with_tangent(at, along, rules) for embed, at, along in both)
        total = rules.sum(begin, end)
        assert total.tangent is not None
        return Dual(total.value / 2, total.tangent / 2)


class SwiGLU(nn.Module):
    """Linear(SiLU(gate) * up), gate and up side by side from one product. Source: the MLP of Ming-UniVision's head."""

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden, bias)
        self.w3 = nn.Linear(hidden, width, bias)

    def forward(self, h: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        return self.w3(swiglu(self.w12(h)))


class LayerNorm(nn.LayerNorm):
    """torch's, with the right derivatives of forward-mode derivatives."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        return layer_norm(x, self.weight, self.bias, self.eps)


def _norm(form: Form, width: int, affine: bool) -> nn.Module:
    kind = LayerNorm if form.norm == "layer" else nn.RMSNorm
    return kind(width, eps=form.eps, elementwise_affine=affine)


def affine_of(layer: nn.Module) -> Affine:
    """Weight and bias of a linear layer or a norm."""
    # not layer.weight: a module finds its attributes slowly. Replicas of DataParallel hold them as plain ones
    own = parameters_of(layer)
    held = own if "weight" in own else vars(layer)
    return Affine(cast(Tensor, held["weight"]), held.get("bias"))


def modulation_of(module: nn.Module) -> Affine:
    """Of a block or the last layer: the linear layer behind SiLU."""
    sequence: Any = children_of(module)["adaLN_modulation"]
    return affine_of(cast(nn.Module, children_of(sequence)["1"]))


class FlowBlock(nn.Module):
    """x + gate * MLP(norm(x) * (1 + scale) + shift), with shift, scale, gate = Linear(SiLU(condition)).

    Source: `ResBlock` of the official release.

    Args:
        width: W.
        form: the kind of norm and MLP, and the order of the modulations.
        hidden: size of the MLP's hidden layer; W by default.
        bias: whether linear layers have one.
        modulated: whether it has modulations of its own; else it is given those of another block.
    """

    def __init__(
        self,
        width: int,
        form: Form = Form(),  # noqa: B008 - a NamedTuple does not change
        hidden: int | None = None,
        bias: bool = True,
        modulated: bool = True,
    ) -> None:
        super().__init__()
        self.form = form
        hidden = width if hidden is None else hidden
        self.in_ln = _norm(form, width, affine=True)
        self.mlp: nn.Sequential | SwiGLU
        if form.mlp == "silu":
            self.mlp = nn.Sequential(nn.Linear(width, hidden, bias), nn.SiLU(), nn.Linear(hidden, width, bias))
        else:
            self.mlp = SwiGLU(width, hidden, bias)
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width, bias))

    def tensors(self) -> Block:
        """Its tensors, without its modulations, as `fused_flow_blocks` takes them."""
        parts: Any = children_of(self)
        layers: Any = list(children_of(parts["mlp"]).values())
        return Block(affine_of(parts["in_ln"]), affine_of(layers[0]), affine_of(layers[-1]))

    def forward(self, x: Tensor, y: Tensor, modulation: Tensor | None = None) -> Tensor:
        """x [..., W] -> [..., W].

        Args:
            x: [..., W].
            y: the condition, [..., W] or broadcastable to x.
            modulation: [..., 3W], computed by the first block of the group; by default it is computed here, from y.
        """
        if modulation is None:
            modulation = self.adaLN_modulation(y)
        return flow_block(x, modulation, self.form.modulation_order, self.in_ln, self.mlp)


class FinalLayer(nn.Module):
    """Linear(norm(x) * (1 + scale) + shift). Source: `FinalLayer` of the official release (from DiT).

    Without a modulation (pixel DeCo) it is Linear(norm(x)).
    """

    def __init__(
        self,
        width: int,
        out_channels: int,
        form: Form = Form(),  # noqa: B008 - a NamedTuple does not change
        bias: bool = True,
        modulated: bool = True,
    ) -> None:
        super().__init__()
        self.form = form
        self.norm_final = _norm(form, width, affine=False)
        self.linear = nn.Linear(width, out_channels, bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width, bias)) if modulated else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., W] and the condition y, [..., W] or broadcastable to x -> [..., out_channels]."""
        modulation = None if self.adaLN_modulation is None else self.adaLN_modulation(y)
        return self.linear(final_norm(x, modulation, self.form.modulation_order, self.norm_final))
