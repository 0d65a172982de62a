"""What a UniFluid is made of: a transformer's configuration, the image tokens, the head."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from uniflow.config import LARGEST_DEPTH, LARGEST_WIDTH, check_integer, read_fields, write_config
from uniflow.reading import printable, shown
from uniflow.unifluid.places import Grid
from uniflow.unifluid.slots import SOURCES
from uniflow.unifluid.tiles import LARGEST_GRID

FEW_STEPS = ("mean_flow", "self_distillation")  # heads of two times
HEADS = ("flow", "ddpm", *FEW_STEPS)
ORDERS = ("random", "raster")
MODEL_TYPE = "unifluid"
_LONGEST_LINE = 1 << 10  # tokens
_MOST_GRIDS = 1 << 10


@dataclass(frozen=True)
class Lora:
    """Adapters of the backbone's linear layers, see `uniflow.unifluid.adapters`.

    Attributes:
        rank: of what is added to each weight.
        alpha: what is added is multiplied by alpha / rank.
        dropout: of an adapter's input, in training.
        targets: how the layers are called that have one, as in ["q_proj", "v_proj"], or "all-linear" for all that are
            in the transformer's layers.

    Raises:
        ValueError: for values that cannot be, naming the field.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic where it comes from a training file

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        check_integer("lora.rank", self.rank, 1, LARGEST_WIDTH)
        for name, least, below in (("alpha", 0.0, math.inf), ("dropout", 0.0, 1.0)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not least <= value < below:
                raise ValueError(f"lora.{name}: expected a number from {least} and below {below}, got {shown(value)}")
        if self.targets == "all-linear":
            return
        if not isinstance(self.targets, (list, tuple)) or not all(isinstance(name, str) for name in self.targets):
            raise ValueError(f"lora.targets: expected all-linear or a list of names, got {shown(self.targets)}")
        if not self.targets:
            raise ValueError("lora.targets: expected all-linear or a list of names, got an empty one")
        object.__setattr__(self, "targets", tuple(self.targets))

    @classmethod
    def of(cls, values: object) -> Lora:
        """Those of a config.json, or adapters as they are."""
        if isinstance(values, cls):
            return values
        if not isinstance(values, dict):
            raise ValueError(f"lora: expected the fields of adapters, got {shown(values)}")
        if unknown := sorted(set(values) - {each.name for each in fields(cls)}):
            raise ValueError(f"lora: unknown field {printable(unknown[0])}")
        return cls(**values)


@dataclass
class UniFluidConfig:
    """The fields of a UniFluid's config.json.

    Attributes:
        backbone: the configuration of a decoder-only language model of the transformers package, as its `to_dict()`
            gives it (`{"model_type": "llama", "hidden_size": ...}`); what is left out has transformers' defaults.
        token_channels: C, size of an image token.
        grid: lines of image tokens, and tokens a line; of pictures of several sizes, those of the first.
        head_width: W of the head.
        head_depth: its blocks.
        head: "flow", which predicts a velocity; "ddpm", noise and its variance (MAR); "mean_flow" or
            "self_distillation", the mean velocity between two times, for few steps.
        order: in which the image tokens come: "random", for every picture another one, or "raster".
        vision_channels: size of a feature of the pictures that are read; None for a model that only draws.
        sources: what a drawing sees of the pictures that it is drawn from beside its text: their "features", their
            clean image "tokens", or "both"; None for a model that draws from text alone.
        tokenizer: fingerprint of the image tokenizer it was trained with, if known.
        vision: fingerprint of what its features come from, if known.
        text_tokenizer: fingerprint of the text tokenizer, if known; see `uniflow.unifluid.texts.ids_fingerprint`.
        vision_merge: of how many patches a side, which lie next to each other, one feature is made.
        vision_layers: linear layers that a feature goes through into the transformer: 1, or 2 with GELU between them.
        packing: of how many latents a side of the image tokenizer, which lie next to each other, one token is made.
        vision_tiles: of how many tiles at most the grid is that a picture is read as; 1 for its middle alone. See
            `uniflow.unifluid.tiles`.
        lora: adapters that are trained in the place of the backbone; None for a plain model.
        grids: of the pictures of several sizes that it draws, with embeddings for lines, columns and each grid; None
            for a model of one grid, which has an embedding for each place of it.
        vision_encoder: what its own encoder of pictures is, where that is trained with it and stands in its checkpoints
            (`VisionFeatures.fields`); None where the encoder stays as `vision` has it, in a folder of its own.

    Raises:
        ValueError: for values that cannot be, naming the field.
    """

    backbone: dict[str, Any]
    token_channels: int
    grid: tuple[int, int]
    head_width: int = 1024
    head_depth: int = 6
    head: str = "flow"
    order: str = "random"
    vision_channels: int | None = None
    sources: str | None = None
    tokenizer: str | None = None
    vision: str | None = None
    text_tokenizer: str | None = None
    vision_merge: int = 1
    vision_layers: int = 1
    packing: int = 1
    vision_tiles: int = 1
    lora: Lora | None = None
    grids: tuple[tuple[int, int], ...] | None = None
    vision_encoder: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.grid = _grid("grid", self.grid)
        self.grids = None if self.grids is None else _grids(self.grids, self.grid)
        for name in ("token_channels", "head_width", "head_depth", "vision_channels"):
            value = getattr(self, name)
            if value is not None or name != "vision_channels":
                check_integer(name, value, 1, LARGEST_DEPTH if name == "head_depth" else LARGEST_WIDTH)
        self._check_vision()
        check_integer("packing", self.packing, 1, LARGEST_WIDTH)
        if self.token_channels % self.packing**2:
            raise ValueError(
                f"packing: expected {self.packing}x{self.packing} latents to have the token_channels, "
                f"{self.token_channels}, together"
            )
        for name, allowed in (("head", HEADS), ("order", ORDERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {shown(getattr(self, name))}")
        if self.sources is not None and self.sources not in SOURCES:
            raise ValueError(f"sources: expected one of {', '.join(SOURCES)}, got {shown(self.sources)}")
        if self.sources in ("features", "both") and self.vision_channels is None:
            raise ValueError(f"sources: {self.sources} of pictures need vision_channels")
        self.lora = None if self.lora is None else Lora.of(self.lora)
        if not isinstance(self.backbone, dict) or "model_type" not in self.backbone:
            raise ValueError("backbone: expected a configuration of transformers with its model_type")
        for name in ("tokenizer", "vision", "text_tokenizer"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str)):
                raise ValueError(f"{name}: expected a fingerprint, got {shown(value)}")

    def _check_vision(self) -> None:
        check_integer("vision_merge", self.vision_merge, 1, LARGEST_WIDTH)
        check_integer("vision_layers", self.vision_layers, 1, 2)
        check_integer("vision_tiles", self.vision_tiles, 1, LARGEST_GRID)
        if self.vision_encoder is not None:
            if not isinstance(self.vision_encoder, dict):
                raise ValueError(
                    f"vision_encoder: expected fields of a UniFlowConfig, got {shown(self.vision_encoder)}"
                )
            if self.vision_channels is None:
                raise ValueError("vision_encoder: what it sees needs vision_channels")

    @property
    def tokens(self) -> int:
        """N, image tokens of a picture; of one of the largest, where there are several sizes."""
        return max(lines * columns for lines, columns in self.grids or (self.grid,))

    def known_grid(self, grid: Grid | None) -> Grid:
        """The grid, or the first one for None.

        Raises:
            ValueError: if the model draws no such pictures.
        """
        known = self.grids or (self.grid,)
        if grid is not None and tuple(grid) not in known:
            expected = ", ".join(f"{lines}x{columns}" for lines, columns in known)
            raise ValueError(f"grid: expected tokens of {expected}, as in training, got {'x'.join(map(str, grid))}")
        return self.grid if grid is None else (grid[0], grid[1])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> UniFluidConfig:
        """Read `folder`/config.json.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is no JSON object or describes no UniFluid.
        """
        return cls(**read_fields(folder, MODEL_TYPE, cls, ("backbone", "token_channels", "grid")))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder`/config.json; the folder is made if need be."""
        write_config(folder, {"model_type": MODEL_TYPE, **asdict(self)})


def _grids(grids: Any, first: Grid) -> tuple[Grid, ...]:
    """Several, as a file may give them."""
    if not isinstance(grids, (list, tuple)) or not 1 <= len(grids) <= _MOST_GRIDS:
        raise ValueError(f"grids: expected a list of 1 to {_MOST_GRIDS}, got {shown(grids)}")
    found = tuple(_grid("grids", grid) for grid in grids)
    if len(set(found)) < len(found) or found[0] != first:
        raise ValueError(f"grids: expected different ones, the first of them {first}, got {shown(grids)}")
    return found


def _grid(name: str, grid: Any) -> Grid:
    """Lines and tokens a line, as a file may give them."""
    if not isinstance(grid, (list, tuple)) or len(grid) != 2:
        raise ValueError(f"{name}: expected lines and tokens a line, got {shown(grid)}")
    if any(type(extent) is not int or not 1 <= extent <= _LONGEST_LINE for extent in grid):
        raise ValueError(f"{name}: expected lines and tokens a line, both from 1 to {_LONGEST_LINE}, got {shown(grid)}")
    return grid[0], grid[1]
