"""Generators of a tokenizer's latents: a flow transformer over all tokens of a picture, with classes or without."""

from uniflow.generation.config import FlowTransformerConfig
from uniflow.generation.drawing import draw_latents, picture_seeds, usual_schedule
from uniflow.generation.model import FlowTransformer
from uniflow.generation.objective import FlowTransformerObjective
from uniflow.generation.samples import LatentSamples

__all__ = [
    "FlowTransformer",
    "FlowTransformerConfig",
    "FlowTransformerObjective",
    "LatentSamples",
    "draw_latents",
    "picture_seeds",
    "usual_schedule",
]
