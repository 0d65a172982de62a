"""How to train a UniFluid, as the YAML file of `uniflow unifluid train` describes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from uniflow.training.recipe import NO_UNKNOWN_KEYS, AnyRun, at_least
from uniflow.unifluid.config import Lora


@dataclass(frozen=True)
class ModelChoice:
    """The model to train: around a pretrained language model, or from scratch.

    Attributes:
        backbone: folder of a language model of the transformers package.
        config: in its place a configuration, as in {model_type: llama, hidden_size: 512, ...}. Its vocab_size is that
            of the text tokenizer if not given.
        text_tokenizer: folder of the tokenizer; the backbone's if not given, or without a backbone one that is made
            for the texts of the data. A run that shall go on with other texts than it began with takes that of its
            checkpoint, CHECKPOINT/text_tokenizer.
        vocabulary: ids of a tokenizer that is made.
        sources: what a drawing sees of the pictures it is drawn from, if the data have any; see `UniFluidConfig`.
        vision_merge, vision_layers, vision_tiles: how pictures are seen; see `UniFluidConfig`.
        checkpointing: recomputes activations in the backward pass: those of the backbone's layers, and with "all" of
            the head's blocks.
        lora: adapters that are trained in the place of a pretrained backbone; see `uniflow.unifluid.config.Lora`.
        head_width, head_depth, head, order: see `UniFluidConfig`.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    backbone: Path | None = None
    config: dict[str, Any] | None = None
    text_tokenizer: Path | None = None
    vocabulary: int = 4096
    sources: Literal["features", "tokens", "both"] = "both"
    vision_merge: int = 1
    vision_layers: int = 1
    vision_tiles: int = 1
    checkpointing: Literal["none", "backbone", "all"] = "none"
    lora: Lora | None = None
    head_width: int = 1024
    head_depth: int = 6
    head: Literal["flow", "ddpm", "mean_flow", "self_distillation"] = "flow"
    order: Literal["random", "raster"] = "random"

    def __post_init__(self) -> None:
        if (self.backbone is None) == (self.config is None):
            raise ValueError("expected either backbone or config")
        if self.lora is not None and self.backbone is None:
            raise ValueError("lora: expected a pretrained backbone beside it, which stays as it is")


@dataclass(frozen=True)
class ObjectiveChoice:
    """The arguments of `UniFluidObjective`."""

    __pydantic_config__ = NO_UNKNOWN_KEYS

    image_weight: float = 1.0
    head_repeats: int = 4
    t_distribution: str = "lognormal"
    guidance: float = 1.0
    share_equal: float = 0.75


@dataclass(frozen=True)
class DataChoice:
    """Where pictures with captions and questions come from, see `uniflow.unifluid.captions`.

    Attributes:
        folder: with captions.jsonl.
        shards: WebDataset tar files, as in "data/train-{0000..0099}.tar" or "data/*.tar".
        validation: folder with captions.jsonl, to score on.
        reading_share, drop_caption, drop_source, flip: see `CaptionedPictures`.
        max_text: ids that a text may have; what the transformer's context leaves if not given.
        latents: folder that `uniflow encode` wrote of the pictures to draw, in the place of encoding them in each step;
            see `uniflow.unifluid.cached.CachedLatents`. Those of `validation` are encoded.
        statistics: pictures that the mean and deviation of the image tokens are taken from.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    folder: Path | None = None
    shards: str | None = None
    validation: Path | None = None
    reading_share: float | None = None
    drop_caption: float = 0.1
    drop_source: float = 0.05
    flip: bool = False
    max_text: int | None = None
    latents: Path | None = None
    statistics: int = 1024

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.shards is None):
            raise ValueError("expected either folder or shards")
        at_least(self, 2, "statistics")
        at_least(self, 1, "max_text")


@dataclass(frozen=True)
class SamplesChoice:
    """The pictures that a validation draws: how many captions, and how; see `draw_tokens`."""

    __pydantic_config__ = NO_UNKNOWN_KEYS

    captions: int = 8
    steps: int | None = None
    head_steps: int = 20
    cfg: float = 3.0
    cfg_source: float = 1.0
    cfg_schedule: Literal["constant", "linear", "cosine"] = "constant"

    def __post_init__(self) -> None:
        at_least(self, 0, "captions")
        at_least(self, 1, "steps", "head_steps")


@dataclass(frozen=True, kw_only=True)
class UniFluidRun(AnyRun):
    """A whole run.

    Attributes:
        tokenizer: folder of the image tokenizer, a UniFlow, or an AutoencoderKL or AutoencoderDC of diffusers.
        vision: folder of the encoder whose features are read, see `VisionFeatures`; the tokenizer's if not given.
        image_size: (H, W) to draw at, in pixels; the size the tokenizer was trained at if not given.
        sizes: in the place of image_size several, (H, W) each, to draw at: a picture is brought to the nearest.
        packing: latents of the tokenizer a side of an image token, see `uniflow.unifluid.tokens.ImageTokenizer`.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    tokenizer: Path
    model: ModelChoice
    data: DataChoice
    vision: Path | None = None
    image_size: tuple[int, int] | None = None
    sizes: list[tuple[int, int]] | None = None
    packing: int = 1
    objective: ObjectiveChoice = field(default_factory=ObjectiveChoice)
    samples: SamplesChoice = field(default_factory=SamplesChoice)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sizes is None:
            return
        if not self.sizes or len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"sizes: expected different heights and widths, got {self.sizes}")
        if self.image_size is not None:
            raise ValueError("expected either image_size or sizes")
        if self.data.latents is not None:
            raise ValueError("data.latents: expected image_size in the place of sizes, latents are of one size")
