"""Small stand-ins of other projects' heads: their names, shapes, order and numerics, written here from a table."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, TARGET, COND, DEPTH = 16, 6, 10, 2


def sinusoids(t: Tensor, count: int = 256) -> Tensor:
    frequencies = torch.exp(torch.arange(count // 2, device=t.device).float() * (-math.log(1e4) / (count // 2)))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    rounds_t = False  # VibeVoice: sinusoids in t's dtype

    def __init__(self, width: int = WIDTH, bias: bool = True) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width, bias), nn.SiLU(), nn.Linear(width, width, bias))

    def forward(self, t: Tensor) -> Tensor:
        features = sinusoids(t)
        features = features.to(t.dtype) if self.rounds_t else features
        return self.mlp(features.to(self.mlp[0].weight.dtype))


def linears(width: int, hidden: int, middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), middle, nn.Linear(hidden, width))


class FlowBlock(nn.Module):
    """The canonical block; what a subclass changes is what its project does differently."""

    make_norm: Callable[[int], nn.Module] = functools.partial(nn.LayerNorm, eps=1e-6)

    def __init__(self, width: int = WIDTH, ratio: float = 1.0) -> None:
        super().__init__()
        self.in_ln = type(self).make_norm(width)
        self.mlp = self.make_mlp(width, int(width * ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def make_mlp(self, width: int, hidden: int) -> nn.Module:
        return linears(width, hidden, nn.SiLU())

    def forward(self, x: Tensor, y: Tensor, *unused: Any) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class Last(nn.Module):
    make_norm: Callable[[int], nn.Module] = functools.partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6)

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = type(self).make_norm(width)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Canonical(nn.Module):
    """MAR's net, and that of those who took it over as it is; two outputs a channel, mean and variance."""

    make_block: Callable[..., nn.Module] = FlowBlock
    make_last: Callable[..., nn.Module] = Last

    def __init__(self, in_channels: int = TARGET, out: int = 2 * TARGET, depth: int = DEPTH) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.grad_checkpointing = False
        self.time_embed = TimeEmbedding()
        self.cond_embed = nn.Linear(COND, WIDTH)
        self.input_proj = nn.Linear(in_channels, WIDTH)
        self.res_blocks = nn.ModuleList(type(self).make_block() for _ in range(depth))
        self.final_layer = type(self).make_last(WIDTH, out)

    def forward(self, x, t, c):
        return self.run(x, self.time_embed(t) + self.cond_embed(c))

    def run(self, x: Tensor, y: Tensor, *more: Any) -> Tensor:
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = checkpoint(block, x, y, *more, use_reentrant=True) if self.grad_checkpointing else block(x, y, *more)
        return self.final_layer(x, y)

    def forward_with_cfg(self, x, t, c, cfg_scale):
        """Two rows of condition for each of x's first half; guidance on the channels that are no variance."""
        first = x[: len(x) // 2]
        out = self.forward(torch.cat([first, first]), t, c)
        with_condition, without = out[:, : self.in_channels].chunk(2)
        guided = without + cfg_scale * (with_condition - without)
        return torch.cat([torch.cat([guided, guided]), out[:, self.in_channels :]], dim=1)


class UniFlowNet(Canonical):
    def __init__(self) -> None:
        super().__init__(out=TARGET)


class RootMean(nn.Module):
    """RMS norm; the weight multiplies before (DeCo) or after (VibeVoice) the result is rounded."""

    def __init__(self, width: int, eps: float, affine: bool = True, rounds_first: bool = True) -> None:
        super().__init__()
        self.eps, self.rounds_first = eps, rounds_first
        self.register_parameter("weight", nn.Parameter(torch.ones(width)) if affine else None)

    @property
    def _eps(self) -> float:
        return self.eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        h = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self._eps)
        if self.weight is None:
            return h.to(x.dtype)
        return h.to(x.dtype) * self.weight if self.rounds_first else (h * self.weight).to(x.dtype)


class DeCoNet(Canonical):
    """An argument that nothing uses."""

    def __init__(self) -> None:
        super().__init__(out=TARGET)

    def forward(self, x, t, c, pos=None):
        return self.run(x, self.time_embed(t) + self.cond_embed(c), pos)


class DeCoRootMean(RootMean):
    def __init__(self, width: int, affine: bool = True) -> None:
        super().__init__(width, 1e-6, affine, rounds_first=False)
        self.variance_epsilon = self.__dict__.pop("eps")

    @property
    def _eps(self) -> float:
        return self.variance_epsilon


class DeCoRMSBlock(FlowBlock):
    make_norm = DeCoRootMean


class DeCoRMSLast(Last):
    make_norm = functools.partial(DeCoRootMean, affine=False)


class DeCoRMSNet(DeCoNet):
    make_block, make_last = DeCoRMSBlock, DeCoRMSLast


