"""Encoders from elsewhere, as UniFlow's own: embeddings, then layers that map tokens to tokens.

InternViT, which UniFlow is built on, has the layers of UniFlow. Vision transformers of the transformers package (ViT,
DINOv2, CLIP, SigLIP, SigLIP2 and their relatives) are adapted by what their modules have in common.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
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
from uniflow.huggingface import HuggingFaceEmbeddings, HuggingFaceLayer, layers_of, used_parts, vision_part
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
    "dinov3_vit",
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
    "vit_mae",
    "vit_msn",
)

# of others, by how their names begin: why not
_WHY_NOT = {
    ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "qwen3_vl"): (
        "its layers take the patches of all pictures in a row, in the order in which it merges them, and some see "
        "windows of them"
    ),
    ("convnext", "dinov3_convnext", "hiera", "swin"): "its layers change the number of tokens",
    ("data2vec-vision",): "its layers take the size of the grid, for their relative positions",
}

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
_AROUND = ("vit_hidden_size", "encoder")


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
        return _from_huggingface(_read_model(Path(source), values)[0], mean, std)
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


def encoder_fields(config: UniFlowConfig) -> dict[str, Any]:
    """The fields of a config that say what its encoder is, as a `PretrainedEncoder` has them."""
    return {name: getattr(config, name) for name in (*ENCODER_ARCHITECTURE, *_INTERNVIT_CHOICES, *_AROUND)}


def new_encoder(config: UniFlowConfig, state: Mapping[str, Tensor] | None = None) -> PretrainedEncoder:
    """An encoder of a config, on the CPU, into whose parameters a state is to be loaded.

    Arguments and errors as of `described_encoder`, which makes those of the transformers package.
    """
    if config.encoder is not None:
        return described_encoder(config, state)

    def build() -> nn.ModuleDict:
        return nn.ModuleDict({"embeddings": Embeddings(config), "encoder": Encoder(config)})

    if state is not None:
        outline(build, state, "encoder")
    with torch.device("cpu"):
        made: Any = build()
    return PretrainedEncoder(made["embeddings"], made["encoder"], encoder_fields(config))


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


def description(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any] | None:
    """Of a vision model, for `described_encoder`; None if its configuration alone would make another one.

    All that is asked of the model is its `config`, its embeddings and its layers.
    """
    transformers = transformers_package()
    config: Any = model.config
    if type(config) not in transformers.MODEL_MAPPING or config.model_type not in _KINDS:
        return None
    with torch.device("meta"):
        again = vision_part(transformers.AutoModel.from_config(config, trust_remote_code=False))
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


def _refuse_kind(source: str, kind: object, values: Mapping[str, Any]) -> None:
    """Say why models of a kind, or of such a configuration, cannot serve, where that is known."""
    for names, reason in _WHY_NOT.items():
        if isinstance(kind, str) and kind.startswith(names):
            raise ValueError(f"{source}: a model of the kind {shown(kind)} cannot be used here: {reason}")
    for name in ("use_relative_position_bias", "use_shared_relative_position_bias"):
        if values.get(name):
            raise ValueError(f"{source}: {name} is not supported: layers would take the size of the grid for it")


def unused_tensors(source: str | Path, kind: str) -> dict[str, Tensor]:
    """What the vision model in a folder of the transformers package has beside an encoder: a last norm, a pooler ...

    Args:
        source: a folder, or a repository on the Hub.
        kind: of the vision model, as a description has it: "vit" for a ViT-MAE.

    Returns:
        Tensors by the names that the vision model has for them.

    Raises:
        FileNotFoundError, CheckpointError, ImportError: as of `pretrained_encoder`.
        ValueError: as there; if the vision model is of another kind.
    """
    folder = local_folder(source)
    model, missing = _read_model(folder, read_config(folder))
    vision: Any = vision_part(model)
    found = vision.config.model_type
    if found != kind and (found, kind) != ("vit_mae", "vit"):
        raise ValueError(f"original: expected a {kind}, as the encoder is, got a {found}")
    place = next(name for name, module in model.named_modules() if module is vision)
    used = {name for name, module in vision.named_modules() if any(module is part for part in used_parts(vision))}
    return {
        name: tensor
        for name, tensor in vision.state_dict().items()
        if f"{place}.{name}".lstrip(".") not in missing
        and (name.endswith(_NOT_NEEDED) or not any(name.startswith(f"{part}.") for part in used))
    }


def _read_model(folder: Path, values: dict[str, Any]) -> tuple[nn.Module, list[str]]:
    """The model in a folder of the transformers package, if what is used of it has its weights; keys that have none.

    Of an InternVL the vision part alone is made.
    """
    config_of_vision = vision_config(values)
    alone = config_of_vision.get("model_type") == "internvl_vision"
    values = config_of_vision if alone else values
    _refuse_kind(str(folder), values.get("model_type"), values)
    config = configuration(values, str(folder), _is_vision)
    state = read_state(folder, mark="encoder.layer.0." if alone else None, usual="model.vision_tower.")
    model, wrong = loaded_model(transformers_package().AutoModel, config, state, str(folder))
    vision = vision_part(model)
    used = used_parts(vision)
    names = [f".{name}." for name, module in model.named_modules() if any(module is part for part in used)]
    # of the rest (a pooler, a classifier, a text encoder, a token for what is masked) nothing is needed
    refuse_keys(
        folder,
        {
            kind: [key for key in keys if any(name in f".{key}." for name in names) and not key.endswith(_NOT_NEEDED)]
            for kind, keys in wrong.items()
        },
    )
    return model, wrong["missing"]


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
    state = nn.ModuleList(used_parts(model)).state_dict()
    return {name: tensor.shape for name, tensor in state.items() if not name.endswith(_NOT_NEEDED)}


def _unmasked(model: Any) -> nn.Module:
    """A ViT-MAE as the ViT that it is when nothing is masked; itself leaves out patches, and shuffles the rest."""
    transformers = transformers_package()
    known = transformers.ViTConfig()
    values = {name: value for name, value in model.config.to_dict().items() if hasattr(known, name)}
    for name in ("model_type", *_NOT_OF_THE_ENCODER):
        values.pop(name, None)
    with torch.device("meta"):
        vit = transformers.ViTModel(transformers.ViTConfig(**values), add_pooling_layer=False)
    vit.load_state_dict(model.state_dict(), assign=True)
    return vit.train(model.training)


def _from_huggingface(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> PretrainedEncoder:
    _check_statistics("mean", mean)
    _check_statistics("std", std)
    model = vision_part(model)
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    _refuse_kind("encoder", kind, getattr(config, "__dict__", {}))
    if kind == "vit_mae":
        model = _unmasked(model)
    layers = layers_of(model)
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
    fields["encoder"] = description(model, mean, std)
    embeddings = HuggingFaceEmbeddings(model, patch, size, channels, mean, std)
    return PretrainedEncoder(embeddings, LayerStack(map(HuggingFaceLayer, layers)), fields)
