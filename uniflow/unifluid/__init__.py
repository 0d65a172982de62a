"""UniFluid: one autoregressive transformer that reads pictures and draws them, token by token."""

from uniflow.unifluid.asking import answer
from uniflow.unifluid.config import Lora, UniFluidConfig
from uniflow.unifluid.drawing import Sources, draw_pictures, draw_tokens, see_sources
from uniflow.unifluid.model import UniFluid
from uniflow.unifluid.objective import UniFluidObjective

__all__ = [
    "Lora",
    "Sources",
    "UniFluid",
    "UniFluidConfig",
    "UniFluidObjective",
    "answer",
    "draw_pictures",
    "draw_tokens",
    "see_sources",
]
