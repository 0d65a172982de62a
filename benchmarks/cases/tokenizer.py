"""The whole tokenizer by batch size: encode, reconstruct, and the training objective with its gradients."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import reference
from benchmarks.case import Case, Problem, Work, at, attention_flops, linear_flops, randomised
from benchmarks.cases.decode import decode_work
from uniflow import UniFlow, UniFlowConfig, UniFlowObjective
from uniflow_kernels.modules.fp8_linear import Fp8Linear


def _model(preset: str, dtype: str) -> UniFlow:
    return randomised(UniFlow(UniFlowConfig.preset(preset)), getattr(torch, dtype)).eval()


def _images(model: UniFlow, batch: int) -> Tensor:
    config = model.config
    return torch.randn(batch, config.num_channels, config.image_size, config.image_size, dtype=model.dtype)


def _noise(model: UniFlow, batch: int) -> Tensor:
    config = model.config
    return torch.randn(batch, config.tokens, config.num_channels * config.patch_size**2, dtype=model.dtype)


def _encoder_flops(model: UniFlow, batch: int) -> int:
    config = model.config
    attention = attention_flops(batch, 1 + config.tokens, config.hidden_size)
    return (
        linear_flops(batch * config.tokens, model.embeddings)
        + linear_flops(batch * (1 + config.tokens), model.encoder)
        + config.num_hidden_layers * attention
    )


def build_encode(preset: str, batch: int, dtype: str) -> Problem:
    model = _model(preset, dtype).requires_grad_(False)
    images = _images(model, batch)
    rows = batch * model.config.tokens
    latents = torch.empty(rows, model.config.latent_ch, dtype=model.dtype)
    flops = _encoder_flops(model, batch) + linear_flops(rows, model.chal_proj)
    return Problem(
        inputs=(model, images),
        ours=UniFlow.encode,
        plain=reference.encode,
        tokens=rows,
        forward=Work.of(flops, model.embeddings, model.encoder, model.chal_proj, images, latents),
    )


def build_reconstruct(preset: str, batch: int, steps: int, dtype: str) -> Problem:
    model = _model(preset, dtype).requires_grad_(False)
    images, noise = _images(model, batch), _noise(model, batch)
    rows = batch * model.config.tokens
    flops = (
        _encoder_flops(model, batch) + linear_flops(rows, model.chal_proj) + decode_work(model, noise, steps, 1.0).flops
    )
    return Problem(
        inputs=(model, images, noise, steps),
        ours=lambda model, images, noise, steps: model(images, noise=noise, steps=steps),
        plain=reference.reconstruct,
        tokens=rows,
        forward=Work.of(flops, model, images, noise, images),
    )


def build_objective(preset: str, batch: int, dtype: str) -> Problem:
    model = _model(preset, dtype)
    objective = UniFlowObjective(model)
    # a student still equal to its teacher would leave the distillation nothing to do
    randomised(model, model.dtype)
    images, noise = _images(model, batch).float(), _noise(model, batch).float()
    t = torch.rand(noise.shape[:2])
    rows = t.numel()
    encoder = _encoder_flops(model, batch)
    student = encoder + linear_flops(rows, model.chal_proj) + decode_work(model, noise, 1, 1.0).flops
    return Problem(
        inputs=(objective, images, t, noise),
        ours=lambda objective, images, t, noise: objective(images, t, noise).total,
        plain=reference.objective,
        tokens=rows,
        forward=Work.of(student + encoder, objective, images, t, noise),
        # two products for each of the student's; its embeddings of pixels and of times want no gradient
        backward=Work.of(
            2 * student
            - linear_flops(rows, model.embeddings, model.flow_head.net.input_proj)
            - linear_flops(1, model.flow_head.net.time_embed.mlp[0]),
            model,
            model,
        ),
    )


class _Rounded(nn.Linear):
    """What `Fp8Linear` computes by its definition: the product of the factors rounded to 8-bit floats."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.bfloat16().to(x.dtype)
        return F.linear(reference.rounded(x), reference.rounded(self.weight), bias).bfloat16().to(x.dtype)


