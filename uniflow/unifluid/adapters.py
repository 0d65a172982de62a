"""Low-rank adapters of the transformer's linear layers, by the peft package: trained in the place of the layers.

W x becomes W x + (alpha / rank) B A dropout(x), with W frozen, A [rank, in] and B [out, rank], which begins as zero.

Source: LoRA (Hu et al. 2021), as peft has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from uniflow.foreign import short_reason
from uniflow.unifluid.backbone import layers_of

if TYPE_CHECKING:
    from uniflow.unifluid.config import Lora


def add_adapters(backbone: Any, lora: Lora) -> None:
    """Put adapters on linear layers of a language model, in place.

    Args:
        backbone: see `uniflow.unifluid.backbone.check_backbone`.
        lora: their sizes, and which layers have them.

    Raises:
        ImportError: if the peft package is not installed.
        ValueError: if a target is none of the linear layers, or peft cannot adapt them.
    """
    peft = _peft_package()
    linear = {id(part) for layer in layers_of(backbone) for part in layer.modules() if isinstance(part, nn.Linear)}
    names = [name for name, part in backbone.named_modules() if id(part) in linear]
    last = sorted({name.rpartition(".")[2] for name in names})
    chosen = last if lora.targets == "all-linear" else lora.targets
    if unknown := [name for name in chosen if name not in last] or ([] if last else ["all-linear"]):
        raise ValueError(
            f"lora.targets: the layers of a {backbone.config.model_type} have no nn.Linear called {unknown[0]}; "
            f"expected all-linear or some of {', '.join(last) or 'none'}"
        )
    adapted = [name for name in names if name.rpartition(".")[2] in chosen]
    how = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=adapted)
    try:
        peft.inject_adapter_in_model(how, backbone)
    except Exception as error:  # peft raises whatever it makes of a model
        raise ValueError(f"lora: peft cannot adapt a {backbone.config.model_type}: {short_reason(error)}") from None


def merge_adapters(backbone: Any) -> None:
    """Add what the adapters do to the weights of their layers, in place, and take them off."""
    from peft.tuners.lora import LoraLayer

    for name, part in list(backbone.named_modules()):
        if isinstance(part, LoraLayer):
            part.merge()
            backbone.set_submodule(name, part.get_base_layer())
    backbone.requires_grad_(True)  # peft has frozen what it adapts


def is_of_adapter(name: str) -> bool:
    """Whether a parameter of a language model, by its name, is that of an adapter."""
    return ".lora_" in name


def _peft_package() -> Any:
    try:
        import peft
    except ImportError:
        raise ImportError("LoRA needs the peft package: pip install 'uniflow-kernels[lora]'") from None
    return peft
