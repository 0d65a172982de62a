"""Decoding one image: ours against the release's plain form, in one step, and in four with guidance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.case import Case, Form, Problem, Size, Work, at, attention_flops, linear_flops, randomised
from uniflow import UniFlow, UniFlowConfig


def decode_work(model: UniFlow, noise: Tensor, steps: int, cfg: float) -> Work:
    """Of decoding under noise [B, N, C*P*P]: condition and times are embedded once, the null condition is one row."""
    batch, tokens, _ = noise.shape
    rows, head = batch * tokens, model.flow_head.net
    flops = linear_flops(rows, model.chal_unproj, model.global_blocks, head.cond_embed)
    flops += len(model.global_blocks) * attention_flops(batch, tokens, model.config.vit_hidden_size)
    flops += steps * linear_flops(1, head.time_embed)
    flops += steps * linear_flops(rows, head.input_proj, head.res_blocks, head.final_layer)
    if cfg != 1.0:
        modulations = [layer for name, layer in head.named_modules() if name.endswith("adaLN_modulation")]
        flops += steps * linear_flops(rows, head.res_blocks, head.final_layer)
        flops -= steps * linear_flops(rows - 1, *modulations)
    latents = torch.empty(rows, model.config.latent_ch, dtype=noise.dtype)
    parameters = (model.chal_unproj, model.global_block_pos_embed, model.global_blocks, model.decoder_pos_embed, head)
    return Work.of(flops, parameters, latents, noise, noise)


def build(preset: str, batch: int, steps: int, guidance: int, dtype: str) -> Problem:
    precision = getattr(torch, dtype)
    model = randomised(UniFlow(UniFlowConfig.preset(preset)), precision).eval().requires_grad_(False)
    config = model.config
    latents = torch.randn(batch, config.tokens, config.latent_ch, dtype=precision)
    noise = torch.randn(batch, config.tokens, config.num_channels * config.patch_size**2, dtype=precision)

    def ours(model: UniFlow, latents: Tensor, noise: Tensor, steps: int, cfg: float) -> Tensor:
        return model.decode(latents, steps=steps, cfg=cfg, noise=noise)

    def compiled(compile: Callable[[Form], Form]) -> Form:
        return partial(reference.decode, velocity=compile(reference.flow_head))

    return Problem(
        inputs=(model, latents, noise, steps, float(guidance)),
        ours=ours,
        plain=reference.decode,
        tokens=batch * config.tokens,
        forward=decode_work(model, noise, steps, float(guidance)),
        compiled=compiled,
    )


def _base(dtype: str, quick: bool) -> tuple[Size, Size]:
    return (
        at(preset="base", batch=1, steps=1, guidance=1, dtype=dtype, quick=quick, compile=quick),
        at(preset="base", batch=1, steps=4, guidance=2, dtype=dtype, quick=quick),
    )


CASES = (
    Case(
        "decode",
        "What does decoding one image cost, in one step, and in four with guidance?",
        build,
        cuda=(*_base("bfloat16", quick=True), *_base("float32", quick=False)),
        cpu=(
            at(preset="tiny", batch=1, steps=1, guidance=1, dtype="float32", quick=True, compile=True),
            at(preset="tiny", batch=1, steps=4, guidance=2, dtype="float32", quick=True),
            *_base("bfloat16", quick=False),
            *_base("float32", quick=False),
        ),
    ),
)
