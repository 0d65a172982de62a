"""The flow head, with a time and a condition for every token."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import reference
from benchmarks.case import Case, Form, Problem, Size, Work, at, linear_flops, randomised
from uniflow_kernels import FlowHead, backend, fused_flow_blocks
from uniflow_kernels.ops.flow_blocks import FromLayers, Given, flow_blocks


def build(tokens: int, width: int, depth: int, row: int, dtype: str) -> Problem:
    precision = getattr(torch, dtype)
    head = randomised(FlowHead(row, width, row, width, depth), precision)
    x = torch.randn(tokens, row, dtype=precision)
    t = 1000 * torch.rand(tokens)
    c = torch.randn(tokens, width, dtype=precision).requires_grad_()
    flops = linear_flops(tokens, head)
    # neither x nor t wants a gradient
    no_gradient = linear_flops(tokens, head.input_proj, head.time_embed.mlp[0])
    return Problem(
        inputs=(head, x, t, c),
        ours=FlowHead.__call__,
        plain=reference.flow_head,
        tokens=tokens,
        forward=Work.of(flops, head, x, t, c, x),
        backward=Work.of(2 * flops - no_gradient, head, x, t, c, x, head, c),
        libraries={"Liger LayerNorm": _with_liger},
    )


def _with_liger() -> Form:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def norm(layer: Any, x: torch.Tensor) -> torch.Tensor:
        return LigerLayerNormFunction.apply(x, layer.weight, layer.bias, layer.eps)

    return partial(reference.flow_head, norm=norm)


def _on_cuda(tokens: int, width: int) -> Size:
    quick = width == 1024 and tokens <= 32768
    return at(
        tokens=tokens, width=width, depth=12, row=588, dtype="bfloat16", quick=quick, compile=quick and tokens == 32768
    )


# the heads of other projects, by what they differ in
VARIANTS: dict[str, dict[str, Any]] = {
    "canonical": {},
    "VibeVoice": {"norm": "rms", "eps": 1e-5, "mlp": "swiglu", "bias": False},
    "SphereAR": {"mlp": "swiglu", "modulation_order": "scale-shift-gate", "modulation_groups": 2},
}


def build_variant(tokens: int, width: int, depth: int, variant: str, recompute: str, dtype: str) -> Problem:
    precision = getattr(torch, dtype)
    head = randomised(FlowHead(width, width, width, width, depth, **VARIANTS[variant], recompute=recompute), precision)
    x = torch.randn(tokens, width, dtype=precision)
    t = 1000 * torch.rand(tokens)
    c = torch.randn(tokens, width, dtype=precision).requires_grad_()
    flops = linear_flops(tokens, head)
    no_gradient = linear_flops(tokens, head.input_proj, head.time_embed.mlp[0])
    return Problem(
        inputs=(head, x, t, c),
        ours=FlowHead.__call__,
        plain=_definition,
        tokens=tokens,
        forward=Work.of(flops, head, x, t, c, x),
        backward=Work.of(2 * flops - no_gradient, head, x, t, c, x, head, c),
    )


def _definition(head: FlowHead, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The head by its plain definition, whatever the backend."""
    a = F.silu(head.time_embed(t) + head.cond_embed(c))
    blocks, modulations, last = head.tensors()
    x = flow_blocks(head.input_proj(x), blocks, FromLayers(a, modulations, last), head.form)
    return head.final_layer.linear(x)


def _variant_on_cuda(variant: str, recompute: str) -> Size:
    return at(tokens=32768, width=1024, depth=12, variant=variant, recompute=recompute, dtype="bfloat16")


def build_paths(tokens: int, width: int, depth: int, dtype: str) -> Problem:
    """Behind the embeddings, each form held to its path."""
    precision = getattr(torch, dtype)
    head = randomised(FlowHead(16, width, 16, 16, depth), precision)
    x = torch.randn(tokens, 16, dtype=precision)
    y = torch.randn(tokens, width, dtype=precision).requires_grad_()
    embeddings = (head.time_embed.requires_grad_(False), head.cond_embed.requires_grad_(False))
    flops = linear_flops(tokens, head) - linear_flops(tokens, *embeddings)
    return Problem(
        inputs=(head, x, y),
        ours=partial(_on_path, path="rows"),
        plain=_plain,
        tokens=tokens,
        forward=Work.of(flops, head, x, y, x),
        backward=Work.of(2 * flops - linear_flops(tokens, head.input_proj), head, x, y, x, head, y),
        libraries={path: partial(partial, _on_path, path=path) for path in ("products", "small products")},
    )


def _on_path(head: FlowHead, x: torch.Tensor, y: torch.Tensor, path: str) -> torch.Tensor:
    with backend("triton"):
        x = fused_flow_blocks(head.input_proj(x), y, *head.tensors(), **head.form._asdict(), path=path)
        return head.final_layer.linear(x)


