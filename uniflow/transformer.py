"""The transformer layer of the encoder and of the global blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniflow.recomputation import RecomputingLayer
from uniflow_kernels.modules.flow_layers import LayerNorm, affine_of
from uniflow_kernels.ops.attention import attention
from uniflow_kernels.ops.compared_norm import compared_residual_norm
from uniflow_kernels.ops.distillation import as_compared
from uniflow_kernels.ops.flow_choice import dtype_of_products, is_plain
from uniflow_kernels.ops.modulated_norm import norm_has_kernels, residual_norm
from uniflow_kernels.ops.transformer_layers import (
    ACTIVATIONS,
    Layer,
    LayerForm,
    choose_layers_path,
    may_have_kernels,
    transformer_layers,
)
from uniflow_kernels.ops.transformer_mlp import may_have_kernels as may_have_kernels_of_mlp
from uniflow_kernels.ops.transformer_mlp import transformer_mlp
from uniflow_kernels.torch_private import is_compiled, plain_parts


class RMSNorm(nn.Module):
    """weight * (x / rms(x)), the quotient in float32 and rounded to x's dtype before the product.

    Not nn.RMSNorm, which rounds after the product. Source: `UniFlowRMSNorm` of the official release.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def reset_parameters(self) -> None:
        """To ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * F.rms_norm(wide, x.shape[-1:], eps=self.eps).to(x.dtype)


NORMS: dict[str, Callable[..., nn.Module]] = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}
_NORMS: dict[type, str] = {LayerNorm: "layer", RMSNorm: "rms"}  # as `residual_norm` calls them


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, drops a sample's whole branch with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, ...], the kept samples scaled by 1/(1 - rate)."""
        if not self.training or self.rate == 0:
            return x
        # compared and divided: of bernoulli_(rate) torch.compile would make a graph for every layer's rate
        drawn = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), dtype=torch.float32, device=x.device)
        return x * ((drawn >= self.rate) / (1 - self.rate)).to(x.dtype)

    def leaves_out(self) -> bool:
        """Whether `keep` is to be asked, so that samples are left out of the computation.

        A compiled graph has no place for as many samples as there happen to be: there the branch is made of all.
        """
        return self.training and self.rate > 0 and not torch.compiler.is_compiling()

    def keep(self, samples: int, device: torch.device) -> tuple[Tensor | None, float]:
        """Draw which samples keep the branch, from the CPU's generator, so that no GPU is waited for.

        Returns:
            The indices of those that do, [K] in int64 on the device, and what their branch is multiplied by. None if
            all do. If none does it is one of them, times 0: every parameter has a gradient.
        """
        kept = (torch.rand(samples, dtype=torch.float32, device="cpu") >= self.rate).nonzero().flatten()
        factor = 1 / (1 - self.rate)
        if len(kept) == samples:
            return None, factor
        if len(kept) == 0:
            kept, factor = torch.zeros(1, dtype=torch.int64, device="cpu"), 0.0
        return kept.to(device, non_blocking=True), factor


