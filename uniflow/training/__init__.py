"""Training: the recipe, the loop, checkpoints, logs, and more than one process."""

from uniflow.training.recipe import Recipe, Stage
from uniflow.training.trainer import Trainer

__all__ = ["Recipe", "Stage", "Trainer"]
