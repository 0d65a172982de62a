"""Fused operations and drop-in modules of UniFlow, a visual tokenizer that both understands and generates."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uniflow_kernels.choice import backend
    from uniflow_kernels.diagnosis import doctor
    from uniflow_kernels.dropin.patching import PatchReport, patch, patched, unpatch
    from uniflow_kernels.dropin.verification import VerifyReport, verify
    from uniflow_kernels.modules.few_steps import mean_flow_loss, self_distillation_loss
    from uniflow_kernels.modules.flow_head import FlowHead
    from uniflow_kernels.modules.flow_matching import flow_matching_loss
    from uniflow_kernels.ops.attention import attention
    from uniflow_kernels.ops.compared_norm import compared_residual_norm
    from uniflow_kernels.ops.distillation import LayerwiseDistillation, layerwise_distillation
    from uniflow_kernels.ops.flow_head import fused_flow_blocks
    from uniflow_kernels.ops.fp8_linear import fp8_linear
    from uniflow_kernels.ops.images import to_images
    from uniflow_kernels.ops.modulated_norm import gated_residual_norm, modulated_norm, residual_norm
    from uniflow_kernels.ops.noise import noise_seed, seeded_noise
    from uniflow_kernels.ops.patches import patchify, unpatchify
    from uniflow_kernels.ops.velocity import interpolate, velocity_loss

__version__ = "0.1.0"
__all__ = [
    "FlowHead",
    "LayerwiseDistillation",
    "PatchReport",
    "VerifyReport",
    "attention",
    "backend",
    "compared_residual_norm",
    "doctor",
    "flow_matching_loss",
    "fp8_linear",
    "fused_flow_blocks",
    "gated_residual_norm",
    "interpolate",
    "layerwise_distillation",
    "mean_flow_loss",
    "modulated_norm",
    "noise_seed",
    "patch",
    "patched",
    "patchify",
    "residual_norm",
    "seeded_noise",
    "self_distillation_loss",
    "to_images",
    "unpatch",
    "unpatchify",
    "velocity_loss",
    "verify",
]

# where each name lives; loaded on first use, so that importing the package costs nothing
_MODULES = {
    "FlowHead": "modules.flow_head",
    "LayerwiseDistillation": "ops.distillation",
    "PatchReport": "dropin.patching",
    "VerifyReport": "dropin.verification",
    "attention": "ops.attention",
    "backend": "choice",
    "compared_residual_norm": "ops.compared_norm",
    "doctor": "diagnosis",
    "flow_matching_loss": "modules.flow_matching",
    "fp8_linear": "ops.fp8_linear",
    "fused_flow_blocks": "ops.flow_head",
    "gated_residual_norm": "ops.modulated_norm",
    "interpolate": "ops.velocity",
    "layerwise_distillation": "ops.distillation",
    "mean_flow_loss": "modules.few_steps",
    "modulated_norm": "ops.modulated_norm",
    "noise_seed": "ops.noise",
    "patch": "dropin.patching",
    "patched": "dropin.patching",
    "patchify": "ops.patches",
    "residual_norm": "ops.modulated_norm",
    "seeded_noise": "ops.noise",
    "self_distillation_loss": "modules.few_steps",
    "to_images": "ops.images",
    "unpatch": "dropin.patching",
    "unpatchify": "ops.patches",
    "velocity_loss": "ops.velocity",
    "verify": "dropin.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"uniflow_kernels.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
