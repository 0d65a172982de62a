"""Linear layers in fp8, in the place of those that a module has, with the same parameters under the same names."""

from __future__ import annotations

from torch import Tensor, nn

from uniflow_kernels.ops.fp8_linear import fp8_linear, why_not_shape
from uniflow_kernels.torch_private import children_of, is_hooked

__all__ = ["Fp8Linear", "lower", "why_not_lowered"]


class Fp8Linear(nn.Linear):
    """nn.Linear by `fp8_linear`, for inference. Its parameters stay as they are: so does its state_dict.

    They are read where they are: a change is seen, and quantized again.
    """

    @classmethod
    def of(cls, layer: nn.Linear) -> Fp8Linear:
        """Of a layer's own parameters."""
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        return made.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]; errors as of `fp8_linear`."""
        return fp8_linear(x, self.weight, self.bias)


def why_not_lowered(layer: nn.Linear) -> str | None:
    """Why a linear layer cannot be in fp8; None if it can."""
    if type(layer) is not nn.Linear or is_hooked(layer):
        return "it is of another class, wrapped, or has a hook"
    return why_not_shape(layer.in_features, layer.out_features)


def lower(module: nn.Module) -> int:
    """Put an `Fp8Linear` in the place of each linear layer below a module that can be one; how many there were."""
    count = 0
    for part in list(module.modules()):
        for name, child in children_of(part).items():
            if isinstance(child, nn.Linear) and why_not_lowered(child) is None:
                setattr(part, name, Fp8Linear.of(child))
                count += 1
    return count
