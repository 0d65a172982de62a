"""The configuration: the fields of the official config.json, checked against each other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from uniflow.atomic import write_json
from uniflow.reading import check_folder, printable, read_json, shown

GLOBAL_BLOCK_HEADS = 16  # the release's global blocks have 16 heads whatever the width

PRESETS: dict[str, dict[str, Any]] = {
    # 32 px in patches of 4: trains to recognisable pictures in minutes on two CPU cores
    "tiny": {
        "image_size": 32,
        "patch_size": 4,
        "hidden_size": 128,
        "vit_hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.08,  # about 1/sqrt(width); 0.02 suits 1024
        "latent_ch": 16,
        "global_blocks_depth": 1,
        "num_decoder_layers": 3,
    },
    "small": {
        "image_size": 224,
        "hidden_size": 640,
        "vit_hidden_size": 640,
        "intermediate_size": 2560,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "global_blocks_depth": 3,
        "num_decoder_layers": 6,
    },
    "base": {},
}

# the most that is taken for a model's size: many times the largest there are, and what fits an allocator's arithmetic
LARGEST_WIDTH = 1 << 17
LARGEST_DEPTH = 1 << 10
LARGEST_IMAGE = 1 << 15
_MOST_STEPS = 10_000
_SIZES = {
    "image_size": LARGEST_IMAGE,
    "patch_size": 1 << 10,
    "num_channels": 1 << 6,
    "hidden_size": LARGEST_WIDTH,
    "vit_hidden_size": LARGEST_WIDTH,
    "intermediate_size": 8 * LARGEST_WIDTH,
    "num_hidden_layers": LARGEST_DEPTH,
    "num_attention_heads": LARGEST_WIDTH,
    "latent_ch": LARGEST_WIDTH,
    "global_blocks_depth": LARGEST_DEPTH,
    "num_decoder_layers": LARGEST_DEPTH,
}

_OFFICIAL = "uniflow"
# the official code has no such types, so it takes no such folder for its own
WITH_ENCODER = "uniflow_with_encoder"
FEW_STEPS = "uniflow_few_steps"  # its flow head has two times
KINDS = (_OFFICIAL, FEW_STEPS, WITH_ENCODER)

# what may be chosen around a given encoder
DECODER_FIELDS = (
    "latent_ch",
    "use_global_blocks",
    "global_blocks_depth",
    "num_decoder_layers",
    "num_sampling_steps",
    "initializer_range",
    "llm_hidden_size",
    "use_cfg",
    "use_disp_loss",
    "flow_width",
    "latent_noise",
    "flow_times",
)

# fields that the official config.json does not have, with what the release does: then they are not written
_OWN_FIELDS = {"flow_width": None, "latent_noise": 0.0, "flow_times": 1, "encoder": None}
_OF_OFFICIAL_CODE = ("architectures", "auto_map", "model_type")  # by which a config.json is given to it


@dataclass
class UniFlowConfig:
    """The fields of the official config.json, same names; the defaults are the official release (preset "base").

    `llm_hidden_size`, `use_cfg` and `use_disp_loss` are carried along for the official code and change nothing here.
    Keys of a config.json that are no fields (auto_map, transformers_version, ...) are kept in `extra` and written back.
    `encoder` is no field of the official one: it describes an encoder of another make than its own, and config.json is
    then of the type "uniflow_with_encoder" (see `uniflow.pretrained.described_encoder`). Neither are `flow_width`, of
    the flow head where it is not `vit_hidden_size`, nor `latent_noise`, which training adds to latents (see
    `uniflow.UniFlowObjective`); config.json has them only where they are given, and the official code takes no weights
    of a head of another width. With `flow_times` 2, also written only then, the flow head predicts the mean velocity
    between two times, to decode in few steps (see `UniFlow.for_intervals`), and config.json is of the type
    "uniflow_few_steps" if it has no `encoder`.

    Raises:
        ValueError: for values that contradict each other or that the model does not have, naming the field.

    Warns:
        UserWarning: if the flow head is narrower than a patch: it then cannot take the noise away in one step.
    """

    image_size: int = 448
    patch_size: int = 14
    num_channels: int = 3
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    qkv_bias: bool = True
    qk_normalization: bool = False
    norm_type: str = "layer_norm"
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path_rate: float = 0.0
    initializer_factor: float = 1.0
    initializer_range: float = 0.02
    use_flash_attn: bool = True
    vit_hidden_size: int = 1024
    llm_hidden_size: int = 1536
    use_chal_proj: bool = True
    latent_ch: int = 64
    use_global_blocks: bool = True
    global_blocks_depth: int = 6
    decoder_type: str = "mlp"
    num_decoder_layers: int = 12
    num_sampling_steps: int | str = "1"
    use_cfg: bool = False
    use_disp_loss: bool = False
    flow_width: int | None = None
    latent_noise: float = 0.0
    flow_times: int = 1
    encoder: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_fit()
        if self.flow_width == self.vit_hidden_size:
            self.flow_width = None  # the release's
        row = self.patch_values
        if self.head_width < row:
            warnings.warn(
                f"flow_width: a flow head of width {self.head_width} is narrower than its patch "
                f"({self.num_channels}*{self.patch_size}*{self.patch_size} = {row}) and cannot take the noise away in "
                f"one step, whatever the training; give a flow_width of {row} or more, a smaller patch, or more "
                "sampling steps",
                stacklevel=3,
            )

    def _check_numbers(self) -> None:
        for name, most in _SIZES.items():
            check_integer(name, getattr(self, name), 0 if name == "global_blocks_depth" else 1, most)
        if self.flow_width is not None:
            check_integer("flow_width", self.flow_width, 1, LARGEST_WIDTH)
        check_integer("flow_times", self.flow_times, 1, 2)
        for name in ("dropout", "attention_dropout", "drop_path_rate"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f"{name}: expected a probability in [0, 1), got {shown(value)}")
        for name in ("layer_norm_eps", "initializer_factor", "initializer_range", "latent_noise"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {shown(value)}")
        if not 0 < self.layer_norm_eps <= 1:
            raise ValueError(f"layer_norm_eps: expected a positive number of at most 1, got {self.layer_norm_eps}")
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range: expected a standard deviation, got {self.initializer_range}")
        if self.latent_noise < 0:
            raise ValueError(f"latent_noise: expected at least 0, got {self.latent_noise}")
        for name in ("qkv_bias", "qk_normalization", "use_flash_attn", "use_global_blocks"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {shown(getattr(self, name))}")
        steps = self.num_sampling_steps
        if isinstance(steps, str) and steps.isdecimal() and len(steps) < 10:
            steps = int(steps)
        check_integer("num_sampling_steps", steps, 1, _MOST_STEPS)

    def _check_fit(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size: expected a multiple of patch_size ({self.patch_size}), got {self.image_size}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: {self.num_attention_heads} heads do not divide hidden_size {self.hidden_size}"
            )
        if self.vit_hidden_size != self.hidden_size:
            raise ValueError(f"vit_hidden_size: expected hidden_size ({self.hidden_size}), got {self.vit_hidden_size}")
        if self.vit_hidden_size % GLOBAL_BLOCK_HEADS:
            raise ValueError(
                f"vit_hidden_size: expected a multiple of {GLOBAL_BLOCK_HEADS}, the heads of a global block, "
                f"got {self.vit_hidden_size}"
            )
        choices = {
            "norm_type": ("layer_norm", "rms_norm"),
            "hidden_act": ("gelu", "gelu_pytorch_tanh", "relu", "silu"),
            "decoder_type": ("mlp",),
            "use_chal_proj": (True,),  # without it the release has no condition to decode from
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(map(repr, allowed))}, got {shown(getattr(self, name))}"
                )
        if not self.use_global_blocks and self.global_blocks_depth:
            raise ValueError(f"use_global_blocks: is false, but global_blocks_depth is {self.global_blocks_depth}")

    @property
    def sampling_steps(self) -> int:
        """`num_sampling_steps` as a number (the official config.json holds a string)."""
        return int(self.num_sampling_steps)

    @property
    def tokens(self) -> int:
        """Number of patches of an image of the trained size."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """Length of a row of pixels, C*P*P."""
        return self.num_channels * self.patch_size**2

    @property
    def head_width(self) -> int:
        """Width of the flow head."""
        return self.vit_hidden_size if self.flow_width is None else self.flow_width

    @classmethod
    def preset(cls, name: str, **changes: Any) -> UniFlowConfig:
        """The configuration "tiny", "small" or "base" (the official release), with some fields changed.

        Raises:
            ValueError: for a name that is no preset, naming those there are.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> UniFlowConfig:
        """From the contents of a config.json (or of one whose `vision_config` is a UniFlow).

        Raises:
            ValueError: if it is for another model type, or does not say what the model looks like: nothing is guessed.
        """
        values = vision_config(values)
        kind = values.get("model_type", _OFFICIAL)
        if kind not in KINDS:
            raise ValueError(f"model_type: expected one of {', '.join(map(repr, KINDS))}, got {shown(kind)}")
        wanted = (*_ARCHITECTURE, "encoder") if kind == WITH_ENCODER else _ARCHITECTURE
        missing = [name for name in wanted if values.get(name) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        known = {f.name for f in fields(cls)} - {"extra", *(("encoder",) if kind != WITH_ENCODER else ())}
        own = {name: value for name, value in values.items() if name in known}
        return cls(**own, extra={name: value for name, value in values.items() if name not in known})

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json, which the official code reads if its own could be in the folder."""
        values = asdict(self)
        extra = values.pop("extra")
        for name, official in _OWN_FIELDS.items():
            if values[name] == official:
                del values[name]
        if self.encoder is not None:
            return {"model_type": WITH_ENCODER, **values, **extra}
        if self.flow_times == 2:  # nor does it find its way to it by what a folder of its own said
            kept = {name: value for name, value in extra.items() if name not in _OF_OFFICIAL_CODE}
            return {"model_type": FEW_STEPS, **values, **kept}
        return {"architectures": ["UniFlowVisionModel"], "model_type": _OFFICIAL, **values, **extra}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> UniFlowConfig:
        """Read `folder`/config.json.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is no JSON object or describes no UniFlow.
        """
        return cls.from_dict(read_config(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `folder`/config.json; the folder is made if need be."""
        write_config(folder, self.to_dict())


def vision_config(values: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that is about pictures: its `vision_config`, or all of it.

    Raises:
        ValueError: if that is no object.
    """
    part = values.get("vision_config", values)
    if not isinstance(part, dict):
        raise ValueError(f"vision_config: expected an object, got {shown(part)}")
    return part


def check_integer(name: str, value: object, least: int, most: int) -> None:
    """Refuse what is no integer in [least, most], by name."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {shown(value)}")
    if value > most:
        raise ValueError(f"{name}: expected an integer of at most {most}, got {shown(value)}")


def read_config(folder: str | Path) -> dict[str, Any]:
    """What `folder`/config.json holds.

    Raises:
        FileNotFoundError: if there is none.
        NotADirectoryError: if it is no folder but a file.
        ValueError: if it is no JSON object, or one that `uniflow.reading` refuses.
    """
    return read_json(check_folder(folder) / "config.json")


def read_fields(folder: str | Path, model_type: str, of: type, required: Sequence[str]) -> dict[str, Any]:
    """The fields of a dataclass `of` that `folder`/config.json gives, without its `model_type`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no JSON object of this `model_type`, has an unknown field or lacks a required one.
    """
    path, values = Path(folder) / "config.json", read_config(folder)
    if values.pop("model_type", None) != model_type:
        raise ValueError(f"{path}: expected a JSON object with model_type {model_type!r}")
    known = {f.name for f in fields(of)}
    for name in values:
        if name not in known:
            raise ValueError(f"{path}: unknown field {printable(name)}")
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return values


def write_config(folder: str | Path, values: dict[str, Any]) -> None:
    """Write `folder`/config.json, whole or not at all; the folder is made if need be."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / "config.json", values)


# a config.json must say these; a guess would build another model than the checkpoint's
ENCODER_ARCHITECTURE = (
    "image_size",
    "patch_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "qkv_bias",
    "qk_normalization",
    "norm_type",
)
_ARCHITECTURE = (
    *ENCODER_ARCHITECTURE,
    "vit_hidden_size",
    "latent_ch",
    "global_blocks_depth",
    "num_decoder_layers",
)
