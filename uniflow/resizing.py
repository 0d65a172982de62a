"""A trained encoder at another size, or with another rate of drop path; its weights stay."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from uniflow.config import LARGEST_IMAGE, UniFlowConfig, check_integer
from uniflow.encoder import Embeddings, Encoder, LayerStack, drop_path_rates, resize_position_table
from uniflow.foreign import transformers_package
from uniflow.huggingface import NORM, HuggingFaceEmbeddings
from uniflow.pretrained import described_encoder, description
from uniflow.transformer import TransformerLayer

AnyEmbeddings = Embeddings | HuggingFaceEmbeddings

# kinds of the transformers package that interpolate with antialiasing, and how
_ANTIALIASED = {
    "dinov2_with_registers": "bicubic",
    "siglip2_vision_model": "bilinear",
    "tipsv2_vision_model": "bilinear",
}


class Resizable(nn.Module):
    """What a UniFlow has of methods about how it is trained: at which size, with what rate of drop path."""

    config: UniFlowConfig
    embeddings: AnyEmbeddings
    encoder: LayerStack
    global_block_pos_embed: nn.Parameter
    decoder_pos_embed: nn.Parameter
    pretrained_parts: tuple[str, ...]

    def check_image_size(self, image_size: int) -> None:
        """Raise an error unless `resize` can serve."""
        patch = self.config.patch_size
        check_integer("image_size", image_size, patch, LARGEST_IMAGE)
        if image_size % patch:
            raise ValueError(f"image_size: expected a multiple of the patch ({patch}), got {image_size}")
        description_at(self.config, self.embeddings, self.encoder, image_size)

    @torch.no_grad()
    def resize(self, image_size: int, averages: dict[str, Tensor] | None = None) -> None:
        """Change the size that the model is trained at: the positions of encoder and decoder, and the config.

        The positions are interpolated once, as they are in every call with images of another size than the trained one;
        so for images of the new size the model is the same function before and after. They are new parameters: an
        optimizer of before does not have them. Everything else stays the same objects.

        Args:
            image_size: side of the images, in pixels; a multiple of the patch.
            averages: tensors like the parameters, by name; those of positions are replaced by interpolated ones too.

        Raises:
            TypeError, ValueError: for a size that is none, or that the encoder cannot be brought to.
        """
        self.check_image_size(image_size)
        if image_size == self.config.image_size:
            return
        changed = copy.copy(self.config)
        changed.encoder = description_at(self.config, self.embeddings, self.encoder, image_size)
        changed.image_size = image_size
        side, its_way = image_size // changed.patch_size, interpolation(self.embeddings)
        before = {name: parameter.shape for name, parameter in self.named_parameters()}
        resize_embeddings(self.embeddings, image_size)
        for name in ("global_block_pos_embed", "decoder_pos_embed"):
            setattr(self, name, resized(getattr(self, name), side))
        for name, parameter in self.named_parameters():
            if averages is not None and parameter.shape != before[name]:
                way = its_way if name.startswith(self.pretrained_parts) else ("bicubic", False)
                averages[name] = resize_position_table(averages[name], side, *way)
        self.config = changed

    def set_drop_path_rate(self, rate: float) -> None:
        """Let the encoder drop branches in training (stochastic depth) with another rate than its config's.

        Raises:
            ValueError: for a rate that is no probability, or an encoder of another make that has none.
        """
        self.config = set_drop_path(self.config, self.embeddings, self.encoder, rate)


def resized(parameter: nn.Parameter, side: int, mode: str = "bicubic", antialias: bool = False) -> nn.Parameter:
    """A parameter like this one of positions, for another grid; see `uniflow.encoder.resize_position_table`."""
    table = resize_position_table(parameter, side, mode, antialias)
    return nn.Parameter(table, requires_grad=parameter.requires_grad)


def interpolation(embeddings: nn.Module) -> tuple[str, bool]:
    """How an encoder resizes its positions itself for pictures of another size: the mode, and whether antialiased."""
    kind = getattr(getattr(embeddings, "config", None), "model_type", "")
    return _ANTIALIASED.get(kind, "bicubic"), kind in _ANTIALIASED


def resize_embeddings(embeddings: AnyEmbeddings, image_size: int) -> None:
    """Bring positions to another trained size, in place; all other parameters stay the same objects.

    Args:
        embeddings: UniFlow's own, or those of the transformers package.
        image_size: side of the pictures, in pixels.

    Raises:
        ValueError: if the embeddings cannot be made for that size.
    """
    if isinstance(embeddings, HuggingFaceEmbeddings):
        embeddings.embed, embeddings.config = _embed_at(embeddings, image_size)
        embeddings.image_size = image_size
    else:
        side = image_size // embeddings.patch_embedding.kernel_size[0]
        embeddings.position_embedding = resized(embeddings.position_embedding, side)


def description_at(
    config: UniFlowConfig, embeddings: AnyEmbeddings, encoder: LayerStack, image_size: int
) -> dict[str, Any] | None:
    """The `encoder` of a config for another size; None where there is none.

    Raises:
        ValueError: if the encoder cannot be brought to that size.
    """
    if not isinstance(embeddings, HuggingFaceEmbeddings):
        return None
    outline = nn.Module()
    outline.embeddings, outline.config = _embed_at(embeddings, image_size)
    if config.encoder is None:
        return None
    setattr(outline, NORM, None if isinstance(embeddings.norm, nn.Identity) else embeddings.norm)
    outline.layers = nn.ModuleList(layer.layer for layer in encoder.layers)  # type: ignore[misc]
    made = description(outline, config.encoder["mean"], config.encoder["std"])
    if made is None:
        raise ValueError(
            f"image_size: an encoder of the kind {config.encoder['kind']} has layers for {config.image_size} px alone"
        )
    return made


def _embed_at(embeddings: HuggingFaceEmbeddings, image_size: int) -> tuple[nn.Module, Any]:
    """The embeddings that the transformers package makes for a size, with these parameters, and their configuration."""
    own, config = embeddings.embed, copy.deepcopy(embeddings.config)
    side = image_size // embeddings.patch_size
    if getattr(config, "image_size", None) is None:
        config.num_patches = side * side
    else:  # InternVL has both sides
        config.image_size = [image_size] * 2 if isinstance(config.image_size, (list, tuple)) else image_size
    try:
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            made = type(own)(config)
        if isinstance(getattr(made, "mask_token", None), nn.Parameter):  # as HuggingFaceEmbeddings has it
            made.register_parameter("mask_token", None)
        made.to(next(own.parameters()).device).train(own.training)
        for name, parameter in own.named_parameters():
            path, _, last = name.rpartition(".")
            its, given = made.get_parameter(name).shape, parameter
            if its != given.shape:
                given = resized(given, side, *interpolation(embeddings))
            if its != given.shape:
                raise ValueError(f"{name} would be {list(its)}, got {list(given.shape)}")
            setattr(made.get_submodule(path), last, given)
    except Exception as error:  # whatever embeddings of another make do
        raise ValueError(
            f"image_size: {type(own).__name__} of the transformers package cannot be made for {image_size} px: {error}"
        ) from None
    return made, config


def set_drop_path(config: UniFlowConfig, embeddings: AnyEmbeddings, encoder: LayerStack, rate: float) -> UniFlowConfig:
    """Let an encoder's layers drop branches with another rate, in place; the config that says so.

    In UniFlow's own layers the rate rises linearly to this one, as in a new encoder; in those of the transformers
    package it is what they make of their configuration's `drop_path_rate`.

    Raises:
        ValueError: for a rate that is no probability, or an encoder that has none to choose.
    """
    if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate: expected a probability in [0, 1), got {rate!r}")
    changed = copy.copy(config)
    if isinstance(encoder, Encoder):
        changed.drop_path_rate = rate
        for layer, own in zip(encoder.layers, drop_path_rates(changed), strict=True):
            assert isinstance(layer, TransformerLayer)
            layer.drop_path1.rate = layer.drop_path2.rate = own
        return changed
    if config.encoder is None:
        raise ValueError("drop_path_rate: expected an encoder that its configuration describes; set it in the encoder")
    kind = config.encoder["kind"]
    if not hasattr(transformers_package().CONFIG_MAPPING[kind](), "drop_path_rate"):
        raise ValueError(f"drop_path_rate: an encoder of the kind {kind} has none")
    changed.encoder = {**config.encoder, "config": {**config.encoder["config"], "drop_path_rate": rate}}
    made = described_encoder(changed)
    made.encoder.load_state_dict(encoder.state_dict(), assign=True)
    encoder.layers = made.encoder.layers.train(encoder.training)
    embeddings.config = made.embeddings.config
    return changed
