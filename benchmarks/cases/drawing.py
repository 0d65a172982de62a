"""Drawing a picture token by token: a transformer's step, then all steps of the head for a handful of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.case import Case, Problem, Size, Work, at, linear_flops, randomised
from uniflow.unifluid.config import UniFluidConfig
from uniflow.unifluid.drawing import draw_tokens
from uniflow.unifluid.model import UniFluid
from uniflow.unifluid.orders import draw_orders, group_sizes
from uniflow.unifluid.steps import Steps
from uniflow.unifluid.texts import make_text_tokenizer

_CFG = 2.0
_HEAD_STEPS = 20
_TEXT = 8  # ids of the caption


def ours(model: UniFluid, ids: Tensor, real: Tensor, order: Tensor, steps: int) -> Tensor:
    """Ids and real [1, T], order [1, N] -> tokens [1, N, C]."""
    return draw_tokens(model, ids, real, steps, head_steps=_HEAD_STEPS, cfg=_CFG, order=order, generator=_seeded(ids))


def plain(model: UniFluid, ids: Tensor, real: Tensor, order: Tensor, steps: int) -> Tensor:
    """The same steps of the transformer, cache and all; under each the head as the loop of modules that MAR has."""
    generator, first = _seeded(ids), 0
    alone = torch.zeros_like(real)
    alone[:, -1:] = True
    bos = torch.full_like(ids, model.text_tokenizer.bos_token_id)
    ids, real, both = torch.cat([ids, bos]), torch.cat([real, alone]), order.repeat(2, 1)
    text, begin = ids.shape[1], real.sum(1, keepdim=True)
    sizes = group_sizes(model.config.tokens, steps)
    transformer = Steps(model, 2, text + model.config.tokens, max(sizes))
    slots, tokens = model.text_slots(ids, real), []
    for step, size in enumerate(sizes):
        places = both[:, first : first + size]
        group = torch.full_like(places, step)
        states = transformer(slots, model.query_slots(places, group, begin, text))
        noise = torch.randn(size, model.config.token_channels, device=ids.device, generator=generator)
        new = reference.sample(model.head, noise.to(states.dtype), states[0], _HEAD_STEPS, _CFG, null=states[1])
        tokens.append(new)
        slots = model.content_slots(new.expand(2, -1, -1), places, group, begin, text)
        first += size
    transformer.end()
    drawn = torch.cat(tokens).unsqueeze(0)
    return torch.empty_like(drawn).scatter_(1, order.unsqueeze(-1).expand_as(drawn), drawn)


def _seeded(like: Tensor) -> torch.Generator:
    return torch.Generator(like.device).manual_seed(0)


def drawing_work(model: UniFluid, ids: Tensor, steps: int) -> Work:
    """Both branches of guidance: text and content once through the transformer, queries too, and the head's steps."""
    tokens, head = model.config.tokens, model.head
    slots = 2 * (ids.shape[1] + 2 * tokens)
    flops = linear_flops(slots, model.backbone.base_model.layers) + 2 * linear_flops(2 * tokens, head.cond_embed)
    flops += _HEAD_STEPS * 2 * linear_flops(tokens, head.input_proj, head.res_blocks, head.final_layer)
    return Work.of(flops, model, ids)


def build(
    width: int, depth: int, head_width: int, head_depth: int, channels: int, side: int, steps: int, dtype: str
) -> Problem:
    backbone = {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }
    config = UniFluidConfig(backbone, channels, (side, side), head_width, head_depth)
    model = UniFluid(config, make_text_tokenizer(["a seven"], 512))
    randomised(model.head, torch.float32)
    model = model.to(getattr(torch, dtype)).eval().requires_grad_(False)
    ids = torch.randint(3, 512, (1, _TEXT))
    order = draw_orders(1, side * side, "random", ids.device)
    return Problem(
        inputs=(model, ids, torch.ones_like(ids, dtype=torch.bool), order, steps),
        ours=ours,
        plain=plain,
        tokens=side * side,
        forward=drawing_work(model, ids, steps),
    )


def _cuda(side: int, steps: int, quick: bool) -> Size:
    return at(
        width=768, depth=12, head_width=1024, head_depth=6, channels=16, side=side, steps=steps, dtype="bfloat16",
        quick=quick,
    )  # fmt: skip


CASES = (
    Case(
        "drawing",
        "What does one picture cost an autoregressive model, its tokens drawn with guidance and 20 steps of the head?",
        build,
        cuda=(_cuda(16, 64, True), _cuda(16, 256, False)),
        cpu=(
            at(
                width=128,
                depth=4,
                head_width=128,
                head_depth=3,
                channels=8,
                side=4,
                steps=16,
                dtype="float32",
                quick=True,
            ),
            at(width=512, depth=6, head_width=512, head_depth=6, channels=16, side=8, steps=16, dtype="float32"),
        ),
    ),
)