class FARNet(Canonical):
    """An optional term of the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.index_cond_embed = nn.Linear(1, WIDTH)

    def forward(self, x, t, c, index=None):
        y = self.time_embed(t) + self.cond_embed(c)
        return self.run(x, y if index is None else y + self.index_cond_embed(index))


class NextStepNet(Canonical):
    """Another constructor and a wider MLP; recomputes in training only."""

    make_block = functools.partial(FlowBlock, ratio=1.5)

    def __init__(self, input_dim: int = TARGET, layers: int = DEPTH) -> None:
        super().__init__(input_dim, input_dim, layers)
        self.input_dim = input_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.input_proj.weight.dtype


class JvpLayerNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        if affine:
            self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * self.weight + self.bias if hasattr(self, "weight") else x


class NormedTimeEmbedding(nn.Module):
    """Frequencies in a buffer, t [M, 1], and a norm after the MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(32, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), RootMean(WIDTH, 1e-5))
        self.register_buffer("freqs", torch.exp(torch.arange(16) * (-math.log(1e4) / 16)))

    def forward(self, t: Tensor) -> Tensor:
        angles = t * self.freqs.to(t.dtype)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class PocketBlock(FlowBlock):
    make_norm = JvpLayerNorm


class PocketLast(Last):
    make_norm = functools.partial(JvpLayerNorm, affine=False)


class PocketNet(Canonical):
    """Two times, averaged; the condition comes first."""

    make_block, make_last = PocketBlock, PocketLast

    def __init__(self) -> None:
        super().__init__(out=TARGET)
        self.time_embed = nn.ModuleList(NormedTimeEmbedding() for _ in range(2))

    def forward(self, c, s, t, x):
        time = sum(embed(value) for embed, value in zip(self.time_embed, (s, t), strict=True)) / 2
        return self.run(x, time + self.cond_embed(c))


class GatedMLP(nn.Module):
    """w12 = [gate; up]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, h: Tensor) -> Tensor:
        gate, up = self.w12(h).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


class MingBlock(FlowBlock):
    def make_mlp(self, width: int, hidden: int) -> nn.Module:
        return GatedMLP(width, hidden)


class MingNet(Canonical):
    """Multiplies t by 1000 itself."""

    make_block = functools.partial(MingBlock, ratio=4.0)

    def __init__(self) -> None:
        super().__init__(out=TARGET)

    def forward(self, x, t, c):
        return self.run(x, self.time_embed(1000 * t) + self.cond_embed(c))


class ThreeLinears(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(h)) * self.up_proj(h))


class VibeBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = RootMean(WIDTH, 1e-5)
        self.ffn = ThreeLinears(WIDTH, 3 * WIDTH)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 3 * WIDTH, bias=False))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, dim=-1)
        return x + gate * self.ffn(self.norm(x) * (1 + scale) + shift)


class VibeLast(Last):
    make_norm = functools.partial(RootMean, eps=1e-5, affine=False)

    def __init__(self, width: int, out: int) -> None:
        super().__init__(width, out)
        self.linear = nn.Linear(width, out, bias=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width, bias=False))


class VibeTime(TimeEmbedding):
    rounds_t = True


class VibeVoiceHead(nn.Module):
    """Names of its own, no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.noisy_images_proj = nn.Linear(TARGET, WIDTH, bias=False)
        self.cond_proj = nn.Linear(COND, WIDTH, bias=False)
        self.t_embedder = VibeTime(WIDTH, bias=False)
        self.layers = nn.ModuleList(VibeBlock() for _ in range(DEPTH))
        self.final_layer = VibeLast(WIDTH, TARGET)

    def forward(self, noisy_images, timesteps, condition):
        x, c = self.noisy_images_proj(noisy_images), self.cond_proj(condition) + self.t_embedder(timesteps)
        for layer in self.layers:
            x = layer(x, c)
        return self.final_layer(x, c)


class SphereBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        hidden = WIDTH * 3 // 2
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.w1, self.w2 = nn.Linear(WIDTH, 2 * hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        one, two = self.w1(self.norm(x) * (1 + scale) + shift).chunk(2, dim=-1)
        return x + self.w2(F.silu(one) * two) * gate


class SphereLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False)
        self.ada_ln_modulation = nn.Linear(WIDTH, 2 * WIDTH)
        self.linear = nn.Linear(WIDTH, TARGET)

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        scale, shift = self.ada_ln_modulation(a).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class SphereTime(TimeEmbedding):
    def forward(self, t: Tensor) -> Tensor:
        return super().forward(1000 * t)


