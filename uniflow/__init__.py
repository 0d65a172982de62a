"""UniFlow: a visual tokenizer that both understands and generates."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uniflow.checkpoint import CheckpointError
    from uniflow.compiling import compile
    from uniflow.config import UniFlowConfig
    from uniflow.model import UniFlow
    from uniflow.normalization import denormalize, normalize
    from uniflow.objective import UniFlowObjective
    from uniflow.teachers import EncoderTeacher
    from uniflow.training import Recipe, Trainer

__all__ = [
    "CheckpointError",
    "EncoderTeacher",
    "Recipe",
    "Trainer",
    "UniFlow",
    "UniFlowConfig",
    "UniFlowObjective",
    "compile",
    "denormalize",
    "normalize",
]

# where each name lives; loaded on first use, so that `uniflow --help` need not wait for torch
_MODULES = {
    "CheckpointError": "checkpoint",
    "EncoderTeacher": "teachers",
    "Recipe": "training",
    "Trainer": "training",
    "UniFlow": "model",
    "UniFlowConfig": "config",
    "UniFlowObjective": "objective",
    "compile": "compiling",
    "denormalize": "normalization",
    "normalize": "normalization",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"uniflow.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
