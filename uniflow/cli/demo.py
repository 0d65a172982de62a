"""`uniflow demo`: from nothing to held-out reconstructions in minutes, on photographs that ship in two PyPI wheels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from uniflow.atomic import replacing, write_json
from uniflow.cli.files import check_folder, check_outputs
from uniflow.cli.inputs import InputError, choose_device
from uniflow.cli.printing import say
from uniflow.cli.training_bar import TrainingBar
from uniflow.config import UniFlowConfig
from uniflow.data import PictureList, RandomCrops
from uniflow.evaluation.similarity import psnr, ssim
from uniflow.model import UniFlow
from uniflow.normalization import normalize, to_uint8
from uniflow.objective import UniFlowObjective
from uniflow.pictures import center_crop, open_picture, to_tensor
from uniflow.training import Recipe, Stage, Trainer

# package -> pictures in it; photographs of people, animals, things and landscapes under free licences
TRAINED_ON = {
    "skimage/data": ("astronaut.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg", "ihc.png"),
    "sklearn/datasets/images": ("china.jpg",),
}
HELD_OUT = {"skimage/data": ("chelsea.png",), "sklearn/datasets/images": ("flower.jpg",)}
LARGEST_SIDE = 512  # pixels; larger pictures would only cost time to crop
STEPS = (1, 4)  # of the sampler, compared side by side
BATCH = 8
CROPS_SCORED = 64  # of each set, at the trained size
SHOWN_TRAINED = 3  # of the pictures trained on, below the held-out ones
SHOWN_SIZE = 96  # pixels, three times the trained size: more of a picture to look at


@dataclass(frozen=True)
class Reconstruction:
    """A picture and what the model makes of it, uint8 [3, H, W], by number of sampling steps."""

    name: str
    original: Tensor
    by_steps: dict[int, Tensor]


def demo(out: Path, seconds: float, seed: int, device: str, force: bool) -> None:
    """Train, then write reconstruction.png, loss.png, metrics.json and checkpoint/ to `out`."""
    missing = [package for package in ("skimage", "sklearn", "matplotlib") if find_spec(package) is None]
    if missing:
        raise InputError(f"the demo needs {', '.join(missing)}: pip install 'uniflow-kernels[demo]'")
    check_folder(out)
    outputs = [out / name for name in ("reconstruction.png", "loss.png", "metrics.json")]
    check_outputs([*outputs, out / "checkpoint" / "model.safetensors"], force)
    chosen = choose_device(device)

    trained_on, held_out = load_pictures(TRAINED_ON), load_pictures(HELD_OUT)
    torch.manual_seed(seed)
    model = UniFlow(UniFlowConfig.preset("tiny")).to(chosen)
    size = model.config.image_size
    crops = RandomCrops(PictureList(trained_on), size, seed)
    stage = Stage(steps=20_000, seconds=seconds, learning_rate=4e-3)
    recipe = Recipe((stage,), batch_size=BATCH, seed=seed, compile=False)  # which takes some of so few seconds
    with TrainingBar() as bar:
        losses = Trainer(UniFlowObjective(model, distill_weight=0.0), crops, recipe, logs=[bar]).run()

    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out / "checkpoint")
    scores = {"held_out": _scores(model, held_out, seed), "trained_on": _scores(model, trained_on, seed)}
    metrics = {
        "train_seconds": seconds,
        "train_steps": len(losses),
        "last_loss": sum(losses[-100:]) / len(losses[-100:]),
        **scores,
        "device": str(chosen),
        "torch": torch.__version__,
    }
    write_json(out / "metrics.json", metrics)
    to_show = held_out | dict(list(trained_on.items())[:SHOWN_TRAINED])
    shown = [_reconstruct(model, name, picture, seed) for name, picture in to_show.items()]
    _draw_reconstructions(shown, set(held_out), out / "reconstruction.png")
    _draw_loss(losses, out / "loss.png")
    for kind, values in scores.items():
        say(f"{kind.replace('_', ' ')}: " + ", ".join(f"{name} {value:.2f}" for name, value in values.items()))
    say(f"written to {out}: reconstruction.png, loss.png, metrics.json, checkpoint/")


def load_pictures(names: Mapping[str, tuple[str, ...]]) -> dict[str, Image.Image]:
    """Pictures by name, of packages that are installed, none of their sides longer than LARGEST_SIDE."""
    pictures = {}
    for folder, files in names.items():
        package, *below = folder.split("/")
        spec = find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations
        for file in files:
            picture = open_picture(Path(spec.submodule_search_locations[0], *below, file))
            picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
            pictures[Path(file).stem] = picture
    return pictures


def _reconstruct(model: UniFlow, name: str, picture: Image.Image, seed: int) -> Reconstruction:
    original = to_tensor(center_crop(picture, SHOWN_SIZE))
    return Reconstruction(name, original, {steps: _decode(model, original[None], steps, seed)[0] for steps in STEPS})


def _scores(model: UniFlow, pictures: dict[str, Image.Image], seed: int) -> dict[str, float]:
    """Mean PSNR and SSIM over random crops of the trained size."""
    crops = RandomCrops(PictureList(pictures), model.config.image_size, seed + 1)
    originals = torch.stack([crops[position].value for position in range(CROPS_SCORED)])
    scores = {}
    for steps in STEPS:
        results = _decode(model, originals, steps, seed)
        scores[f"psnr_{steps}_step"] = psnr(results, originals).mean().item()
        scores[f"ssim_{steps}_step"] = ssim(results, originals).mean().item()
    return scores


@torch.inference_mode()
def _decode(model: UniFlow, originals: Tensor, steps: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return to_uint8(model(normalize(originals.to(model.device)), steps=steps, generator=generator)).cpu()


def _draw_reconstructions(shown: list[Reconstruction], held_out: set[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.1 * (1 + len(STEPS)), 2.35 * len(shown)), layout="constrained", dpi=110)
    grid = figure.subplots(len(shown), 1 + len(STEPS), squeeze=False)
    for row, item in zip(grid, shown, strict=True):
        kind = "held out" if item.name in held_out else "trained on"
        row[0].imshow(item.original.permute(1, 2, 0).numpy(), interpolation="nearest")
        row[0].set_xlabel(f"{item.name} ({kind})")
        for axes, (steps, result) in zip(row[1:], item.by_steps.items(), strict=True):
            axes.imshow(result.permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_xlabel(f"{psnr(result[None], item.original[None]).item():.1f} dB")
            grid[0][1 + STEPS.index(steps)].set_title(f"{steps} step{'s' if steps > 1 else ''}")
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
    grid[0][0].set_title("original")
    with replacing(path) as temporary:
        figure.savefig(temporary)


def _draw_loss(losses: list[float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained", dpi=110)
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.6)
    axes.set(xlabel="step", ylabel="flow matching loss", yscale="log")
    axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary)
