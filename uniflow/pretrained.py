"""Encoders from elsewhere, as UniFlow's own: embeddings, then layers that map tokens to tokens.

InternViT, which UniFlow is built on, has the layers of UniFlow. Vision transformers of the transformers package (ViT,
DINOv2, CLIP, SigLIP, SigLIP2 and their relatives) are adapted by what their modules have in common.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from uniflow.checkpoint import CheckpointError, assign_state, outline, read_state, refuse_keys
from uniflow.config import (
    ENCODER_ARCHITECTURE,
    KINDS,
    WITH_ENCODER,
    UniFlowConfig,
    check_integer,
    read_config,
    vision_config,
)
from uniflow.encoder import Embeddings, Encoder, LayerStack
from uniflow.foreign import checked_values, configuration, loaded_model, new_model, transformers_package
from uniflow.hub import local_folder
from uniflow.normalization import IMAGENET_MEAN, IMAGENET_STD
from uniflow.reading import printable, read_json, shown

# the kinds of the transformers package that give one token a patch, alone or beside a text encoder. A folder of another
# kind is not read: what its configuration makes, and from where, is not known
_KINDS = (
    "aimv2",
    "aimv2_vision_model",
    "beit",
    "chinese_clip",
    "chinese_clip_vision_model",
    "clip",
    "clip_vision_model",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "ijepa",
    "internvl_vision",
    "metaclip_2",
    "pixio",
    "siglip",
    "siglip_vision_model",
    "siglip2",
    "siglip2_vision_model",
    "tipsv2",
    "tipsv2_vision_model",
    "vit",
    "vit_msn",
)

# of a configuration: which class made it, and in which dtype
_NOT_OF_THE_ENCODER = ("architectures", "dtype", "torch_dtype")
# numbers in the pictures that the embeddings are tried on
_MOST_TRIED = 1 << 28
_NOT_NEEDED = ("mask_token", "position_ids")
_LEAST_DEVIATION, _LARGEST_STATISTIC = 1e-6, 1e6

_INTERNVIT_CHOICES = (
    "num_channels",
    "layer_norm_eps",
    "hidden_act",
    "dropout",
    "attention_dropout",
    "drop_path_rate",
    "initializer_factor",
    "use_flash_attn",
)


class PretrainedEncoder(NamedTuple):
    """An encoder, and what the fields of a `UniFlowConfig` around it are."""

    embeddings: Embeddings | HuggingFaceEmbeddings
    encoder: LayerStack
    fields: dict[str, Any]


def pretrained_encoder(
    source: str | Path | nn.Module,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    weights: str | None = None,
) -> PretrainedEncoder:
    """An encoder for `UniFlow.from_encoder` or `EncoderTeacher`.

    Args:
        source: a checkpoint folder, or a repository on the Hub (OWNER/NAME, OWNER/NAME@REVISION), of a UniFlow, of an
            InternViT, of an InternVL, or one that transformers' AutoModel reads; or a vision model of the transformers
            package, which is taken as it is, but for a mask token: it is taken out, since nothing is masked here.
        mean, std: what the encoder's images are normalised with. It is given those of `uniflow.normalize`, as every
            encoder here, and brings them to its own statistics. If not given they are what the folder says (a UniFlow's
            config.json, or the preprocessor_config.json of the transformers package), else ImageNet's.
        weights: which of several models in the folder's file, see `uniflow.checkpoint.chosen_weights`; not of a folder
            of the transformers package.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        CheckpointError: if it does not hold what its config.json says.
        ImportError: if it takes the transformers package, and this is not installed.
        ValueError: if it is no vision transformer that gives one token a patch, in raster order behind its prefix; or
            under `torch.device("meta")`.

    Nothing in the folder is executed, and nothing is downloaded but a repository that is named.
    """
    if torch.get_default_device().type == "meta":
        raise ValueError("encoder: it has weights, which the meta device cannot hold; make it outside of torch.device")
    if isinstance(source, nn.Module):
        return _from_huggingface(source, mean or IMAGENET_MEAN, std or IMAGENET_STD)
    source = local_folder(source)
    values = read_config(source)
    config = vision_config(values)
    kind = config.get("model_type")
    if kind not in (*KINDS, "intern_vit_6b"):
        preprocessor = Path(source) / "preprocessor_config.json"
        said = read_json(preprocessor) if preprocessor.exists() else {}
        mean, std = mean or said.get("image_mean", IMAGENET_MEAN), std or said.get("image_std", IMAGENET_STD)
        # of an InternVL of the transformers package the vision part alone is made
        alone = kind == "internvl_vision"
        return _from_huggingface(_read_model(Path(source), config if alone else values, alone), mean, std)
    if (tuple(mean or IMAGENET_MEAN), tuple(std or IMAGENET_STD)) != (IMAGENET_MEAN, IMAGENET_STD):
        which = "a UniFlow's folder says them" if kind == WITH_ENCODER else "encoders of the InternViT kind have these"
        raise ValueError(f"mean, std: expected ImageNet's, since {which}")
    if kind == WITH_ENCODER:
        own = UniFlowConfig.from_dict(config)
        state = _encoder_state(Path(source), weights)
        pretrained = described_encoder(own, state)
        _assign(pretrained, state, source)
        return pretrained
    return _from_internvit(Path(source), config, weights)


def _encoder_state(folder: Path, weights: str | None) -> dict[str, Tensor]:
    """An encoder's weights, which the folder holds beside whatever else."""
    # within an InternVL the encoder's keys have a prefix
    state = read_state(folder, mark="encoder.layers.0.", weights=weights, usual="vision_model.")
    own = {name: tensor for name, tensor in state.items() if name.startswith(("embeddings.", "encoder."))}
    if not own:
        raise CheckpointError(f"{folder} holds no encoder: no key begins with 'embeddings.' or 'encoder.'")
    return own


