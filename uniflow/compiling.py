"""A UniFlow prepared for the device that it is on, with a line for each part of what was done and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uniflow.explanation import printed
from uniflow.huggingface import HuggingFaceLayer
from uniflow.model import UniFlow
from uniflow_kernels import patch
from uniflow_kernels.diagnosis import OpReport
from uniflow_kernels.graphs import why_not_graph
from uniflow_kernels.ops.flow_choice import UNMEASURED
from uniflow_kernels.ops.transformer_layers import explain_layers
from uniflow_kernels.triton_kernels import why_not_launched

Size = tuple[int, int]

_ON_A_CPU = "it was no faster on a CPU where that was measured (docs/model.md)"


def compile(
    model: UniFlow,
    batch: int = 8,
    size: Size | None = None,
    precision: str | None = None,
    **decoding: Any,
) -> CompiledUniFlow:
    """Prepare a model for inference on its device: kernels, CUDA graphs, and torch.compile for what lies between.

    Args:
        model: in evaluation mode or not; it stays as it is, and its parameters are read where they are.
        batch: of pictures at a time; others are taken too.
        size: (H, W) of the pictures in pixels; the trained size if not given.
        precision: "fp8" for products of 8-bit floats, which is never taken unasked, see `UniFlow.at_precision`.
        decoding: further arguments of `UniFlow.compile_decoder`: steps, schedule, cfg, dtype and so on.

    Returns:
        What encodes, decodes and reconstructs; its `report` says what each part runs on, and why.

    Raises:
        TypeError: if the model is no UniFlow; as `UniFlow.compile_decoder`.
        ValueError: as `UniFlow.compile_encoder` and `UniFlow.compile_decoder`; for a model on another device than a GPU
            or a CPU.
    """
    if not isinstance(model, UniFlow):
        raise TypeError(f"model: expected a UniFlow, got {type(model).__name__}")
    if model.device.type not in ("cuda", "cpu"):
        raise ValueError(f"model: expected one on CUDA or on a CPU, got one on {model.device.type}")
    return CompiledUniFlow(model, batch, size, precision, **decoding)


class CompiledUniFlow:
    """A UniFlow prepared for its device; `uniflow.compile` makes it.

    A copy, or one that was pickled, has a copy of the model, and is prepared anew.

    Attributes:
        model: what runs: modules of its own, on the parameters of the model that was given, with the same state_dict.
        encode: images [B, C, H, W] to latents, see `uniflow.encoding.ImageEncoder`.
        decode: latents to pictures, see `uniflow.sampler.Decoder`.
        report: what each part runs on, and why not on something faster; `str()` has a line for each.
    """

    def __init__(self, model: UniFlow, batch: int, size: Size | None, precision: str | None, **decoding: Any) -> None:
        self._made_of = model, batch, size, precision, decoding
        self.model = model.on_same_parameters().eval()
        if precision is not None:
            self.model = self.model.at_precision(precision)
        for layer in self.model.layers():
            if isinstance(layer, HuggingFaceLayer):
                patch(layer)
        reason = why_not_compiled(self.model)
        if reason is None:
            for layer in self.model.layers():
                layer.compile()
        self.encode = self.model.compile_encoder(batch, size)
        self.decode = self.model.compile_decoder(batch, size, **decoding)
        self.report = [_layers(reason), *self.model.parts(), _launches(model.device)]

    def __call__(self, images: Tensor, **start: Any) -> Tensor:
        """Images [B, C, H, W], normalised, to pictures of their reconstructions; `start` as `decode` takes it."""
        return self.decode(self.encode(images), size=(images.shape[-2], images.shape[-1]), **start)

    def __str__(self) -> str:
        return printed(self.report)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, self._made_of


def _again(model: UniFlow, batch: int, size: Size | None, precision: str | None, decoding: Any) -> CompiledUniFlow:
    return CompiledUniFlow(model, batch, size, precision, **decoding)


def why_not_compiled(model: UniFlow) -> str | None:
    """Why the layers are not put through torch.compile; None if they are."""
    if model.device.type == "cpu":
        return _ON_A_CPU
    if (reason := why_not_launched()) is not None:
        return reason
    runs, why = explain_layers(model.device, model.dtype, model.config.hidden_size)
    if model.precision is None and why.startswith("measured"):
        return f"kernels were {why}: {runs}"
    return None


def _layers(reason: str | None) -> OpReport:
    if reason is None:
        why = f"what lies between their products becomes a kernel or two; {UNMEASURED}"
        return OpReport("layers", "torch.compile, one graph for layers that are alike", why)
    return OpReport("layers", "as they are", f"torch.compile: {reason}")


def _launches(device: torch.device) -> OpReport:
    if (reason := why_not_graph(device, ())) is not None:
        return OpReport("launches", "one by one", f"CUDA graphs: {reason}")
    return OpReport("launches", "a CUDA graph to encode and one to decode, of each kind of batch", UNMEASURED)
