"""`uniflow show`: a sheet of pictures of what a tokenizer makes of a picture, and of what it sees in it."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from uniflow.atomic import replacing
from uniflow.cli.files import check_outputs, read_picture
from uniflow.cli.inputs import InputError, Named, explained, load_model
from uniflow.cli.printing import say
from uniflow.evaluation.similarity import psnr
from uniflow.normalization import normalize, to_uint8
from uniflow.pictures import center_crop, to_tensor
from uniflow.teachers import EncoderTeacher

_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")
_ACROSS = 4
_STEPS = (1, 4)


def show(
    picture: Path,
    checkpoint: Named,
    out: Path,
    teacher: Path | None,
    size: int | None,
    cfg: float,
    seed: int,
    dtype: str,
    device: str,
    force: bool,
) -> None:
    """Write the sheet to `out`."""
    if find_spec("matplotlib") is None:
        raise InputError("the sheet needs matplotlib: pip install 'uniflow-kernels[demo]'")
    if out.suffix not in _SUFFIXES:
        raise InputError(f"--out: expected a file called *{', *'.join(_SUFFIXES)}, got {out}")
    check_outputs([out], force)
    opened = read_picture(picture)
    model = load_model(checkpoint, device, dtype)
    patch, side = model.config.patch_size, size or model.config.image_size
    if side % patch:
        raise InputError(f"--size: expected a multiple of the patch, {patch} pixels, got {size}")
    original = to_tensor(center_crop(opened, side))
    images = normalize(original[None].to(model.device))
    with explained(), torch.inference_mode():
        taught = None if teacher is None else EncoderTeacher.from_pretrained(teacher).to(model.device)
        latents = model.encode(images)
        drawn = {steps: to_uint8(model.decode(latents, steps=steps, seed=seed))[0].cpu() for steps in _STEPS}
        guided = to_uint8(model.decode(latents, steps=_STEPS[-1], cfg=cfg, seed=seed))[0].cpu()
        panels = {"original": original}
        for steps, result in drawn.items():
            score = psnr(result[None], original[None]).item()
            panels[f"{steps} step{'s' if steps > 1 else ''}, {score:.1f} dB"] = result
        panels[f"{_STEPS[-1]} steps, guidance {cfg:g}"] = guided
        error = (drawn[_STEPS[0]].float() - original.float()).abs().mean(0)
        panels[f"error at 1 step, mean {error.mean().item():.1f} of 255"] = error
        panels[f"latents, 3 of {latents.shape[-1]} components"] = principal_colours(latents[0])
        panels["features of its encoder"] = principal_colours(model.hidden_states(images)[-1][0, model.prefix_tokens :])
        if taught is not None:
            panels["features of the teacher"] = principal_colours(taught.last(images)[0, taught.prefix_tokens :])
    _draw(panels, out)
    say(f"written to {out}: {'; '.join(panels)}")


def principal_colours(tokens: Tensor) -> Tensor:
    """Tokens of a square grid as a picture: their three principal components as red, green and blue.

    Args:
        tokens: [N, D], N a square number.

    Returns:
        uint8 [3, side, side]; each component runs over all of [0, 255], and its largest weight is positive, so that the
        same tokens have the same colours.
    """
    side = math.isqrt(tokens.shape[0])
    if side * side != tokens.shape[0]:
        raise ValueError(f"tokens: expected those of a square grid, got {tokens.shape[0]}")
    x = tokens.double().cpu()
    x = x - x.mean(0)
    _, _, directions = torch.linalg.svd(x, full_matrices=False)
    directions = directions[:3]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    found = x @ (directions * largest.sign()).T
    low, high = found.amin(0), found.amax(0)
    spread = torch.where(high > low, high - low, 1.0)
    colours = ((found - low) / spread * 255).round().to(torch.uint8).T
    colours = torch.cat([colours, colours.new_zeros(3 - colours.shape[0], colours.shape[1])])
    return colours.unflatten(1, (side, side))


def _draw(panels: dict[str, Tensor], out: Path) -> None:
    from matplotlib.figure import Figure

    lines = math.ceil(len(panels) / _ACROSS)
    figure = Figure(figsize=(2.6 * _ACROSS, 2.9 * lines), layout="constrained", dpi=120)
    grid = figure.subplots(lines, _ACROSS, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (title, panel) in zip(grid, panels.items(), strict=False):
        if panel.ndim == 2:
            axes.imshow(panel.numpy(), cmap="magma", vmin=0, interpolation="nearest")
        else:
            axes.imshow(panel.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        figure.savefig(temporary)