def _assign(encoder: PretrainedEncoder, state: dict[str, Tensor], source: str | Path) -> None:
    parts = nn.ModuleDict({"embeddings": encoder.embeddings, "encoder": encoder.encoder})
    assign_state(parts, state, str(source))


# --- InternViT: the layers are UniFlow's own ---


def _from_internvit(folder: Path, values: dict[str, Any], weights: str | None) -> PretrainedEncoder:
    missing = [name for name in ENCODER_ARCHITECTURE if name not in values]
    if missing:
        raise ValueError(f"{folder / 'config.json'} lacks {', '.join(missing)}")
    fields = {name: values[name] for name in (*ENCODER_ARCHITECTURE, *_INTERNVIT_CHOICES) if name in values}
    fields["vit_hidden_size"] = fields["hidden_size"]
    config = UniFlowConfig(**fields)
    state = _encoder_state(folder, weights)
    embeddings = outline(lambda: Embeddings(config), state, str(folder))
    pretrained = PretrainedEncoder(embeddings, outline(lambda: Encoder(config), state, str(folder)), fields)
    _assign(pretrained, state, folder)
    return pretrained


# --- the transformers package ---


def described_encoder(config: UniFlowConfig, state: Mapping[str, Tensor] | None = None) -> PretrainedEncoder:
    """A new encoder, on the CPU, as `config.encoder` describes it; nothing is downloaded.

    The description holds `kind`, a model type of the transformers package, `config`, what its configuration says, and
    the `mean` and `std` of `pretrained_encoder`. PyTorch's random numbers are as they were.

    Args:
        config: with the description.
        state: weights that it shall hold: if given, a model that is much larger is refused before it is made.

    Raises:
        ImportError: if the transformers package is not installed.
        CheckpointError: if the weights cannot be those of such an encoder.
        ValueError: if it describes no encoder that can be used, or one that does not fit the other fields.
    """
    transformers = transformers_package()
    description = config.encoder
    names = ("kind", "config", "mean", "std")
    if not isinstance(description, dict) or sorted(description) != sorted(names):
        raise ValueError(f"encoder: expected {', '.join(names)}, got {shown(description)}")
    kind, values, mean, std = (description[name] for name in names)
    if not isinstance(values, dict):
        raise ValueError(f"encoder: transformers makes no {printable(str(kind))} of its config: {shown(values)}")
    own = configuration({**values, "model_type": kind}, "encoder", _is_vision)
    # not on the meta device: some of its tensors are in no checkpoint
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        pretrained = _from_huggingface(new_model(transformers.AutoModel, own, "encoder", state), mean, std)
    for name, value in pretrained.fields.items():
        if name != "encoder" and getattr(config, name) != value:
            raise ValueError(f"{name}: expected {value}, as the encoder has it, got {getattr(config, name)}")
    return pretrained


@torch.no_grad()
def take_tensors(module: nn.Module, source: nn.Module) -> None:
    """Give a module the values of another one of its kind: of all parameters and buffers, saved or not."""
    tensors = (chain(part.parameters(), part.buffers()) for part in (module, source))
    for own, its in zip(*tensors, strict=True):
        own.copy_(its)


def _description(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any] | None:
    """Of a vision model, for `described_encoder`; None if its configuration alone would make another one."""
    transformers = transformers_package()
    config: Any = model.config
    if type(config) not in transformers.MODEL_MAPPING or config.model_type not in _KINDS:
        return None
    with torch.device("meta"):
        again = _vision_part(transformers.AutoModel.from_config(config, trust_remote_code=False))
    if _shapes(again) != _shapes(model):
        return None
    try:
        values = checked_values(json.loads(config.to_json_string(use_diff=True)), "encoder")
    except ValueError:  # quantised, for one
        return None
    kind = values.pop("model_type")
    for name in _NOT_OF_THE_ENCODER:
        values.pop(name, None)
    return {"kind": kind, "config": values, "mean": list(mean), "std": list(std)}