def build_encode_fp8(preset: str, batch: int, dtype: str) -> Problem:
    """In fp8; the plain form has the same quantized numbers."""
    problem = build_encode(preset, batch, dtype)
    model, images = problem.inputs
    lowered = model.at_precision("fp8")
    defined = copy.deepcopy(lowered, {id(parameter): parameter for parameter in lowered.parameters()})
    for module in defined.modules():
        if type(module) is Fp8Linear:
            module.__class__ = _Rounded  # type: ignore[assignment]
    return replace(
        problem,
        inputs=(lowered, defined, images),
        ours=lambda lowered, defined, images: lowered.encode(images),
        plain=lambda lowered, defined, images: defined.encode(images),
    )


def build_encoder(preset: str, batch: int, dtype: str) -> Problem:
    """The same by a compiled encoder."""
    problem = build_encode(preset, batch, dtype)
    encoder = problem.inputs[0].compile_encoder(batch)
    return replace(problem, ours=lambda model, images: encoder(images))


CASES = (
    Case(
        "encode_fp8",
        "What does encoding cost in fp8, by batch size? `encode` has the same in full precision.",
        build_encode_fp8,
        cuda=(
            at(preset="base", batch=1, dtype="bfloat16"),
            at(preset="base", batch=8, dtype="bfloat16"),
            at(preset="base", batch=32, dtype="bfloat16", quick=True, compile=True),
        ),
        cpu=(at(preset="tiny", batch=1, dtype="float32", quick=True),),
        check_at_most={"batch": 1},
    ),
    Case(
        "encoder",
        "What does a compiled encoder take from images to latents?",
        build_encoder,
        cuda=(
            at(preset="base", batch=1, dtype="bfloat16", quick=True),
            at(preset="base", batch=2, dtype="bfloat16"),
        ),
        cpu=(at(preset="tiny", batch=1, dtype="float32", quick=True),),
    ),
    Case(
        "encode",
        "What does encoding cost, by batch size?",
        build_encode,
        cuda=(
            at(preset="base", batch=1, dtype="bfloat16", quick=True),
            at(preset="base", batch=8, dtype="bfloat16"),
            at(preset="base", batch=32, dtype="bfloat16", quick=True, compile=True),
            at(preset="base", batch=128, dtype="bfloat16"),
        ),
        cpu=(
            at(preset="tiny", batch=1, dtype="float32", quick=True),
            at(preset="tiny", batch=8, dtype="float32", quick=True, compile=True),
        ),
        check_at_most={"batch": 1},
    ),
    Case(
        "reconstruct",
        "What does encoding and decoding cost, in one step and in four?",
        build_reconstruct,
        cuda=(
            at(preset="base", batch=1, steps=1, dtype="bfloat16"),
            at(preset="base", batch=1, steps=4, dtype="bfloat16"),
            at(preset="base", batch=8, steps=1, dtype="bfloat16"),
            at(preset="base", batch=128, steps=1, dtype="bfloat16"),
            at(preset="base", batch=32, steps=1, dtype="bfloat16", quick=True, compile=True),
            at(preset="base", batch=32, steps=4, dtype="bfloat16", quick=True),
        ),
        cpu=(
            at(preset="tiny", batch=8, steps=1, dtype="float32", quick=True),
            at(preset="tiny", batch=8, steps=4, dtype="float32", quick=True),
        ),
        check_at_most={"batch": 1},
    ),
    Case(
        "train_step",
        "What do the training objective and its gradients cost, by batch size?",
        build_objective,
        cuda=(
            at(preset="base", batch=1, dtype="bfloat16"),
            at(preset="base", batch=8, dtype="bfloat16", quick=True, compile=True),
            at(preset="base", batch=32, dtype="bfloat16"),
            # of whose layers 142 GB are kept, by count: where there is less it is noted as failed
            at(preset="base", batch=128, dtype="bfloat16"),
        ),
        cpu=(
            at(preset="tiny", batch=1, dtype="float32", quick=True),
            at(preset="tiny", batch=8, dtype="float32", quick=True),
        ),
        check_at_most={"batch": 1},
    ),
)