class Attention(nn.Module):
    """Multi-head attention; query/key normalisation, where there is one, is over the whole width at once."""

    def __init__(
        self,
        width: int,
        heads: int,
        qkv_bias: bool,
        qk_norm_eps: float | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        allow_flash_attn: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        if qk_norm_eps is not None:
            self.q_norm = RMSNorm(width, eps=qk_norm_eps)
            self.k_norm = RMSNorm(width, eps=qk_norm_eps)
        self.qk_normalization = qk_norm_eps is not None
        self.attention_dropout = attention_dropout
        self.allow_flash_attn = allow_flash_attn
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, W] -> [B, S, W]."""
        return self.proj_drop(self.proj(self.attend(self.qkv(x))))

    def attend(self, qkv: Tensor) -> Tensor:
        """Queries, keys and values side by side, [B, S, 3W] -> [B, S, W]; nothing is copied."""
        q, k, v = qkv.chunk(3, dim=-1)
        if self.qk_normalization:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        dropout = self.attention_dropout if self.training else 0.0
        return attention(q, k, v, dropout, self.allow_flash_attn).flatten(2)


_LINEAR = frozenset({nn.Linear})


class MLP(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, width: int, hidden: int, act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = act
        self.act = ACTIVATIONS[act]

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        if may_have_kernels_of_mlp(x) and plain_parts([self.fc1, self.fc2], _LINEAR) is not None:
            return transformer_mlp(x, affine_of(self.fc1), affine_of(self.fc2), self.activation)
        return self.fc2(self.act(self.fc1(x)))


class TransformerLayer(RecomputingLayer):
    """Pre-norm attention and MLP, each on a residual branch with optional LayerScale (ls1, ls2) and DropPath.

    Source: `UniFlowVisionEncoderLayer` of the official release; with `layer_scale=None` timm's `Block`, which the
    release uses as its global block.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        norm_type: str = "layer_norm",
        eps: float = 1e-5,
        act: str = "gelu",
        qkv_bias: bool = True,
        qk_normalization: bool = False,
        layer_scale: float | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        allow_flash_attn: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = NORMS[norm_type](width, eps=eps)
        self.attn = Attention(
            width, heads, qkv_bias, eps if qk_normalization else None, dropout, attention_dropout, allow_flash_attn
        )
        self.norm2 = NORMS[norm_type](width, eps=eps)
        self.mlp = MLP(width, mlp_width, act)
        self.ls1 = self.ls2 = None
        if layer_scale is not None:
            self.ls1 = nn.Parameter(torch.full((width,), layer_scale))
            self.ls2 = nn.Parameter(torch.full((width,), layer_scale))
        self.drop_path1 = DropPath(drop_path)
        self.drop_path2 = DropPath(drop_path)

    def draws(self) -> bool:
        """Whether anything is drawn in training."""
        rates = (self.drop_path1.rate, self.drop_path2.rate, self.attn.attention_dropout, self.attn.proj_drop.p)
        return any(rates)

    @torch.no_grad()
    def fold_layer_scale(self) -> None:
        """Multiply LayerScale into the weights of the projection before it: the same function without a scale."""
        for name, projection in (("ls1", self.attn.proj), ("ls2", self.mlp.fc2)):
            scale = getattr(self, name)
            if scale is not None:
                projection.weight.mul_(scale[:, None])
                projection.bias.mul_(scale)
                setattr(self, name, None)

    def compute(self, x: Tensor, *positions: Tensor) -> Tensor:
        """[B, S, W] -> [B, S, W]."""
        if self.training and (self.drop_path1.leaves_out() or self.drop_path2.leaves_out()):
            x = _add_to_some(x, lambda some: self.attn(self.norm1(some)), self.ls1, self.drop_path1)
            return _add_to_some(x, lambda some: self.mlp(self.norm2(some)), self.ls2, self.drop_path2)
        x, branch = self.to_last_branch(x, self.norm1(x))
        return _add(x, branch, self.ls2)

    def to_last_branch(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, W] and its norm -> the sum behind attention, and what the MLP adds to it but for its LayerScale."""
        x, h = _add_and_norm(x, self.drop_path1(self.attn(h)), self.ls1, self.norm2)
        return x, self.drop_path2(self.mlp(h))

    def tensors(self) -> Layer:
        """As `transformer_layers` takes them."""
        attn, mlp = self.attn, self.mlp
        norms, products = map(affine_of, (self.norm1, self.norm2)), (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
        (norm1, norm2), (qkv, proj, fc1, fc2) = norms, map(affine_of, products)
        return Layer(norm1, (qkv,), attn.attend, proj, self.ls1, norm2, fc1, fc2, self.ls2)

    @property
    def form(self) -> LayerForm:
        """The kind of norm and the activation."""
        norm: Any = self.norm1
        return LayerForm(_NORMS[type(norm)], norm.eps, self.mlp.activation)


# what stands in a layer, of which calling does nothing but its forward
_PARTS = frozenset({TransformerLayer, Attention, MLP, DropPath, nn.Linear, nn.Dropout, *_NORMS})


def _do_their_own(layers: nn.ModuleList) -> bool:
    """Whether calling them does what their class's forward does and nothing else, and they are not compiled."""
    if any(type(layer) is not TransformerLayer or is_compiled(layer) for layer in layers):
        return False
    return plain_parts(list(layers), _PARTS) is not None


