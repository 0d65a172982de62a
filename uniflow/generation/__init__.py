"""Generators of a tokenizer's latents: a flow transformer over all tokens of a picture, with classes or without."""

from uniflow.generation.config import FlowTransformerConfig
from uniflow.generation.model import FlowTransformer

__all__ = ["FlowTransformer", "FlowTransformerConfig"]