def _plain(head: FlowHead, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with backend("eager"):
        return head.from_embedding(x, y)


def build_fp8(tokens: int, width: int, depth: int, row: int, dtype: str) -> Problem:
    """In inference, with its modulations in fp8; the plain form has the same quantized numbers."""
    precision = getattr(torch, dtype)
    head = randomised(FlowHead(row, width, row, width, depth), precision).requires_grad_(False)
    x, c = (torch.randn(tokens, columns, dtype=precision) for columns in (row, width))
    t = 1000 * torch.rand(tokens)
    return Problem(
        inputs=(head, x, t, c),
        ours=_in_fp8,
        plain=_quantized,
        tokens=tokens,
        forward=Work.of(linear_flops(tokens, head), head, x, t, c, x),
    )


def _in_fp8(head: FlowHead, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    y = head.time_embed(t) + head.cond_embed(c)
    return head.from_embedding(x, y, head.quantized("fp8"))


def _quantized(head: FlowHead, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The head by its definition, with the modulations' factors rounded to 8-bit floats, and they to bfloat16."""
    a = reference.rounded(F.silu(head.time_embed(t) + head.cond_embed(c)))
    blocks, modulations, last = head.tensors()
    made = []
    for layer in (*modulations, last):
        assert layer is not None
        assert layer.bias is not None
        made.append((F.linear(a, reference.rounded(layer.weight)) + layer.bias.bfloat16()).bfloat16().to(x.dtype))
    return head.final_layer.linear(flow_blocks(head.input_proj(x), blocks, Given(made[:-1], made[-1]), head.form))


def _path_on_cuda(tokens: int, width: int, dtype: str) -> Size:
    quick = dtype == "bfloat16" and width == 1024 and tokens in (512, 4096, 32768)
    return at(tokens=tokens, width=width, depth=12, dtype=dtype, quick=quick)


def build_last(tokens: int, width: int, row: int, dtype: str) -> Problem:
    """The head's last product, to rows as long as patches have them, and to rows of a multiple of 16 bytes."""
    precision = getattr(torch, dtype)
    layer = randomised(torch.nn.Linear(width, row), precision)
    x = torch.randn(tokens, width, dtype=precision).requires_grad_()
    out = torch.empty(tokens, row, dtype=precision)
    flops = linear_flops(tokens, layer)
    return Problem(
        inputs=(layer, x),
        ours=torch.nn.Linear.__call__,
        plain=torch.nn.Linear.__call__,
        tokens=tokens,
        forward=Work.of(flops, layer, x, out),
        backward=Work.of(2 * flops, layer, x, out, layer, x),
        libraries={"padded": lambda: _padded},
    )


def _padded(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Of a weight with rows of zeros behind, and a view of the result: what a loss that knows of it would read."""
    row = layer.out_features
    more = -row % (16 // x.element_size())
    return F.linear(x, F.pad(layer.weight, (0, 0, 0, more)), F.pad(layer.bias, (0, more)))[:, :row]


PATHS_AT = (
    *product((64, 512, 4096, 32768, 131072), (768, 1024, 1280, 1536), ("bfloat16",)),
    *product((64, 512, 4096, 32768, 131072), (1024,), ("float16", "float32")),
)

CASES = (
    Case(
        "flow_head",
        "What does the flow head cost, forward and backward, by number of tokens and by width?",
        build,
        cuda=tuple(_on_cuda(*size) for size in product((8192, 32768, 131072), (768, 1024, 1280, 1536))),
        cpu=(
            at(tokens=64, width=128, depth=3, row=48, dtype="float32", quick=True),
            at(tokens=256, width=128, depth=3, row=48, dtype="float32", quick=True),
            at(tokens=1024, width=128, depth=3, row=48, dtype="float32", quick=True, compile=True),
        ),
        check_at_most={"tokens": 4096},
    ),
    Case(
        "flow_head_variants",
        "What do the heads of other projects cost, and recomputing instead of keeping?",
        build_variant,
        cuda=(
            *(_variant_on_cuda(variant, "none") for variant in VARIANTS),
            _variant_on_cuda("canonical", "block"),
        ),
        cpu=tuple(
            at(tokens=64, width=64, depth=4, variant=variant, recompute="none", dtype="float32", quick=True)
            for variant in VARIANTS
        ),
        check_at_most={"tokens": 4096},
    ),
    Case(
        "flow_head_paths",
        "Which path of the flow head is the fastest, by dtype, width and number of rows?",
        build_paths,
        cuda=tuple(_path_on_cuda(*size) for size in PATHS_AT),
        cpu=(),  # there is but one
        check_at_most={"tokens": 4096},
    ),
    Case(
        "flow_head_fp8",
        "What does the flow head cost in inference with its modulations in 8-bit floats?",
        build_fp8,
        cuda=tuple(
            at(tokens=tokens, width=1024, depth=12, row=588, dtype="bfloat16", quick=tokens == 32768, compile=False)
            for tokens in (1024, 8192, 32768, 131072)
        ),
        cpu=(at(tokens=64, width=128, depth=3, row=48, dtype="float32", quick=True),),
        check_at_most={"tokens": 4096},
    ),
    Case(
        "flow_head_last_product",
        "Is the head's last product faster with rows of a multiple of 16 bytes?",
        build_last,
        cuda=tuple(
            at(tokens=tokens, width=1024, row=588, dtype="bfloat16", quick=tokens == 32768)
            for tokens in (4096, 32768, 131072)
        ),
        cpu=(),  # there it is the same
        check_at_most={"tokens": 4096},
    ),
)
