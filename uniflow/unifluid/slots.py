"""Slots of pictures among the ids of texts: numbers below zero, in the places that their embeddings take."""

from __future__ import annotations

FEATURES = -1  # one of the features of a picture that is read
TOKENS = -2  # one of the clean image tokens of a picture that a drawing has for its source
SOURCES = ("features", "tokens", "both")  # what a drawing sees of its sources


def picture_slots(features: int = 0, tokens: int = 0) -> list[int]:
    """The slots of a picture: its features, then its clean image tokens."""
    return [FEATURES] * features + [TOKENS] * tokens


def source_slots(sources: str | None, features: int, tokens: int) -> list[int]:
    """The slots of a picture that a drawing has for its source, of a model that sees `sources` of it."""
    return picture_slots(
        features if sources in ("features", "both") else 0, tokens if sources in ("tokens", "both") else 0
    )
