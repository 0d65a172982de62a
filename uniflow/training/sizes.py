"""At which sizes a run trains."""

from __future__ import annotations

from torch import nn

from uniflow.data import Samples
from uniflow.training.interfaces import Resizable
from uniflow.training.recipe import Recipe


def sizes_of(recipe: Recipe, objective: nn.Module, samples: Samples) -> tuple[list[int | None], list[Samples]]:
    """Of each stage the size that the objective has in it, None of one that has none, and the samples.

    Raises:
        ValueError: for a size that the objective or the samples cannot have, naming the stage; for more than one with
            `parallel: fsdp`, which cannot make a sharded parameter another one.
    """
    size = objective.image_size if isinstance(objective, Resizable) else None
    sizes, all_samples = [], []
    for number, stage in enumerate(recipe.stages):
        if stage.image_size is not None:
            size = stage.image_size
            try:
                if not isinstance(objective, Resizable):
                    raise ValueError(f"image_size: a {type(objective).__name__} has none to choose")
                objective.check_image_size(size)
                samples = samples.at_size(size)
            except ValueError as error:
                raise ValueError(f"stages.{number}.{error}") from None
        sizes.append(size)
        all_samples.append(samples)
    if recipe.parallel == "fsdp" and len({*sizes}) > 1:
        raise ValueError(
            f"stages: with parallel: fsdp a run has one image_size, got {sizes}; the model that `uniflow gather` "
            "writes can begin another run"
        )
    return sizes, all_samples
