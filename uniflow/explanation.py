"""What the parts of a UniFlow run on, and why not on something faster."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from uniflow.encoder import Embeddings
from uniflow.transformer import TransformerLayer
from uniflow_kernels.diagnosis import OpReport
from uniflow_kernels.dropin.encoder_layers import EncoderLayer
from uniflow_kernels.dropin.patching import recognised_as
from uniflow_kernels.modules.flow_head import FlowHead
from uniflow_kernels.modules.fp8_linear import Fp8Linear
from uniflow_kernels.ops.attention import explain_attention
from uniflow_kernels.ops.flow_choice import RUNS, UNMEASURED
from uniflow_kernels.ops.fp8_linear import explain_fp8
from uniflow_kernels.ops.patch_embedding import explain_patch_embedding
from uniflow_kernels.ops.transformer_layers import OP as LAYERS
from uniflow_kernels.ops.transformer_layers import explain_layers
from uniflow_kernels.torch_private import is_compiled
from uniflow_kernels.triton_kernels import why_not_on


def explained(
    embeddings: nn.Module, layers: Sequence[nn.Module], head: FlowHead, device: torch.device, dtype: torch.dtype
) -> list[OpReport]:
    """A line for each part.

    Args:
        embeddings: of the encoder.
        layers: of the encoder and the global blocks.
        head: of the flow decoder.
        device, dtype: of the parameters.
    """
    own = [layer for layer in layers if isinstance(layer, TransformerLayer)]
    parts = [_products(layers, device, dtype)]
    if isinstance(embeddings, Embeddings):
        parts.insert(0, OpReport("patch_embedding", *explain_patch_embedding(device, dtype)))
    if own:
        parts += [_attention(own, device, dtype), _fused(own, device, dtype), _norms(device, dtype)]
    if len(own) < len(layers):
        parts.append(_others([layer for layer in layers if layer not in own], device, dtype))
    name, _, text = head.explain().partition(": ")
    runs, _, why = text.partition("; ")
    return [*parts, OpReport(name, runs, why)]


def printed(parts: Sequence[OpReport]) -> str:
    """A line each."""
    return "\n".join(f"{part.op:19} {part.runs}" + (f"; {part.why}" if part.why else "") for part in parts)


def _others(layers: Sequence[nn.Module], device: torch.device, dtype: torch.dtype) -> OpReport:
    """Those of the transformers package."""
    found = [recognised_as(part) for layer in layers for part in layer.modules()]
    recognised = [each for each in found if isinstance(each, EncoderLayer)]
    if not recognised:
        why = "what kernels can serve of them, uniflow_kernels.patch(model) says, and uniflow.compile(model) takes"
        return OpReport("other layers", f"{len(layers)} as the transformers package has them", why)
    runs, why = explain_layers(device, dtype, recognised[0].width)
    return OpReport("other layers", f"{len(recognised)} of {len(layers)} recognised: {runs}", why)


def _products(layers: Sequence[nn.Module], device: torch.device, dtype: torch.dtype) -> OpReport:
    linear = [part for layer in layers for part in layer.modules() if isinstance(part, nn.Linear)]
    lowered = sum(type(part) is Fp8Linear for part in linear)
    plain = f"{str(dtype).removeprefix('torch.')}, by torch"
    if not lowered:
        return OpReport("products", plain, "fp8 is taken on request")
    runs, why = explain_fp8(device, 0)
    return OpReport("products", f"{lowered} of {len(linear)} linear layers in fp8: {runs}; the others: {plain}", why)


def _attention(layers: Sequence[TransformerLayer], device: torch.device, dtype: torch.dtype) -> OpReport:
    """As the first of them has it."""
    layer = layers[0].attn
    return OpReport(
        "attention",
        *explain_attention(device, dtype, layer.proj.in_features // layer.heads, layer.allow_flash_attn),
    )


def _fused(layers: Sequence[TransformerLayer], device: torch.device, dtype: torch.dtype) -> OpReport:
    if any(type(part) is Fp8Linear for layer in layers for part in layer.modules()):
        return OpReport(LAYERS, RUNS["eager"], "products in fp8 are called one by one")
    if any(map(is_compiled, layers)):
        return OpReport(LAYERS, RUNS["eager"], "torch.compile fuses what they do")
    return OpReport(LAYERS, *explain_layers(device, dtype, layers[0].attn.proj.in_features))


def _norms(device: torch.device, dtype: torch.dtype) -> OpReport:
    if (reason := why_not_on(device, dtype)) is not None:
        return OpReport("residual_norm", RUNS["eager"], f"Triton: {reason}")
    return OpReport("residual_norm", "Triton, where the layers are not compiled", UNMEASURED)
