"""The official release's plain form, in eager PyTorch, on the parameters of our modules.

What a user of the release runs today, with its costs left in: the time embedding of every row although all share one t,
SiLU of the condition in every block, LayerNorm and modulation as separate operations, a second full pass for guidance,
attention that writes its scores (the release without the optional flash_attention package). One kindness: constants are
made on the device, where the release makes them on the CPU and copies them in every call.

Everything follows the dtype it is given, float64 too (statistics at least in float32): this is also the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uniflow import UniFlow, UniFlowObjective
from uniflow.transformer import Attention
from uniflow_kernels import FlowHead
from uniflow_kernels.modules.flow_layers import TimestepEmbedding

# ------------------------------------------------------------------------------------------------ patches and losses


def upcast(x: Tensor) -> Tensor:
    """To float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rounded(rows: Tensor) -> Tensor:
    """[..., W] rounded to numbers of float8_e4m3fn times a scale, by which each row's largest magnitude is 448."""
    scale = rows.abs().amax(-1, keepdim=True).float() / 448
    return ((rows * (1 / scale)).to(torch.float8_e4m3fn).float() * scale).to(rows.dtype)


def patchify(images: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C*P*P]."""
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def unpatchify(rows: Tensor, patch: int) -> Tensor:
    """[B, N, C*P*P] -> [B, C, H, W], a square."""
    batch, tokens, row = rows.shape
    side, channels = math.isqrt(tokens), row // (patch * patch)
    cut = rows.reshape(batch, side, side, channels, patch, patch)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, side * patch, side * patch)


def interpolate(images: Tensor, t: Tensor, patch: int, noise: Tensor) -> Tensor:
    """Images [B, C, H, W], t [B, N], noise [B, N, C*P*P] -> x_t [B, N, C*P*P]."""
    t = upcast(t).unsqueeze(-1)
    return (t * upcast(patchify(images, patch)) + (1 - t) * upcast(noise)).to(images.dtype)


def velocity_loss(velocity: Tensor, images: Tensor, patch: int, noise: Tensor) -> Tensor:
    """Velocity and noise [B, N, C*P*P], images [B, C, H, W] -> mean squared error, a scalar."""
    return F.mse_loss(upcast(velocity), upcast(patchify(images, patch)) - upcast(noise))


def layerwise_distillation(student: Sequence[Tensor], teacher: Sequence[Tensor], beta: float) -> Tensor:
    """L tensors [B, S, D] of each side -> the weighted sum of the layers' cosine distances, a scalar."""
    alpha = torch.stack(
        [1 - F.cosine_similarity(upcast(s), upcast(t), dim=-1).mean() for s, t in zip(student, teacher, strict=True)]
    )
    depth = torch.arange(1, len(alpha) + 1, device=alpha.device) / len(alpha)
    weights = depth * torch.exp(beta * alpha.detach())
    return (weights / weights.sum() * alpha).sum()


# ---------------------------------------------------------------------------------------------------------- flow head


def flow_head(
    head: FlowHead,
    x: Tensor,
    t: Tensor,
    c: Tensor,
    norm: Callable[[nn.LayerNorm, Tensor], Tensor] = nn.LayerNorm.forward,
) -> Tensor:
    """X [M, in], t [M], c [M, z] -> velocity [M, out]; `norm` is how the blocks' LayerNorm is computed."""
    x = head.input_proj(x)
    y = _time_embedding(head.time_embed, t) + head.cond_embed(c)
    for block in head.res_blocks:
        x = _flow_block(block, x, y, norm)
    last: Any = head.final_layer
    shift, scale = last.adaLN_modulation(y).chunk(2, dim=-1)
    return last.linear(_modulate(last.norm_final(x), shift, scale))


def _flow_block(block: Any, x: Tensor, y: Tensor, norm: Callable[[nn.LayerNorm, Tensor], Tensor]) -> Tensor:
    shift, scale, gate = block.adaLN_modulation(y).chunk(3, dim=-1)
    return x + gate * block.mlp(_modulate(norm(block.in_ln, x), shift, scale))


def _time_embedding(embedding: TimestepEmbedding, t: Tensor) -> Tensor:
    t = upcast(t)
    half = embedding.frequencies // 2
    steps = torch.arange(half, dtype=t.dtype, device=t.device) / half
    angles = t[:, None] * torch.exp(-math.log(embedding.max_period) * steps)[None]
    sinusoids = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
    return embedding.mlp(sinusoids.to(embedding.dtype))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def sample(
    head: FlowHead,
    noise: Tensor,
    condition: Tensor,
    steps: int,
    cfg: float = 1.0,
    velocity: Callable[..., Tensor] = flow_head,
    null: Tensor | None = None,
) -> Tensor:
    """Euler steps from noise [M, in] under the condition [M, z] -> [M, in]; `velocity` is the head or its rival.

    Guidance leads away from the condition `null` [M, z], or from zeros.
    """
    x = noise
    null = torch.zeros_like(condition) if null is None else null
    for t in [step / steps for step in range(steps)]:
        times = torch.full((len(x),), 1000 * t, dtype=upcast(noise).dtype, device=x.device)
        v = velocity(head, x, times, condition)
        if cfg != 1.0:
            unguided = velocity(head, x, times, null)
            v = unguided + cfg * (v - unguided)
        x = x + v / steps
    return x


