"""What a generator is made of: the latents, the transformer's size, its head."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from uniflow.config import LARGEST_DEPTH, LARGEST_WIDTH, check_integer, read_fields, write_config
from uniflow.reading import shown

MODEL_TYPE = "uniflow_generator"
MLPS = ("swiglu", "gelu")
POSITIONS = ("rotary", "learned")
HEADS = ("flow", "wide", "linear")

# the sizes of DiT (Peebles and Xie 2023, table 1), with one token a patch; the heads are ours
PRESETS: dict[str, dict[str, int]] = {
    "S": {"width": 384, "depth": 12, "heads": 6, "head_width": 384, "head_depth": 3},
    "B": {"width": 768, "depth": 12, "heads": 12, "head_width": 768, "head_depth": 3},
    "L": {"width": 1024, "depth": 24, "heads": 16, "head_width": 1024, "head_depth": 6},
    "XL": {"width": 1152, "depth": 28, "heads": 16, "head_width": 1152, "head_depth": 6},
}

_LONGEST_LINE = 1 << 10  # tokens
_MOST_CLASSES = 1 << 20
_BASE_NUMBERS = 4096  # of a picture's latents, where noise needs no shift


@dataclass
class FlowTransformerConfig:
    """The fields of a generator's config.json.

    Attributes:
        latent_channels: C, size of a token.
        grid: lines of tokens, and tokens a line.
        classes: number of classes; None for a generator without labels.
        width: W of the transformer.
        depth: its blocks.
        heads: of its attention.
        mlp: of its blocks: "swiglu", or "gelu" as in DiT; both have about 8W^2 weights.
        positions: "rotary", of line and column, or "learned".
        head: what makes a velocity of the transformer's last states: "flow", a `FlowHead` on each token; "wide", blocks
            of another width behind the transformer's, conditioned on its states token by token (the head of DDT and
            RAE); or "linear", DiT's last layer. The first two see the noisy token again.
        head_width, head_depth: of the first two.
        noise_shift: a, by which noise levels are moved in training and, by default, in drawing; 1 moves none. See
            `shift_of`.
        names: what the classes are called, if known.
        tokenizer: what the config of the tokenizer says of its latents, if known; see `uniflow.latents.meaning`.
        fingerprint: of the tokenizer, if known; see `uniflow.latents.fingerprint`.

    Raises:
        ValueError: for values that cannot be, naming the field.
    """

    latent_channels: int
    grid: tuple[int, int]
    classes: int | None
    width: int
    depth: int
    heads: int
    mlp: str = "swiglu"
    positions: str = "rotary"
    head: str = "flow"
    head_width: int = 1024
    head_depth: int = 6
    noise_shift: float = 1.0
    names: list[str] | None = None
    tokenizer: dict[str, Any] | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.grid, (list, tuple)) or len(self.grid) != 2:
            raise ValueError(f"grid: expected lines and tokens a line, got {shown(self.grid)}")
        for extent in self.grid:
            check_integer("grid", extent, 1, _LONGEST_LINE)
        self.grid = (self.grid[0], self.grid[1])
        for name in ("latent_channels", "width", "heads", "head_width"):
            check_integer(name, getattr(self, name), 1, LARGEST_WIDTH)
        for name in ("depth", "head_depth"):
            check_integer(name, getattr(self, name), 1, LARGEST_DEPTH)
        if self.classes is not None:
            check_integer("classes", self.classes, 1, _MOST_CLASSES)
        for name, allowed in (("mlp", MLPS), ("positions", POSITIONS), ("head", HEADS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {shown(getattr(self, name))}")
        if self.width % self.heads:
            raise ValueError(f"heads: expected a divisor of the width {self.width}, got {self.heads}")
        if self.positions == "rotary" and self.width // self.heads % 4:
            raise ValueError(
                f"heads: rotary positions turn pairs of channels by line and by column, expected heads of a multiple "
                f"of 4 channels, got {self.width} / {self.heads} = {self.width // self.heads}"
            )
        if self.head == "wide" and self.head_width % (self.width // self.heads):
            raise ValueError(
                f"head_width: expected a multiple of {self.width // self.heads}, the size of an attention head, "
                f"got {self.head_width}"
            )
        shift = self.noise_shift
        if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 < shift < math.inf:
            raise ValueError(f"noise_shift: expected a positive number, got {shown(shift)}")
        self._check_origin()

    def _check_origin(self) -> None:
        names = self.names
        if names is not None and (
            not isinstance(names, list)
            or len(names) != self.classes
            or not all(isinstance(name, str) for name in names)
        ):
            raise ValueError(f"names: expected a name for each of {self.classes} classes, got {shown(names)}")
        if not (self.tokenizer is None or isinstance(self.tokenizer, dict)):
            raise ValueError(f"tokenizer: expected an object, got {shown(self.tokenizer)}")
        if not (self.fingerprint is None or isinstance(self.fingerprint, str)):
            raise ValueError(f"fingerprint: expected a text, got {shown(self.fingerprint)}")
        if (self.tokenizer is None) != (self.fingerprint is None):
            raise ValueError("fingerprint: expected beside tokenizer, and only there")

    @property
    def tokens(self) -> int:
        """N, tokens of a picture."""
        return self.grid[0] * self.grid[1]

    @property
    def wide_heads(self) -> int:
        """Heads of a wide head's attention, each as large as the transformer's."""
        return self.head_width * self.heads // self.width

    @classmethod
    def preset(
        cls, name: str, latent_channels: int, grid: tuple[int, int], classes: int | None, **changes: Any
    ) -> FlowTransformerConfig:
        """The configuration "S", "B", "L" or "XL" for latents, with some fields changed.

        Raises:
            ValueError: for a name that is no preset, naming those there are; TypeError for a field that is none.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {shown(name)}")
        return cls(**{**PRESETS[name], **changes}, latent_channels=latent_channels, grid=grid, classes=classes)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FlowTransformerConfig:
        """Read `folder`/config.json.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is no JSON object or describes no generator.
        """
        return cls(**read_fields(folder, MODEL_TYPE, cls, _REQUIRED))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder`/config.json; the folder is made if need be."""
        write_config(folder, {"model_type": MODEL_TYPE, **asdict(self)})


def shift_of(tokens: int, channels: int) -> float:
    """The shift of noise levels for latents of so many numbers: a = sqrt(tokens * channels / 4096).

    A level s (the share of noise) becomes a*s / (1 + (a-1)*s): of more numbers, which tell more about each other, the
    same level hides less.

    Source: RAE (Zheng et al. 2025), the dimension-dependent shift, of the form of Esser et al. 2024, eq. 23.
    """
    return math.sqrt(tokens * channels / _BASE_NUMBERS)


_REQUIRED = ("latent_channels", "grid", "classes", "width", "depth", "heads")