def _is_vision(kind: str, _: Any) -> bool:
    return kind in _KINDS


def _read_model(folder: Path, values: dict[str, Any], alone: bool) -> nn.Module:
    """The model in a folder of the transformers package, or its vision part, if what is used of it has its weights."""
    config = configuration(values, str(folder), _is_vision)
    state = read_state(folder, mark="encoder.layer.0." if alone else None, usual="model.vision_tower.")
    model, wrong = loaded_model(transformers_package().AutoModel, config, state, str(folder))
    vision = _vision_part(model)
    used = [_part(vision, "embeddings"), _layers(vision), getattr(vision, "pre_layrnorm", None)]
    names = [f".{name}." for name, module in model.named_modules() if any(module is part for part in used)]
    # of the rest (a pooler, a classifier, a text encoder, a token for what is masked) nothing is needed
    refuse_keys(
        folder,
        {
            kind: [key for key in keys if any(name in f".{key}." for name in names) and not key.endswith(_NOT_NEEDED)]
            for kind, keys in wrong.items()
        },
    )
    return model


def _check_statistics(name: str, values: Sequence[float]) -> None:
    numbers = [value for value in values if isinstance(value, (int, float))] if isinstance(values, Sequence) else []
    least = _LEAST_DEVIATION if name == "std" else -_LARGEST_STATISTIC
    if (
        len(numbers) != len(IMAGENET_MEAN)
        or len(values) != len(numbers)
        or not all(least <= number <= _LARGEST_STATISTIC for number in numbers)
    ):
        positive = " positive" if name == "std" else ""
        raise ValueError(f"{name}: expected {len(IMAGENET_MEAN)}{positive} numbers, one a channel, got {shown(values)}")


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    parts = nn.ModuleList([_part(model, "embeddings"), _layers(model)])
    return {name: tensor.shape for name, tensor in parts.state_dict().items()}


def _vision_part(model: nn.Module) -> nn.Module:
    model = getattr(model, "base_model", model)  # without the head of a classifier
    return getattr(model, "vision_model", model)  # of a pair of image and text encoder


class HuggingFaceEmbeddings(nn.Module):
    """What a vision transformer of the transformers package does before its first layer.

    Args:
        model: the vision model.
        patch_size: P, in pixels.
        image_size: the side it was trained at, in pixels. What the patch leaves of an image is cut off.
        channels: of an image.
        mean, std: see `pretrained_encoder`.

    Raises:
        ValueError: if the tokens are not one a patch, in raster order behind the prefix.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        patch_size: int,
        image_size: int,
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.embed = _part(model, "embeddings")
        if isinstance(getattr(self.embed, "mask_token", None), nn.Parameter):
            self.embed.register_parameter("mask_token", None)  # one that never has a gradient stops DDP
        self.norm = getattr(model, "pre_layrnorm", nn.Identity())  # CLIP's, under the name that it has there
        self.patch_size = patch_size
        self.image_size = image_size
        accepted = inspect.signature(self.embed.forward).parameters
        self.takes_patches = "spatial_shapes" in accepted  # SigLIP2: rows of pixels, and how they lie
        self.can_interpolate = "interpolate_pos_encoding" in accepted
        # from ImageNet's statistics to its own: x*scale + shift
        statistics = torch.tensor([IMAGENET_MEAN, IMAGENET_STD, tuple(mean), tuple(std)], dtype=torch.float32)[
            :, :, None, None
        ]
        self.rescales = not torch.equal(statistics[:2], statistics[2:])
        self.register_buffer("scale", statistics[1] / statistics[3], persistent=False)
        self.register_buffer("shift", (statistics[0] - statistics[2]) / statistics[3], persistent=False)
        self.prefix_tokens = 0
        self.prefix_tokens = self._find_prefix(channels)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, prefix + (H//P)*(W//P), D]."""
        size = (images.shape[-2], images.shape[-1])
        if self.rescales:
            images = images * self.scale.to(images.dtype) + self.shift.to(images.dtype)
        images = images.to(next(self.embed.parameters()).dtype)
        patch = self.patch_size
        if self.takes_patches:
            down, across = size[0] // patch, size[1] // patch
            images = images[..., : down * patch, : across * patch]
            rows = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)
            grid = torch.tensor([[down, across]], device="cpu").expand(images.shape[0], 2)
            return self.norm(self.embed(rows, grid))
        if self.can_interpolate:
            return self.norm(self.embed(images, interpolate_pos_encoding=size != (self.image_size, self.image_size)))
        return self.norm(self.embed(images))

    @torch.no_grad()
    def _find_prefix(self, channels: int) -> int:
        """How many tokens come before those of the patches, found by changing a patch at a time."""
        lines = self.image_size // self.patch_size
        side = lines * self.patch_size
        device = next(self.embed.parameters()).device
        places = sorted({0, min(1, lines * lines - 1), lines * lines - 1})
        images = torch.zeros(1 + len(places), channels, side, side, dtype=torch.float32, device=device)
        for image, place in zip(images[1:], places, strict=True):
            top, left = (self.patch_size * at for at in divmod(place, lines))
            image[:, top : top + self.patch_size, left : left + self.patch_size] = 1.0
        training = self.training
        try:
            tokens = self.eval()(images)
            length = tokens.shape[1]
        except Exception as error:  # whatever embeddings of another make do
            raise ValueError(f"encoder: its embeddings do not take pictures of {side}x{side}: {error}") from None
        finally:
            self.train(training)
        prefix = length - lines * lines
        for place, changed in zip(places, (tokens[1:] != tokens[:1]).any(-1), strict=True):
            found = changed.nonzero().flatten().tolist()
            if prefix < 0 or found != [prefix + place]:
                raise ValueError(
                    f"encoder: expected a token for each of the {lines}x{lines} patches, in raster order behind the "
                    f"class and register tokens; of its {tokens.shape[1]} tokens patch {place} changes {found}"
                )
        return prefix


