"""UniFlow on one page: the whole tokenizer, and what it is trained on, in plain PyTorch.

An encoder makes a token of a few channels of every patch of a picture. A decoder makes conditions of the tokens, and
under its condition a small network carries each patch by itself from noise (t = 0) to pixels (t = 1). Names and numbers
are those of the official checkpoints. `uniflow` computes the same: faster, at any size, with everything to choose.

    model = PlainUniFlow.from_pretrained("checkpoint")
    latents = model.encode(images)  # pixels less ImageNet's mean, over its standard deviation
    images = model.decode(latents, noise=torch.randn(len(latents), model.tokens, model.values))

In shapes: B pictures of C channels, N patches of P*P pixels in each, W the width.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn


def mlp(inputs: int, hidden: int, outputs: int, first: str = "c_fc", last: str = "c_proj") -> nn.Sequential:
    """Two linear layers with GELU between them."""
    layers = [(first, nn.Linear(inputs, hidden)), ("gelu", nn.GELU()), (last, nn.Linear(hidden, outputs))]
    return nn.Sequential(OrderedDict(layers))


def silu_mlp(inputs: int, width: int) -> nn.Sequential:
    """Two linear layers with SiLU between them."""
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


def modulation(width: int, parts: int) -> nn.Sequential:
    """From time and condition to what they do in a layer: shift, scale and gate its values."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class Attention(nn.Module):
    """Every token looks at every token: [B, N, W] -> [B, N, W]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention, then an MLP, each added to what came in, in the encoder by a LayerScale: [B, N, W] -> [B, N, W]."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float, scaled: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn, self.mlp = Attention(width, heads), mlp(width, hidden, width, "fc1", "fc2")
        self.ls1, self.ls2 = (nn.Parameter(torch.ones(width)) if scaled else 1.0 for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1 * self.attn(self.norm1(x))
        return x + self.ls2 * self.mlp(self.norm2(x))


class Embeddings(nn.Module):
    """A class token, a token for every patch, and where each lies: [B, C, H, W] -> [B, 1 + N, W]."""

    def __init__(self, channels: int, patch: int, width: int, tokens: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(channels, width, patch, stride=patch)
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + tokens, width))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        return torch.cat([self.class_embedding.expand(len(images), -1, -1), patches], 1) + self.position_embedding


class FlowBlock(nn.Module):
    """An MLP, its input shifted and scaled and its output gated by y: x and y [B, N, W] -> [B, N, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, 1e-6)
        self.mlp = silu_mlp(width, width)
        self.adaLN_modulation = modulation(width, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, -1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FlowHead(nn.Module):
    """The velocity of patches x [B, N, C*P*P] at times t [B, N] under conditions [B, N, W] -> [B, N, C*P*P]."""

    def __init__(self, values: int, width: int, condition: int, depth: int) -> None:
        super().__init__()
        self.time_embed = nn.ModuleDict({"mlp": silu_mlp(256, width)})
        self.cond_embed, self.input_proj = nn.Linear(condition, width), nn.Linear(values, width)
        self.res_blocks = nn.ModuleList(FlowBlock(width) for _ in range(depth))
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(width, values), "adaLN_modulation": modulation(width, 2)})

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        angles = 1000 * t[..., None] * torch.exp(-math.log(10000) * torch.arange(128) / 128).to(t)
        y = self.time_embed["mlp"](torch.cat([angles.cos(), angles.sin()], -1)) + self.cond_embed(condition)
        x = self.input_proj(x)
        for block in self.res_blocks:
            x = block(x, y)
        shift, scale = self.final_layer["adaLN_modulation"](y).chunk(2, -1)
        return self.final_layer["linear"](F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class PlainUniFlow(nn.Module):
    """The tokenizer that the values of a config.json describe."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, latent, channels = config["hidden_size"], config["latent_ch"], config["num_channels"]
        encoder = config["num_attention_heads"], config["intermediate_size"], config["layer_norm_eps"]
        self.patch = config["patch_size"]
        self.side = config["image_size"] // self.patch
        self.tokens, self.values = self.side**2, channels * self.patch**2

        self.embeddings = Embeddings(channels, self.patch, width, self.tokens)
        layers = (Layer(width, *encoder, scaled=True) for _ in range(config["num_hidden_layers"]))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.chal_proj, self.chal_unproj = mlp(width, width, latent), mlp(latent, width, width)
        self.global_block_pos_embed = nn.Parameter(torch.randn(1, self.tokens, width))
        blocks = (Layer(width, 16, 4 * width, 1e-5, scaled=False) for _ in range(config["global_blocks_depth"]))
        self.global_blocks = nn.Sequential(*blocks)
        self.decoder_pos_embed = nn.Parameter(torch.randn(1, self.tokens, width))
        head = config.get("flow_width", width), width, config["num_decoder_layers"]
        self.flow_head = nn.ModuleDict({"net": FlowHead(self.values, *head)})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PlainUniFlow:
        """Read config.json and model.safetensors."""
        model = cls(json.loads((Path(folder) / "config.json").read_text()))
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return model

    def hidden_states(self, images: Tensor) -> list[Tensor]:
        """The embeddings of images [B, C, H, W] and every layer's output, each [B, 1 + N, W]: what understands."""
        states = [self.embeddings(images)]
        for layer in self.encoder["layers"]:
            states.append(layer(states[-1]))
        return states

    def encode(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> latents [B, N, latent_ch]: the last state, without its class token, in a few channels."""
        return self.chal_proj(self.hidden_states(images)[-1][:, 1:])

    def condition(self, latents: Tensor) -> Tensor:
        """[B, N, latent_ch] -> [B, N, W]: tokens look at each other once more before each patch is by itself."""
        return self.global_blocks(self.chal_unproj(latents) + self.global_block_pos_embed) + self.decoder_pos_embed

    def velocity(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Which way x [B, N, C*P*P] moves at t [B, N]: an estimate of pixels - noise."""
        return self.flow_head["net"](x, t, condition)

    def decode(self, latents: Tensor, noise: Tensor, steps: int = 1) -> Tensor:
        """Latents and noise [B, N, C*P*P] -> images [B, C, H, W]: steps along the velocity, of which one may do."""
        x, condition = noise, self.condition(latents)
        for step in range(steps):
            x = x + self.velocity(x, torch.full(x.shape[:2], step / steps).to(x), condition) / steps
        x = x.unflatten(2, (-1, self.patch, self.patch)).unflatten(1, (self.side, self.side))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def patches(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] -> [B, N, C*P*P], the values that `decode` puts together."""
        cut = images.unflatten(3, (self.side, self.patch)).unflatten(2, (self.side, self.patch))
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def losses(
    model: PlainUniFlow, teacher: PlainUniFlow, images: Tensor, t: Tensor, noise: Tensor, beta: float = 2.0
) -> tuple[Tensor, Tensor]:
    """What training makes small, the sum of both: the teacher is a frozen copy of the model from before it.

    Flow matching: somewhere on the straight way from noise to pixels, the velocity is to lead straight along it.
    Distillation: each layer's tokens are to point where the teacher's do; the deeper and the farther off, the more.
    """
    states, pixels = model.hidden_states(images), model.patches(images)
    condition = model.condition(model.chal_proj(states[-1][:, 1:]))
    x = t[..., None] * pixels + (1 - t[..., None]) * noise
    flow = F.mse_loss(model.velocity(x, t, condition), pixels - noise)

    with torch.no_grad():
        taught = teacher.hidden_states(images)
    pairs = list(zip(states, taught, strict=True))[1:]  # the embeddings are no layer
    alpha = torch.stack([1 - F.cosine_similarity(s[:, 1:], f[:, 1:], dim=-1).mean() for s, f in pairs])
    weights = (torch.arange(1, len(pairs) + 1).to(alpha) * torch.exp(beta * alpha)).detach()
    return flow, (weights / weights.sum() * alpha).sum()
