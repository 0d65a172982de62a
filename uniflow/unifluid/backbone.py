"""The transformer of a UniFluid: any decoder of the transformers package that attends as it is told.

Nothing here knows a family of models. Parts are found by what the package has for that: `get_input_embeddings`,
`get_output_embeddings`, `get_decoder`, a configuration's `get_text_config`, `layer_types` and `sliding_window`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from uniflow.checkpoint import CheckpointError, read_state, refuse_keys
from uniflow.config import check_integer, read_config
from uniflow.foreign import (
    configuration,
    is_language_model,
    loaded_model,
    new_model,
    short_reason,
    transformers_package,
)
from uniflow.reading import shown
from uniflow.unifluid.attention import Sight, attention_of, masks_for, why_not_blocks

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_LARGEST = 1 << 31
_FULL, _SLIDING = "full_attention", "sliding_attention"


def new_backbone(values: dict[str, Any]) -> PreTrainedModel:
    """A language model of a configuration, with new weights.

    Raises:
        ImportError: if the transformers package is not installed.
        ValueError: if the package has none for it.
    """
    transformers = transformers_package()
    try:
        own = configuration(values, "backbone", is_language_model)
        return new_model(transformers.AutoModelForCausalLM, own, "backbone", attn_implementation=attention_of(own))
    except CheckpointError:
        raise
    except ValueError as error:
        raise ValueError(f"backbone: no language model of the transformers package: {error}") from None


def read_backbone(folder: str | Path) -> PreTrainedModel:
    """A pretrained language model from a local folder, to make a UniFluid of.

    Of a folder that also holds an encoder of pictures (Gemma 3) the language model is taken.

    Raises:
        ImportError: if the transformers package is not installed.
        FileNotFoundError: if there is no such folder.
        CheckpointError: if the weights are damaged or of another model; nothing is left to chance.
        ValueError: if it holds no language model.

    Nothing in the folder is executed, and nothing is downloaded.
    """
    transformers = transformers_package()
    if not (Path(folder) / "config.json").exists():
        raise FileNotFoundError(f"no config.json in {folder}")
    try:
        whole = configuration(read_config(folder), str(folder), _has_language_model)
        own = whole.get_text_config(decoder=True)
        if own is whole:
            auto, options = transformers.AutoModelForCausalLM, {"attn_implementation": attention_of(own)}
        elif is_language_model(own.model_type, type(own)):
            auto, options = transformers.AutoModelForImageTextToText, {}
        else:
            raise ValueError(f"transformers has no language model of the kind {own.model_type!r} by itself")
        state = read_state(folder)
        model, wrong = loaded_model(auto, whole, state, str(folder), **options)
        refuse_keys(folder, wrong)
        return model if own is whole else _without_its_encoders(model, own)
    except CheckpointError:
        raise
    except ValueError as error:
        raise ValueError(f"{folder} holds no language model of the transformers package: {error}") from None


def _has_language_model(kind: str, config: Any) -> bool:
    """Whether the language model in a model of more parts can be taken out of it."""
    both = transformers_package().MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return is_language_model(kind, config) or ("text_config" in config.sub_configs and config in both)


def _without_its_encoders(whole: Any, own: Any) -> PreTrainedModel:
    """The language model in a model of more parts, with its weights as they are."""
    own.tie_word_embeddings = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    auto = transformers_package().AutoModelForCausalLM
    model: Any = new_model(auto, own, "text_config", attn_implementation=attention_of(own))
    for part in ("get_decoder", "get_output_embeddings"):
        getattr(model, part)().load_state_dict(getattr(whole, part)().state_dict(), assign=True)
    model.tie_weights()
    return model.eval()


def check_backbone(backbone: Any) -> None:
    """Refuse a model that cannot be a UniFluid's transformer.

    Its configuration says how large it is, its layers attend to all or within a window, and its forward takes
    embeddings, positions and masks. Whether it attends as the masks say is tried on three slots, unless the weights are
    on the meta device.

    Raises:
        ValueError: naming what is missing, or the kind of layer that cannot be used.
    """
    config = backbone.config
    kind = f"backbone: a {config.model_type} cannot be used"
    kinds = getattr(config, "layer_types", None)
    if not (kinds is None or (isinstance(kinds, list) and all(isinstance(layers, str) for layers in kinds))):
        raise ValueError(f"backbone: layer_types: expected a list of kinds, got {shown(kinds)}")
    for layers in _layer_kinds(config):
        if layers not in (_FULL, _SLIDING):
            raise ValueError(f"{kind}: expected layers of {_FULL} or {_SLIDING}, got {shown(layers)}")
        if layers == _SLIDING:
            check_integer("backbone: sliding_window", getattr(config, "sliding_window", None), 1, _LARGEST)
    try:
        sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "max_position_embeddings")}
        tied, embedding = config.tie_word_embeddings, backbone.get_input_embeddings()
        decoder, head = backbone.get_decoder(), backbone.get_output_embeddings()
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(f"{kind}: {error}") from None
    for name, value in sizes.items():
        check_integer(f"backbone: {name}", value, 1, _LARGEST)
    if not isinstance(tied, bool):
        raise ValueError(f"backbone: tie_word_embeddings: expected true or false, got {shown(tied)}")
    if getattr(embedding, "embedding_dim", None) != config.hidden_size:
        raise ValueError(f"{kind}: expected text embeddings of hidden_size {config.hidden_size}")
    for part, wanted in ((decoder, ()), (backbone, ("logits_to_keep",))):
        taken = inspect.signature(part.forward).parameters
        missing = [name for name in ("inputs_embeds", "attention_mask", "position_ids", *wanted) if name not in taken]
        if missing:
            raise ValueError(f"{kind}: its forward takes no {', no '.join(missing)}")
    if head is None or len(layers_of(backbone)) != config.num_hidden_layers:
        raise ValueError(f"{kind}: expected a decoder with a list of layers, and logits of its states")
    if not embedding.weight.is_meta:
        _try(backbone, kind)


@torch.no_grad()
def _try(backbone: Any, kind: str) -> None:
    """A slot that is shown a later one and not the one between: only the later one may change its state."""
    weight = backbone.get_input_embeddings().weight
    slots = torch.randn(1, 3, weight.shape[1], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    slots = slots.to(weight.device, weight.dtype)
    place, sees, visible = torch.tensor([[[0, 0, 0]], [[1, 0, 0]], [[2, 2, 1]]], device=weight.device)
    sight = Sight(place, sees, torch.arange(3, device=weight.device), visible, place)

    def state(*changed: int) -> Tensor:
        signs = torch.ones(3, 1, dtype=weight.dtype, device=weight.device)
        signs[list(changed)] = -1
        return attend(backbone, slots * signs, sight)[0, 0].float()

    training = backbone.training
    try:
        backbone.eval()
        first = state()
        hidden, shown_ = ((state(slot) - first).abs().max() for slot in (1, 2))
    except Exception as error:  # the package raises whatever its models do
        raise ValueError(f"{kind}: {short_reason(error)}") from None
    finally:
        backbone.train(training)
    if not 10 * hidden < shown_:
        raise ValueError(f"{kind}: it does not attend as masks say")


def attend(backbone: Any, embedded: Tensor, sight: Sight, cache: Cache | None = None) -> Tensor:
    """The last states [B, S, D] of slots that see what they are allowed to, and no further than the layers' windows.

    Args:
        backbone: see `check_backbone`.
        embedded: [B, S, D].
        sight: of S slots and K columns; without a cache these are the slots.
        cache: takes the slots' keys and values, and gives those of the columns.
    """
    config, decoder = backbone.config, backbone.get_decoder()
    windows = {kind: config.sliding_window if kind == _SLIDING else None for kind in _layer_kinds(config)}
    # blocks are compiled for a kind of sequence, which drawing has many of
    in_blocks = backbone.training and cache is None and why_not_blocks(backbone, embedded.device) is None
    masks = masks_for(backbone, sight, windows, embedded.dtype, in_blocks)
    mixed = getattr(config, "layer_types", None) is not None
    return decoder(
        inputs_embeds=embedded,
        attention_mask=masks if mixed else masks.popitem()[1],
        position_ids=sight.position,
        use_cache=cache is not None,
        **{_cache_name(type(decoder).forward): cache},
    ).last_hidden_state


def _layer_kinds(config: Any) -> list[str]:
    """Which kinds of layers there are; without `layer_types` all are of one."""
    if (kinds := getattr(config, "layer_types", None)) is not None:
        return sorted(set(kinds))
    if getattr(config, "attention_chunk_size", None) is not None:
        return ["chunked_attention"]
    return [_FULL if getattr(config, "sliding_window", None) is None else _SLIDING]


@lru_cache
def _cache_name(forward: Callable[..., Any]) -> str:
    """What the package calls keys and values in a forward: older versions have it as past_key_values."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def layers_of(backbone: Any) -> list[nn.Module]:
    """The decoder's layers, whatever it calls them."""
    lists = [part for part in backbone.get_decoder().children() if isinstance(part, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def head_and_embedding(backbone: Any) -> tuple[str, str]:
    """The names of the weights that make logits, and of the text embeddings."""
    names = {module: name for name, module in backbone.named_modules()}
    head, embedding = backbone.get_output_embeddings(), backbone.get_input_embeddings()
    return f"{names[head]}.weight", f"{names[embedding]}.weight"


def embedding_scale(backbone: Any) -> float:
    """What text embeddings are multiplied by where they are looked up (Gemma: the square root of their size)."""
    embedding = backbone.get_input_embeddings()
    return float(getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0)))
