"""Which path of transformer layers is the fastest: in inference of two, as one ends where the next begins.

And of the MLP in training.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.case import Case, Problem, Work, at, attention_flops, linear_flops, randomised
from uniflow.flow_decoder import ChannelProjection
from uniflow.transformer import MLP, TransformerLayer, kernel_states, last_of
from uniflow_kernels import backend
from uniflow_kernels.modules.flow_layers import affine_of
from uniflow_kernels.ops.mlp import mlp
from uniflow_kernels.ops.transformer_mlp import transformer_mlp

LENGTH = 1025


def build(tokens: int, length: int, width: int, dtype: str) -> Problem:
    """Layers as the base preset has them, heads of 64."""
    precision = getattr(torch, dtype)
    made = (TransformerLayer(width, width // 64, 4 * width, eps=1e-6, layer_scale=1.0) for _ in range(2))
    layers = randomised(nn.ModuleList(made), precision).requires_grad_(False).eval()
    x = torch.randn(tokens // length, length, width, dtype=precision)
    flops = linear_flops(tokens, layers) + 2 * attention_flops(tokens // length, length, width)
    return Problem(
        inputs=(layers, x),
        ours=partial(_on_path, path="rows"),
        plain=_plain,
        tokens=tokens,
        forward=Work.of(flops, layers, x, x),
        libraries={
            **{path: partial(partial, _on_path, path=path) for path in ("products", "small products")},
            "own": lambda: _own,
        },
    )


def _on_path(layers: nn.ModuleList, x: Tensor, path: str) -> Tensor:
    with torch.no_grad(), backend("triton"):
        states = kernel_states(layers, x, path)
        assert states is not None
        return last_of(states, x)


def _own(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """Their own forwards, with a kernel between attention and MLP where there is one."""
    for layer in layers:
        x = layer(x)
    return x


def _plain(layers: nn.ModuleList, x: Tensor) -> Tensor:
    with backend("eager"):
        return _own(layers, x)


def build_mlps(tokens: int, length: int, width: int, latent: int, dtype: str) -> Problem:
    """The two MLPs around the latent, and the position behind them."""
    precision = getattr(torch, dtype)
    made = (ChannelProjection(width, width, latent), ChannelProjection(latent, width, width))
    mlps = randomised(nn.ModuleList(made), precision).requires_grad_(False).eval()
    x = torch.randn(tokens // length, length, width, dtype=precision)
    position = torch.randn(1, length, width, dtype=precision)
    return Problem(
        inputs=(mlps, x, position),
        ours=partial(_by_path, path="products"),
        plain=_as_modules,
        tokens=tokens,
        forward=Work.of(linear_flops(tokens, mlps), mlps, x, x, position),
        libraries={"small products": lambda: partial(_by_path, path="small products")},
    )


def _by_path(mlps: nn.ModuleList, x: Tensor, position: Tensor, path: str) -> Tensor:
    into, out, back, last = (affine_of(layer) for layer in mlps.modules() if isinstance(layer, nn.Linear))
    with torch.no_grad(), backend("triton"):
        return mlp(mlp(x, into, out, path=path), back, last, position=position, path=path)


def _as_modules(mlps: nn.ModuleList, x: Tensor, position: Tensor) -> Tensor:
    first, second = mlps
    with backend("eager"):
        return second(first(x), position)


def build_mlp(tokens: int, width: int, dtype: str) -> Problem:
    """Of a layer of the base preset: x and what fc1 makes are kept, the activation's gradient is in a product."""
    precision = getattr(torch, dtype)
    mlp = randomised(MLP(width, 4 * width, "gelu"), precision)
    x = torch.randn(tokens, width, dtype=precision).requires_grad_()
    flops = linear_flops(tokens, mlp)
    return Problem(
        inputs=(mlp, x),
        ours=partial(_mlp_on_path, path="products"),
        plain=_plain_mlp,
        tokens=tokens,
        forward=Work.of(flops, mlp, x, x),
        backward=Work.of(2 * flops, mlp, mlp, x, x, x, x),
        libraries={"small products": lambda: partial(_mlp_on_path, path="small products")},
    )


def _mlp_on_path(mlp: MLP, x: Tensor, path: str) -> Tensor:
    with backend("triton"):
        return transformer_mlp(x, affine_of(mlp.fc1), affine_of(mlp.fc2), mlp.activation, path)


def _plain_mlp(mlp: MLP, x: Tensor) -> Tensor:
    return mlp.fc2(mlp.act(mlp.fc1(x)))


CASES = (
    Case(
        "layer_paths",
        "Which path of transformer layers is the fastest in inference, by dtype, width and number of rows?",
        build,
        cuda=tuple(
            at(
                tokens=batch * LENGTH,
                length=LENGTH,
                width=width,
                dtype=dtype,
                quick=dtype == "bfloat16" and width == 1024,
                compile=width == 1024 and batch == 32,
            )
            for batch in (1, 8, 32, 128)
            for width, dtype in ((1024, "bfloat16"), (768, "bfloat16"), (1152, "bfloat16"), (1024, "float16"))
        ),
        cpu=(),  # there is but one
        check_at_most={"tokens": 2 * LENGTH},
    ),
    Case(
        "latent_mlps",
        "How fast are the MLPs around the latent in inference, GELU and position in their products?",
        build_mlps,
        cuda=tuple(
            at(
                tokens=batch * 1024,
                length=1024,
                width=1024,
                latent=64,
                dtype="bfloat16",
                quick=True,
                compile=batch == 32,
            )
            for batch in (1, 32)
        ),
        cpu=(),  # no products of ours
        check_at_most={"tokens": 2048},
    ),
    Case(
        "mlp_paths",
        "Is GELU's gradient in a product faster in the MLP of a training layer than beside the library's?",
        build_mlp,
        cuda=tuple(
            at(tokens=batch * LENGTH, width=width, dtype=dtype, quick=width == 1024, compile=batch == 32)
            for batch in (1, 8, 32, 128)
            for width, dtype in ((1024, "bfloat16"), (768, "bfloat16"), (1024, "float16"))
        ),
        cpu=(),  # there is but one
        check_at_most={"tokens": 2 * LENGTH},
    ),
)