def kernel_states(layers: nn.ModuleList, x: Tensor, path: str = "auto") -> Iterator[Tensor] | None:
    """The output of every layer, each computed when it is asked for, by kernels; None where layers' own forwards serve.

    These serve where a gradient is wanted, something is to fire or to be drawn between, layers are compiled, of several
    kinds or of another class, or nothing says that kernels are faster: `uniflow_kernels.ops.transformer_layers`.

    Args:
        layers: one after the other.
        x: [B, S, W].
        path: of those, where no other may serve; an error is raised where it cannot.
    """
    if len(layers) == 0 or (path == "auto" and not may_have_kernels(x)):
        return None
    if not _do_their_own(layers):
        return None
    own: Any = layers
    form = own[0].form
    if any(layer.training and layer.draws() for layer in own) or any(layer.form != form for layer in own):
        return None
    tensors = [layer.tensors() for layer in own]
    chosen = choose_layers_path(x, tensors, form, path)
    return None if chosen == "eager" else transformer_layers(x, tensors, form, chosen)


def compared_states(
    layers: nn.ModuleList, x: Tensor, features: Iterator[Tensor], skip_tokens: int
) -> Iterator[tuple[Tensor, Tensor | None]] | None:
    """The output of every layer and how far it is from a teacher's, by `compared_residual_norm` where layers meet.

    None where layers' own forwards serve, and distances are to be made apart: where no gradient is wanted or no kernel
    does residuals and norms, something is to fire between, to be computed again or to be left out, and where layers are
    compiled, of another class, or what FSDP2 makes of them.

    Args:
        layers: one after the other.
        x: [B, S, W].
        features: of the teacher, [B, S, W] each; the next is asked for when the student's layer is nearly there.
        skip_tokens: how many tokens at the front do not count.

    Returns:
        Pairs of x behind the layer and its mean distance. That of the last is None: no norm of a layer follows it.
    """
    if not torch.is_grad_enabled() or not norm_has_kernels(x):
        return None
    if not _do_their_own(layers):
        return None
    own: Any = layers
    if any(layer.drop_path1.leaves_out() or layer.drop_path2.leaves_out() for layer in own):
        return None
    if any(layer.keeps != "everything" for layer in own):
        return None
    return _compared(own, x, features, skip_tokens) if len(own) else None


def _compared(
    layers: Any, x: Tensor, features: Iterator[Tensor], skip_tokens: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    h = layers[0].norm1(x)
    for layer, following in pairwise(layers):
        x, branch = layer.to_last_branch(x, h)
        norm, feature = following.norm1, as_compared(next(features), x)
        vectors = {"weight": norm.weight, "bias": getattr(norm, "bias", None)}
        how = {"norm": _NORMS[type(norm)], "eps": norm.eps, "dtype": dtype_of_products(x), "skip_tokens": skip_tokens}
        x, h, distance = compared_residual_norm(x, branch, layer.ls2, teacher=feature, **vectors, **how)
        yield x, distance
    x, branch = layers[-1].to_last_branch(x, h)
    yield _add(x, branch, layers[-1].ls2), None


def last_of(states: Iterator[Tensor], x: Tensor) -> Tensor:
    """The last of them, x if there is none; the others are let go as soon as possible."""
    for state in states:
        x = state
    return x


def _add(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    return x + branch if scale is None else torch.addcmul(x, branch, scale)


def _add_and_norm(x: Tensor, branch: Tensor, scale: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """The sum and its norm; in one pass where there are kernels and calling the norm does nothing but its forward."""
    if is_plain(x.is_cuda):  # asked first: next to small layers, looking at the norm takes as long
        x = _add(x, branch, scale)
        return x, norm(x)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if norm_has_kernels(x, branch, scale, weight, bias) and plain_parts([norm], frozenset(_NORMS)) is not None:
        kind, dtype = _NORMS[type(norm)], dtype_of_products(x)
        return residual_norm(x, branch, scale, weight=weight, bias=bias, norm=kind, eps=norm.eps, dtype=dtype)
    x = _add(x, branch, scale)
    return x, norm(x)


def _add_to_some(x: Tensor, branch: Callable[[Tensor], Tensor], scale: Tensor | None, drop_path: DropPath) -> Tensor:
    """Add a branch of x [B, ...] to the samples that keep it; it is made of these alone."""
    if not drop_path.leaves_out() or len(x) == 0:
        return _add(x, branch(x), scale)
    kept, factor = drop_path.keep(len(x), x.device)
    if kept is None:
        return _add(x, branch(x) * factor, scale)
    made = branch(x.index_select(0, kept)) * factor
    return x.index_add(0, kept, (made if scale is None else made * scale).to(x.dtype))