class HuggingFaceLayer(nn.Module):
    """A layer of the transformers package as one of tokens to tokens: no mask, and nothing but the tokens returned."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        # the first 5.x give the layers of encoders that never have a mask nothing but tokens
        takes = [p for p in inspect.signature(layer.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.without = (None,) if len(takes) > 1 else ()

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        out = self.layer(x, *self.without)
        return out[0] if isinstance(out, tuple) else out


def _from_huggingface(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> PretrainedEncoder:
    _check_statistics("mean", mean)
    _check_statistics("std", std)
    model = _vision_part(model)
    config = getattr(model, "config", None)
    layers = _layers(model)
    try:
        patch, channels, width = config.patch_size, config.num_channels, config.hidden_size  # type: ignore[union-attr]
        heads = config.num_attention_heads  # type: ignore[union-attr]
        # SigLIP2 has no size of its own, only the grid of its position embeddings
        size = getattr(config, "image_size", None) or math.isqrt(config.num_patches) * patch  # type: ignore[union-attr]
    except AttributeError as error:
        raise ValueError(
            f"encoder: expected a vision transformer of the transformers package, but {type(model).__name__} has no "
            f"{error.name} in its config"
        ) from None
    # InternVL has both sides
    patch, size = (v[0] if isinstance(v, (list, tuple)) and len({*v}) == 1 else v for v in (patch, size))
    for name, value in (("patch_size", patch), ("image_size", size)):
        if not isinstance(value, int):
            raise ValueError(f"encoder: expected a square {name}, got {shown(value)}")
        check_integer(f"encoder: {name}", value, 1, math.isqrt(_MOST_TRIED))
    check_integer("encoder: num_channels", channels, 1, _MOST_TRIED)
    if size < patch or 4 * channels * size**2 > _MOST_TRIED:
        raise ValueError(
            f"encoder: expected patches of {patch} in pictures that can be tried, got {channels}x{size}x{size}"
        )
    fields = {
        "image_size": size - size % patch,  # as the package's models do, which leave out the rest
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "vit_hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "intermediate_size": getattr(config, "intermediate_size", None) or int(width * getattr(config, "mlp_ratio", 4)),
    }
    fields["encoder"] = _description(model, mean, std)
    embeddings = HuggingFaceEmbeddings(model, patch, size, channels, mean, std)
    return PretrainedEncoder(embeddings, LayerStack(map(HuggingFaceLayer, layers)), fields)


def _layers(model: nn.Module) -> nn.ModuleList:
    for place in (model, getattr(model, "encoder", None)):
        for name in ("layers", "layer"):
            layers = getattr(place, name, None)
            if isinstance(layers, nn.ModuleList) and len(layers):
                return layers
    raise ValueError(
        f"encoder: expected a vision transformer of the transformers package, with its layers as `layers` or "
        f"`encoder.layer`; {type(model).__name__} has neither"
    )


def _part(model: nn.Module, name: str) -> nn.Module:
    part = getattr(model, name, None)
    if not isinstance(part, nn.Module):
        raise ValueError(f"encoder: expected a vision transformer, but {type(model).__name__} has no {name}")
    return part