# ------------------------------------------------------------------------------------------------------- the tokenizer


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [B, H, S, D] -> [B, H, S, D]."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    scores += torch.zeros(scores.shape[-2:], dtype=q.dtype, device=q.device)  # the release adds its empty mask
    return scores.softmax(dim=-1) @ v


def encode(model: UniFlow, images: Tensor) -> Tensor:
    """[B, C, H, W] -> latents [B, N, latent_ch]."""
    return model.chal_proj(_hidden_states(model, images)[-1][:, 1:])


def decode(
    model: UniFlow,
    latents: Tensor,
    noise: Tensor,
    steps: int,
    cfg: float = 1.0,
    velocity: Callable[..., Tensor] = flow_head,
) -> Tensor:
    """Latents [B, N, latent_ch] and noise [B, N, C*P*P] -> images [B, C, H, W]."""
    condition = _condition(model, latents)
    rows = sample(model.flow_head.net, noise.flatten(0, 1), condition.flatten(0, 1), steps, cfg, velocity)
    return unpatchify(rows.unflatten(0, noise.shape[:2]), model.config.patch_size)


def reconstruct(model: UniFlow, images: Tensor, noise: Tensor, steps: int) -> Tensor:
    """[B, C, H, W] -> [B, C, H, W]."""
    return decode(model, encode(model, images), noise, steps)


def objective(objective: UniFlowObjective, images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Images [B, C, H, W], t [B, N], noise [B, N, C*P*P] -> the total loss, a scalar."""
    model, patch = objective.student, objective.student.config.patch_size
    states = _hidden_states(model, images)
    condition = _condition(model, model.chal_proj(states[-1][:, 1:]))
    x = interpolate(images, t, patch, noise).to(condition.dtype)
    rows = (x.flatten(0, 1), 1000 * t.flatten(), condition.flatten(0, 1))
    velocity = flow_head(model.flow_head.net, *rows).unflatten(0, noise.shape[:2])
    with torch.no_grad():
        taught = _hidden_states(objective.teacher, images)
    flow = velocity_loss(velocity, images, patch, noise)
    distill = layerwise_distillation([s[:, 1:] for s in states[1:]], [s[:, 1:] for s in taught[1:]], objective.beta)
    return objective.flow_weight * flow + objective.distill_weight * distill


def _hidden_states(model: Any, images: Tensor) -> list[Tensor]:
    embeddings = model.embeddings
    patches = embeddings.patch_embedding(images.to(embeddings.position_embedding.dtype))
    side = patches.shape[-1]
    # interpolated in every call, also to the size it has
    grid = upcast(embeddings.position_embedding[:, 1:]).unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    position = torch.cat([embeddings.position_embedding[:, :1], grid.to(patches.dtype)], dim=1)
    class_token = embeddings.class_embedding.expand(len(images), -1, -1)
    states = [torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1) + position]
    for layer in model.encoder.layers:
        states.append(_encoder_layer(layer, states[-1]))
    return states


def _encoder_layer(layer: Any, x: Tensor) -> Tensor:
    x = x + _attend(layer.attn, layer.norm1(x), attention) * layer.ls1
    return x + layer.mlp(layer.norm2(x)) * layer.ls2


def _condition(model: UniFlow, latents: Tensor) -> Tensor:
    x = model.chal_unproj(latents) + model.global_block_pos_embed.repeat(len(latents), 1, 1)
    for block in model.global_blocks:
        x = _global_block(block, x)
    return x + model.decoder_pos_embed.repeat(len(latents), 1, 1)


def _global_block(block: Any, x: Tensor) -> Tensor:
    x = x + _attend(block.attn, block.norm1(x), F.scaled_dot_product_attention)
    return x + block.mlp(block.norm2(x))


def _attend(layer: Attention, x: Tensor, attention: Callable[..., Tensor]) -> Tensor:
    batch, length, width = x.shape
    q, k, v = layer.qkv(x).reshape(batch, length, 3, layer.heads, width // layer.heads).permute(2, 0, 3, 1, 4)
    return layer.proj(attention(q, k, v).transpose(1, 2).reshape(batch, length, width))
