"""Decoding one image: ours against the release's plain form, in one step, and in four with guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.case import (
    Case,
    Form,
    Problem,
    Size,
    Work,
    at,
    attention_flops,
    linear_flops,
    randomised,
    sampling_flops,
)
from uniflow import UniFlow, UniFlowConfig
from uniflow.normalization import IMAGENET_MEAN, IMAGENET_STD


def decode_work(model: UniFlow, noise: Tensor, steps: int, cfg: float) -> Work:
    """Of decoding under noise [B, N, C*P*P]: condition and times are embedded once, the null condition is one row."""
    batch, tokens, _ = noise.shape
    rows, head = batch * tokens, model.flow_head.net
    flops = linear_flops(rows, model.chal_unproj, model.global_blocks) + sampling_flops(head, rows, steps, cfg)
    flops += len(model.global_blocks) * attention_flops(batch, tokens, model.config.vit_hidden_size)
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


def build_decoder(preset: str, batch: int, steps: int, guidance: int, dtype: str) -> Problem:
    """The same with pictures in [0, 1] at the end, ours by a compiled decoder."""
    problem = build(preset, batch, steps, guidance, dtype)
    model = problem.inputs[0]
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    decoder = model.compile_decoder(batch, steps=steps, cfg=float(guidance), dtype=getattr(torch, dtype))

    def ours(model: UniFlow, latents: Tensor, noise: Tensor, steps: int, cfg: float) -> Tensor:
        return decoder(latents, noise=noise)

    def pictures(
        model: UniFlow, latents: Tensor, noise: Tensor, steps: int, cfg: float, velocity: Form = reference.flow_head
    ) -> Tensor:
        images = reference.decode(model, latents, noise, steps, cfg, velocity)
        return (images * std.to(images.dtype) + mean.to(images.dtype)).clamp(0, 1)

    def compiled(compile: Callable[[Form], Form]) -> Form:
        return partial(pictures, velocity=compile(reference.flow_head))

    return replace(problem, ours=ours, plain=pictures, compiled=compiled)


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
    Case(
        "decoder",
        "What does a compiled decoder take from latents to pictures?",
        build_decoder,
        cuda=(
            at(preset="base", batch=32, steps=1, guidance=1, dtype="bfloat16", quick=True, compile=True),
            at(preset="base", batch=1, steps=4, guidance=2, dtype="bfloat16", quick=True),
        ),
        cpu=(at(preset="tiny", batch=4, steps=1, guidance=1, dtype="float32", quick=True, compile=True),),
        check_at_most={"batch": 2},
    ),
)
