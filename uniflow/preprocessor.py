"""preprocessor_config.json: what an image processor of the transformers package does before the encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uniflow.atomic import write_json
from uniflow.normalization import IMAGENET_MEAN, IMAGENET_STD
from uniflow.reading import read_json, shown

PREPROCESSOR = "preprocessor_config.json"
_BICUBIC = 3  # Pillow's number
_CLOSE = 1e-3  # that some files round to


def preprocessor_values(
    image_size: int, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> dict[str, Any]:
    """Resized to cover a square, its middle cut out, in [0, 1], normalised with a mean and std, one a channel."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def write_preprocessor(folder: str | Path, image_size: int) -> Path:
    """Write the file for a tokenizer of a trained size; the folder is made if need be."""
    return write_values(folder, preprocessor_values(image_size))


def write_values(folder: str | Path, values: Mapping[str, Any]) -> Path:
    """Write the file with other values; the folder is made if need be."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / PREPROCESSOR, values)
    return Path(folder) / PREPROCESSOR


def check_preprocessor(folder: str | Path) -> None:
    """See to it that a folder's file, if there is one, says what `uniflow.normalize` does.

    Raises:
        ValueError: if it is no JSON object, or has another mean or std: the model would be given other images.
    """
    path = Path(folder) / PREPROCESSOR
    if not path.exists():
        return
    said = read_json(path)
    for name, own in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        found = said.get(name, own)
        if (
            not isinstance(found, list | tuple)
            or len(found) != len(own)
            or not all(isinstance(a, (int, float)) and abs(a - b) < _CLOSE for a, b in zip(found, own, strict=True))
        ):
            raise ValueError(
                f"{path}: {name}: expected ImageNet's {list(own)}, as uniflow.normalize has, got {shown(found)}"
            )
