"""What a UniFluid is made of: a transformer's configuration, the image tokens, the head."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from uniflow.config import read_config, write_config

HEADS = ("flow", "ddpm")
ORDERS = ("random", "raster")
MODEL_TYPE = "unifluid"


@dataclass
class UniFluidConfig:
    """The fields of a UniFluid's config.json.

    Attributes:
        backbone: the configuration of a decoder-only language model of the transformers package, as its `to_dict()`
            gives it (`{"model_type": "llama", "hidden_size": ...}`); what is left out has transformers' defaults.
        token_channels: C, size of an image token.
        grid: lines of image tokens, and tokens a line.
        head_width: W of the head.
        head_depth: its blocks.
        head: "flow", which predicts a velocity, or "ddpm", which predicts noise and its variance (MAR).
        order: in which the image tokens come: "random", for every picture another one, or "raster".
        vision_channels: size of a feature of the pictures that are read; None for a model that only draws.
        tokenizer: fingerprint of the image tokenizer it was trained with, if known.
        vision: fingerprint of what its features come from, if known.
        text_tokenizer: fingerprint of the text tokenizer, if known; see `uniflow.unifluid.texts.ids_fingerprint`.

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
    tokenizer: str | None = None
    vision: str | None = None
    text_tokenizer: str | None = None

    def __post_init__(self) -> None:
        self.grid = (int(self.grid[0]), int(self.grid[1])) if len(self.grid) == 2 else (0, 0)
        for name in ("token_channels", "head_width", "head_depth", "vision_channels"):
            value = getattr(self, name)
            if value is None and name == "vision_channels":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
        if min(self.grid) < 1:
            raise ValueError(f"grid: expected lines and tokens a line, both at least 1, got {self.grid}")
        for name, allowed in (("head", HEADS), ("order", ORDERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if "model_type" not in self.backbone:
            raise ValueError("backbone: expected a configuration of transformers with its model_type")

    @property
    def tokens(self) -> int:
        """N, image tokens of a picture."""
        return self.grid[0] * self.grid[1]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> UniFluidConfig:
        """Read `folder`/config.json.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is no JSON object or describes no UniFluid.
        """
        path, values = Path(folder) / "config.json", read_config(folder)
        if values.pop("model_type", None) != MODEL_TYPE:
            raise ValueError(f"{path}: expected a JSON object with model_type {MODEL_TYPE!r}")
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"{path}: unknown field {name}")
        try:
            return cls(**values)
        except TypeError as error:  # a field is missing
            raise ValueError(f"{path}: {error}") from None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder`/config.json; the folder is made if need be."""
        write_config(folder, {"model_type": MODEL_TYPE, **asdict(self)})