class SphereNet(nn.Module):
    """Blocks share modulations, scale before shift; SiLU of the condition once."""

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.time_embed, self.cond_embed = SphereTime(), nn.Linear(COND, WIDTH)
        self.input_proj = nn.Linear(TARGET, WIDTH)
        self.res_blocks = nn.ModuleList(SphereBlock() for _ in range(4))
        self.ada_ln_blocks = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.final_layer = SphereLast()

    def forward(self, x, t, c):
        x, a = self.input_proj(x), F.silu(self.time_embed(t) + self.cond_embed(c))
        for i, block in enumerate(self.res_blocks):
            x = block(x, *self.ada_ln_blocks[i // 2](a).chunk(3, dim=-1))
        return self.final_layer(x, a)


class PixelLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(WIDTH, 3)
        self.adaLN_modulation = None
        self.register_module("drop", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm_final(x))


class PixelNet(nn.Module):
    """A condition for each of a patch's 4 pixels, no time, and no modulation at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.cond_embed, self.input_proj = nn.Linear(COND, 4 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.res_blocks = nn.ModuleList(FlowBlock() for _ in range(3))
        self.final_layer = PixelLast()

    def forward(self, x, c):
        x, y = self.input_proj(x), self.cond_embed(c).reshape(c.shape[0], 4, -1)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def canonical_inputs(t: Tensor) -> tuple[Tensor, ...]:
    return rows(len(t), TARGET, seed=1), t, rows(len(t), COND, seed=2)


WHOLE = torch.tensor([0, 7, 999, 400, 31])
UNIT = torch.tensor([0.0, 0.1, 0.35, 0.8, 0.99])


@dataclass(frozen=True)
class Project:
    """One row of the table: its head, where it lies in the model, and how it is called."""

    make: Callable[[], nn.Module]
    path: str
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


PROJECTS = {
    "UniFlow": Project(UniFlowNet, "flow_head.net", canonical_inputs(1000 * UNIT)),
    "DeCo": Project(DeCoNet, "sem_flow_head.net", canonical_inputs(1000 * UNIT), {"pos": torch.zeros(3)}),
    "DeCo (RMS)": Project(DeCoRMSNet, "flow_head.net", canonical_inputs(1000 * UNIT)),
    "MAR": Project(Canonical, "diffloss.net", canonical_inputs(WHOLE)),
    "Harmon": Project(Canonical, "mar.diffloss.net", canonical_inputs(WHOLE)),
    "UniPic": Project(Canonical, "mar.diffloss.net", canonical_inputs(WHOLE)),
    "DiSA": Project(Canonical, "diffloss.net", canonical_inputs(WHOLE.float())),
    "HART": Project(Canonical, "diffloss.net", canonical_inputs(WHOLE)),
    "UVA": Project(Canonical, "model.diffloss.net", canonical_inputs(WHOLE)),
    "FAR": Project(FARNet, "diffloss.net", canonical_inputs(WHOLE), {"index": rows(5, 1, seed=3)}),
    "Orthus": Project(UniFlowNet, "diff_head", canonical_inputs(WHOLE)),
    "MARDM": Project(UniFlowNet, "DiffMLPs.net", canonical_inputs(UNIT)),
    "CALM": Project(UniFlowNet, "generative_head", canonical_inputs(UNIT)),
    "DeTok": Project(Canonical, "diffloss.net", canonical_inputs(UNIT)),
    "NextStep-1": Project(NextStepNet, "image_head.net", canonical_inputs(UNIT)),
    "pocket-tts": Project(
        PocketNet, "flow_lm.flow_net", (rows(5, COND), UNIT[:, None], UNIT.flip(0)[:, None], rows(5, TARGET))
    ),
    "Ming-UniVision": Project(MingNet, "diffloss.net", canonical_inputs(UNIT)),
    "VibeVoice": Project(VibeVoiceHead, "model.prediction_head", canonical_inputs(WHOLE.float())),
    "SphereAR": Project(SphereNet, "head.net", canonical_inputs(UNIT)),
    "pixel DeCo": Project(PixelNet, "dec_net", (rows(5, 4, WIDTH), rows(5, COND))),
}


def inside(path: str, head: nn.Module) -> nn.Module:
    """A model that holds `head` at `path`."""
    for name in reversed(path.split(".")):
        outer = nn.Module()
        outer.add_module(name, head)
        head = outer
    return head


def with_blocks(kind: type[nn.Module]) -> type[nn.Module]:
    """MAR's net with other blocks."""
    return type("LooksAlike", (Canonical,), {"make_block": kind})


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def only_ours(head: nn.Module, monkeypatch: Any) -> None:
    """From now on the blocks and the last layer of a patched head have no forward of their own."""

    def unused(*_: Any, **__: Any) -> None:
        raise AssertionError("its own forward ran")

    names = head.forward.recognised.names
    for part in (*getattr(head, names.blocks), getattr(head, names.last)):
        monkeypatch.setattr(type(part), "forward", unused)
