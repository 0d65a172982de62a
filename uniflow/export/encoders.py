"""The encoder of a tokenizer alone, as a folder that the transformers package or the code of InternViT reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uniflow.atomic import replacing_files
from uniflow.checkpoint import write_state
from uniflow.config import UniFlowConfig, write_config
from uniflow.encoder import Encoder
from uniflow.foreign import configuration, loaded_model, new_model, quiet, transformers_package
from uniflow.huggingface import HuggingFaceEmbeddings, layers_of, used_parts, vision_part
from uniflow.model import UniFlow
from uniflow.preprocessor import preprocessor_values, write_values
from uniflow.pretrained import unused_tensors

KINDS = ("transformers", "internvit")
_SHARD = "50GB"  # what goes into one file

# of InternViT's configuration, as in a UniFlow's
_INTERNVIT = (
    "num_channels",
    "patch_size",
    "image_size",
    "qkv_bias",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "qk_normalization",
    "num_hidden_layers",
    "use_flash_attn",
    "hidden_act",
    "norm_type",
    "layer_norm_eps",
    "dropout",
    "drop_path_rate",
    "attention_dropout",
    "initializer_range",
    "initializer_factor",
)
# InternViT's parameters as the vision model of transformers' InternVL names them; by layer
_OF_INTERNVL = {
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "attn.proj.": "attention.projection_layer.",
    "attn.q_norm.": "attention.q_norm.",
    "attn.k_norm.": "attention.k_norm.",
    "mlp.": "mlp.",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
}
_QK_NORM_EPS = 1e-6  # which the package does not let choose


def write_encoder(
    model: UniFlow, folder: str | Path, to: str = "transformers", original: str | Path | None = None
) -> list[Path]:
    """Write the encoder of a tokenizer, without the rest, as a folder that other packages read.

    Its hidden states are then those of `UniFlow.hidden_states`. The images that it takes are those that
    preprocessor_config.json says: normalised as the encoder was trained on, not as `uniflow.normalize` does it.

    Args:
        model: the tokenizer.
        folder: to write to, made if need be: config.json, the weights and preprocessor_config.json, all or none.
        to: "transformers" for a folder of the kind of model that the encoder is, one of the InternViT kind being the
            vision model of an InternVL; or "internvit" for one of that kind as InternViT's own code has it.
        original: the folder that the encoder came from, or a repository on the Hub: what a tokenizer has not kept of it
            (its last norm, a pooler) is taken from there. Without it the weights lack that.

    Returns:
        The files.

    Raises:
        ImportError: if the transformers package is needed and not installed.
        FileNotFoundError, CheckpointError: as `pretrained_encoder` of the original.
        ValueError: if the encoder cannot be of that kind, or the original has nothing for it.
    """
    if to not in KINDS:
        raise ValueError(f"to: expected {' or '.join(KINDS)}, got {to!r}")
    if isinstance(model.encoder, Encoder):
        if original is not None:
            raise ValueError("original: expected none, since an InternViT has nothing that a tokenizer does not keep")
        made = None if to == "internvit" else _internvl(model)
        state: dict[str, Tensor] = {} if made is None else made.state_dict()
        preprocessor = preprocessor_values(model.config.image_size)
    else:
        if to == "internvit":
            kind = (model.config.encoder or {}).get("kind", "another")
            raise ValueError(f"to: expected transformers for an encoder of the kind {kind!r}: it is no InternViT")
        made, state = _described(model, original)
        preprocessor = _preprocessor(model.embeddings, model.config.encoder)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_files(folder) as place:
        if made is None:
            write_state(nn.ModuleDict({"embeddings": model.embeddings, "encoder": model.encoder}), place)
            write_config(place, _internvit_values(model.config, model.dtype))
        else:
            with quiet(transformers_package()):
                made.save_pretrained(place, state_dict=state, max_shard_size=_SHARD)
        write_values(place, preprocessor)
        names = sorted(path.name for path in place.iterdir())
    return [folder / name for name in names]


def _internvit_values(config: UniFlowConfig, dtype: torch.dtype) -> dict[str, Any]:
    """A config.json of InternViT."""
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        **{name: getattr(config, name) for name in _INTERNVIT},
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _internvl(model: UniFlow) -> Any:
    """The encoder of an official UniFlow as the vision model of an InternVL of the transformers package."""
    config = model.config
    if config.qk_normalization and config.layer_norm_eps != _QK_NORM_EPS:
        raise ValueError(
            f"to: transformers normalises queries and keys of an InternVL with an epsilon of {_QK_NORM_EPS}, expected "
            f"layer_norm_eps to be that, got {config.layer_norm_eps}; internvit keeps it"
        )
    values = {
        "model_type": "internvl_vision",
        "image_size": [config.image_size] * 2,
        "patch_size": [config.patch_size] * 2,
        "num_channels": config.num_channels,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.qk_normalization,
        "hidden_act": config.hidden_act,
        "norm_type": config.norm_type,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_dropout_prob": config.dropout,
        "projection_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "layer_scale_init_value": config.initializer_factor,
        "initializer_range": config.initializer_range,
        "use_mean_pooling": True,  # then there is no norm behind the last layer, as here
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    own = configuration(values, "encoder", lambda *_: True)
    made, wrong = loaded_model(transformers_package().AutoModel, own, _internvl_state(model), "encoder")
    if any(wrong.values()):
        raise ValueError(f"to: this version of transformers has another InternVL than is written here: {wrong}")
    return made


def _internvl_state(model: UniFlow) -> dict[str, Tensor]:
    own = model.embeddings.state_dict()
    state = {
        "embeddings.cls_token": own["class_embedding"],
        "embeddings.position_embeddings": own["position_embedding"],
        "embeddings.patch_embeddings.projection.weight": own["patch_embedding.weight"],
        "embeddings.patch_embeddings.projection.bias": own["patch_embedding.bias"],
    }
    for index, layer in enumerate(model.encoder.layers):
        place = f"encoder.layer.{index}."
        for name, tensor in layer.state_dict().items():
            if name.startswith("attn.qkv."):
                for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                    state[f"{place}attention.{part}_proj.{name.removeprefix('attn.qkv.')}"] = rows
            else:
                start = next(start for start in _OF_INTERNVL if name.startswith(start))
                state[f"{place}{_OF_INTERNVL[start]}{name.removeprefix(start)}"] = tensor
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _described(model: UniFlow, original: str | Path | None) -> tuple[Any, dict[str, Tensor]]:
    """The outline of the model that a tokenizer's encoder is of, and the weights that there are for it."""
    description, own_embeddings = model.config.encoder, model.embeddings
    if description is None:
        raise ValueError("model: expected an encoder that transformers makes from its configuration alone")
    assert isinstance(own_embeddings, HuggingFaceEmbeddings)
    config = configuration({**description["config"], "model_type": description["kind"]}, "encoder", lambda *_: True)
    with torch.device("meta"):
        made = new_model(transformers_package().AutoModel, config, "encoder").to(model.dtype)
    vision = vision_part(made)
    names = {module: name for name, module in made.named_modules()}
    embeddings, *norm, _ = used_parts(vision)
    parts: list[tuple[nn.Module, Any]] = [(embeddings, own_embeddings.embed)]
    parts += [(theirs, own_embeddings.norm) for theirs in norm]
    parts += [(theirs, layer.layer) for theirs, layer in zip(layers_of(vision), model.encoder.layers, strict=True)]
    state = {
        f"{names[theirs]}.{name}": tensor.detach().cpu().contiguous()
        for theirs, own in parts
        for name, tensor in own.state_dict().items()
    }
    if original is not None:
        place = f"{names[vision]}." if names[vision] else ""
        wanted = {name: tensor.shape for name, tensor in made.state_dict().items() if name not in state}
        found = {f"{place}{name}": tensor for name, tensor in unused_tensors(original, description["kind"]).items()}
        rest = {name: tensor for name, tensor in found.items() if wanted.get(name) == tensor.shape}
        if not rest:
            raise ValueError(f"original: {original} has nothing that this encoder lacks, which is {', '.join(wanted)}")
        state |= {name: tensor.to(model.dtype) for name, tensor in rest.items()}
    return made, state


def _preprocessor(embeddings: Any, description: Any) -> dict[str, Any]:
    """What is done to pictures before an encoder of the transformers package."""
    values = preprocessor_values(embeddings.image_size, description["mean"], description["std"])
    if not embeddings.takes_patches:
        return values
    for name in ("size", "do_center_crop", "crop_size"):
        values.pop(name)
    # SigLIP2's keeps the shape of a picture, and gives as many patches as the trained size has
    patches = (embeddings.image_size // embeddings.patch_size) ** 2
    return {
        **values,
        "image_processor_type": "Siglip2ImageProcessor",
        "patch_size": embeddings.patch_size,
        "max_num_patches": patches,
    }
