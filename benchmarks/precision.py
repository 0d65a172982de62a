"""What fp8 modulations of the flow head cost in precision: pictures of a trained model, and velocities at full size."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.case import randomised
from uniflow import UniFlow, UniFlowConfig
from uniflow.cli.demo import HELD_OUT, load_pictures
from uniflow.data import PictureList, RandomCrops
from uniflow.evaluation.similarity import psnr
from uniflow.normalization import normalize, to_uint8
from uniflow_kernels import FlowHead

# dtype of the parameters, and the precision of the modulations
KINDS = ((torch.float32, None), (torch.bfloat16, None), (torch.float32, "fp8"), (torch.bfloat16, "fp8"))
STEPS = (1, 4)
CROPS = 256
ROWS = 256
SEEDS = 3  # of the base preset's weights and inputs


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
    for dtype, precision in KINDS:
        cells = []
        for steps in STEPS:
            pictures = _reconstructed(model, originals, steps, dtype, precision)
            exact.setdefault(steps, pictures)
            cells.append(f"{psnr(pictures, originals).mean():.3f}")
            cells.append("" if pictures is exact[steps] else f"{psnr(pictures, exact[steps]).mean():.1f}")
        yield f"| {_named(dtype, precision)} | " + " | ".join(cells) + " |"
    yield ""
    yield f"| base preset, random weights, {ROWS} rows, {SEEDS} seeds | relative error of the velocity |"
    yield "|---|---|"
    errors = [[*_errors(seed)] for seed in range(SEEDS)]
    for (dtype, precision), found in zip(KINDS, zip(*errors, strict=True), strict=True):
        yield f"| {_named(dtype, precision)} | {min(found):.1e} to {max(found):.1e} |"


def _originals(model: UniFlow) -> Tensor:
    crops = RandomCrops(PictureList(load_pictures(HELD_OUT)), model.config.image_size, seed=1)
    return torch.stack([crops[position].value for position in range(CROPS)])


@torch.inference_mode()
def _reconstructed(model: UniFlow, originals: Tensor, steps: int, dtype: torch.dtype, precision: str | None) -> Tensor:
    """All of it in `dtype`, from the same noise."""
    model = copy.deepcopy(model).to(dtype)
    model.flow_head.net.precision = precision
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
    for dtype, precision in KINDS:
        head.precision = precision
        velocity = head.to(dtype)(x.to(dtype), t, c.to(dtype))  # the weights are of bfloat16 in all
        yield ((velocity - exact).norm() / exact.norm()).item()


def _named(dtype: torch.dtype, precision: str | None) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if precision is None else f"{name}, modulations in {precision}"
