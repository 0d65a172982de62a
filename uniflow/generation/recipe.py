"""How to train a generator, as the YAML file of `uniflow train` describes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from uniflow.training.recipe import NO_UNKNOWN_KEYS, AnyRun, at_least


@dataclass(frozen=True)
class ModelChoice:
    """The generator to train: a preset from scratch, or a checkpoint.

    Attributes:
        preset: "S", "B", "L" or "XL".
        config: changes fields of a preset's `FlowTransformerConfig`.
        noise_shift: of a preset: a number, or "channels" for what the size of the latents asks for; see `shift_of`.
        checkpoint: folder of a generator of the same tokenizer's latents, which keeps its own statistics of them.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    preset: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    noise_shift: float | Literal["channels"] = 1.0
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        if (self.preset is None) == (self.checkpoint is None):
            raise ValueError("expected either preset or checkpoint")
        if self.checkpoint is not None and (self.config or self.noise_shift != 1.0):
            raise ValueError("config, noise_shift: change a preset; a checkpoint has its own")
        fixed = {"latent_channels", "grid", "names", "tokenizer", "fingerprint", "noise_shift"}
        if taken := sorted(fixed & self.config.keys()):
            raise ValueError(f"config: {', '.join(taken)} cannot be said here")


@dataclass(frozen=True)
class ObjectiveChoice:
    """The arguments of `FlowTransformerObjective`."""

    __pydantic_config__ = NO_UNKNOWN_KEYS

    label_dropout: float = 0.1
    t_distribution: str = "lognormal"


@dataclass(frozen=True)
class DataChoice:
    """What is made of the latents.

    Attributes:
        flip: whether half of them are those of mirror images; if not given, where the folder has them.
        labels: whether the generator has classes; if not given, where the folder has labels.
        validation: another folder of latents, to score the loss on.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    flip: bool | None = None
    labels: bool | None = None
    validation: Path | None = None


@dataclass(frozen=True)
class SamplesChoice:
    """The pictures that a validation draws, a row of `columns` for each of the first `classes` classes.

    Attributes:
        tokenizer: folder of the tokenizer that decodes them; none are drawn without.
        steps, cfg: see `uniflow.generation.draw_latents`.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    tokenizer: Path | None = None
    classes: int = 8
    columns: int = 8
    steps: int = 50
    cfg: float = 2.0

    def __post_init__(self) -> None:
        at_least(self, 1, "classes", "columns", "steps")


@dataclass(frozen=True, kw_only=True)
class GeneratorRun(AnyRun):
    """A whole run.

    Attributes:
        latents: folder that `uniflow encode` wrote.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    latents: Path
    model: ModelChoice
    data: DataChoice = field(default_factory=DataChoice)
    objective: ObjectiveChoice = field(default_factory=ObjectiveChoice)
    samples: SamplesChoice = field(default_factory=SamplesChoice)
