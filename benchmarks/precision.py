"""What fp8 costs in precision: pictures of a trained model, features and velocities at full size, layer by layer."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.case import randomised
from uniflow import UniFlow, UniFlowConfig
from uniflow.cli.demo import HELD_OUT, TRAINED_ON, load_pictures
from uniflow.data import PictureList, RandomCrops
from uniflow.evaluation.similarity import psnr
from uniflow.normalization import normalize, to_uint8
from uniflow.pictures import center_crop, to_tensor
from uniflow_kernels import FlowHead
from uniflow_kernels.modules.fp8_linear import Fp8Linear, why_not_lowered

# dtype of the parameters, and what is in fp8
HEADS = ((torch.float32, None), (torch.bfloat16, None), (torch.float32, "modulations"), (torch.bfloat16, "modulations"))
MODELS = (*HEADS, (torch.float32, "layers and modulations"), (torch.bfloat16, "layers and modulations"))
STEPS = (1, 4)
CROPS = 256
ROWS = 256
SEEDS = 3  # of the base preset's weights and inputs
# linear layers by their names
GROUPS = {
    "encoder: qkv": r"encoder\..*\.qkv",
    "encoder: proj": r"encoder\..*\.proj",
    "encoder: fc1": r"encoder\..*\.fc1",
    "encoder: fc2": r"encoder\..*\.fc2",
    "encoder: first layer": r"encoder\.layers\.0\..*",
    "encoder: all": r"encoder\..*",
    "chal_proj": r"chal_proj\..*",
    "chal_unproj": r"chal_unproj\..*",
    "global blocks": r"global_blocks\..*",
    "encoder and global blocks": r"(encoder|global_blocks)\..*",
    "these and both projections": r"(encoder|global_blocks|chal_proj|chal_unproj)\..*",
}
LAYER_PICTURES = {"demo": (8, 96), "base": (2, 224)}  # how many photographs, and the side of the squares cut from them


def tables(checkpoint: Path) -> Iterator[str]:
    """The lines of both tables, in Markdown.

    Args:
        checkpoint: of a model that `uniflow demo` trained: its held-out pictures are what is reconstructed.
    """
    model = UniFlow.from_pretrained(checkpoint)
    yield (
        f"| {CROPS} held-out crops of {model.config.image_size} px | "
        + " | ".join(f"{steps} step{'s' * (steps > 1)}: PSNR, dB | beside float32, dB" for steps in STEPS)
        + " |"
    )
    yield "|---" * (1 + 2 * len(STEPS)) + "|"
    exact: dict[int, Tensor] = {}
    originals = _originals(model)
    for dtype, quantized in MODELS:
        cells = []
        for steps in STEPS:
            pictures = _reconstructed(model, originals, steps, dtype, quantized)
            exact.setdefault(steps, pictures)
            cells.append(f"{psnr(pictures, originals).mean():.3f}")
            cells.append("" if pictures is exact[steps] else f"{psnr(pictures, exact[steps]).mean():.1f}")
        yield f"| {_named(dtype, quantized)} | " + " | ".join(cells) + " |"
    yield ""
    yield f"| base preset, random weights, {ROWS} rows, {SEEDS} seeds | relative error of the velocity |"
    yield "|---|---|"
    errors = [[*_errors(seed)] for seed in range(SEEDS)]
    for (dtype, quantized), found in zip(HEADS, zip(*errors, strict=True), strict=True):
        yield f"| {_named(dtype, quantized)} | {min(found):.1e} to {max(found):.1e} |"
    torch.manual_seed(0)
    for name, layered in (("demo", model), ("base", UniFlow(UniFlowConfig.preset("base")).eval())):
        yield ""
        yield from _by_layers(layered, name)


def _originals(model: UniFlow) -> Tensor:
    crops = RandomCrops(PictureList(load_pictures(HELD_OUT)), model.config.image_size, seed=1)
    return torch.stack([crops[position].value for position in range(CROPS)])


@torch.inference_mode()
def _reconstructed(model: UniFlow, originals: Tensor, steps: int, dtype: torch.dtype, quantized: str | None) -> Tensor:
    """All of it in `dtype`, from the same noise."""
    model = copy.deepcopy(model).to(dtype)
    if quantized == "modulations":
        model.flow_head.net.precision = "fp8"
    elif quantized is not None:
        model.lower("fp8")
    images = model(normalize(originals), steps=steps, generator=torch.Generator().manual_seed(0))
    return to_uint8(images)


@torch.inference_mode()
def _errors(seed: int) -> Iterator[float]:
    """Of each kind, beside the head in float64: the norm of the difference over that of the velocity."""
    torch.manual_seed(seed)
    config = UniFlowConfig.preset("base")
    row, width = config.patch_values, config.vit_hidden_size
    head = randomised(FlowHead(row, width, row, width, config.num_decoder_layers), torch.bfloat16)
    x, t, c = torch.randn(ROWS, row).bfloat16(), 1000 * torch.rand(ROWS), torch.randn(ROWS, width).bfloat16()
    exact = copy.deepcopy(head).double()(x.double(), t, c.double())
    for dtype, quantized in HEADS:
        head.precision = quantized and "fp8"
        velocity = head.to(dtype)(x.to(dtype), t, c.to(dtype))  # the weights are of bfloat16 in all
        yield ((velocity - exact).norm() / exact.norm()).item()


def _named(dtype: torch.dtype, quantized: str | None) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if quantized is None else f"{name}, {quantized} in fp8"


@torch.inference_mode()
def _by_layers(model: UniFlow, name: str) -> Iterator[str]:
    """What each group of linear layers in fp8 does to a model in float32, and bfloat16 beside it."""
    count, side = LAYER_PICTURES[name]
    pictures = [*load_pictures(HELD_OUT).values(), *load_pictures(TRAINED_ON).values()][:count]
    images = normalize(torch.stack([to_tensor(center_crop(picture, side)) for picture in pictures]))
    exact = _numbers(model, images)
    yield f"| {name}, {len(images)} photographs of {side} px; in fp8: | layers | 1 - cosine | latents | condition |"
    yield "|---|---|---|---|---|"
    for group, pattern in GROUPS.items():
        lowered = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})
        layers = {
            at: layer
            for at, layer in lowered.named_modules()
            if re.fullmatch(pattern, at) and isinstance(layer, nn.Linear) and why_not_lowered(layer) is None
        }
        for at, layer in layers.items():
            lowered.set_submodule(at, Fp8Linear.of(layer))
        yield f"| {group} | {len(layers)} | " + " | ".join(_apart(_numbers(lowered, images), exact)) + " |"
    half = _numbers(copy.deepcopy(model).bfloat16(), images)
    yield "| nothing, in bfloat16 | 0 | " + " | ".join(_apart(half, exact)) + " |"


def _numbers(model: UniFlow, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Layers' outputs, latents and conditions, in float64."""
    states = list(model.layer_states(images))
    latents = model.latents(states[-1])
    return [state.double() for state in states], latents.double(), model.condition(latents).double()


def _apart(ours: tuple[list[Tensor], Tensor, Tensor], exact: tuple[list[Tensor], Tensor, Tensor]) -> Iterator[str]:
    """The farthest layer by the cosine, and the relative errors of latents and conditions."""
    similar = [torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in zip(ours[0], exact[0], strict=True)]
    yield f"{max(0.0, 1 - min(similar)):.1e}"
    for a, b in zip(ours[1:], exact[1:], strict=True):
        yield f"{((a - b).norm() / b.norm()).item():.1e}"
