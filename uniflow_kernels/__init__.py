"""Fused operations and drop-in modules of UniFlow, a visual tokenizer that both understands and generates."""

from uniflow_kernels.doctor import doctor
from uniflow_kernels.modules.flow_head import FlowHead
from uniflow_kernels.ops.attention import attention
from uniflow_kernels.ops.distillation import layerwise_distillation
from uniflow_kernels.ops.patches import patchify, unpatchify
from uniflow_kernels.ops.velocity import interpolate, velocity_loss

__version__ = "0.1.0.dev0"
__all__ = [
    "FlowHead",
    "attention",
    "doctor",
    "interpolate",
    "layerwise_distillation",
    "patchify",
    "unpatchify",
    "velocity_loss",
]
