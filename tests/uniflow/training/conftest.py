"""A run of a few quick steps."""

from collections.abc import Callable

import pytest
import torch

from tests.conftest import smooth_picture
from uniflow import UniFlow, UniFlowConfig, UniFlowObjective
from uniflow.data import PictureList, RandomCrops
from uniflow.training import Recipe, Stage, Trainer
from uniflow.training.logs import Log

WIDTH = 48


def small_objective(seed: int = 0, layers: int = 1, drop_path: float = 0.0, **options: object) -> UniFlowObjective:
    """A model of one layer each, 16 px in patches of 4."""
    torch.manual_seed(seed)
    config = UniFlowConfig.preset(
        "tiny",
        image_size=16,
        hidden_size=WIDTH,
        vit_hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_decoder_layers=1,
        drop_path_rate=drop_path,
    )
    return UniFlowObjective(UniFlow(config), **{"distill_weight": 0.5, **options})


def small_crops(count: int = 5) -> RandomCrops:
    return RandomCrops(PictureList({f"{i}.png": smooth_picture((40, 30), i) for i in range(count)}), 16)


class Heard(Log):
    """Everything a log is told."""

    def __init__(self) -> None:
        self.reports, self.validations, self.skips = [], [], []

    def report(self, report):
        self.reports.append(report)

    def validation(self, validation):
        self.validations.append(validation)

    def skipped(self, step, names):
        self.skips.append((step, names))


def make_trainer(*stages: Stage, steps: int = 6, objective=None, crops=None, **options: object) -> Trainer:
    """A Trainer of `stages` (or one stage of `steps`); other keywords are the recipe's or the Trainer's."""
    stages = stages or (Stage(steps, learning_rate=3e-3, warmup_steps=2),)
    own = {name: options.pop(name) for name in ("out", "logs", "validator", "settings") if name in options}
    recipe = Recipe(stages, **{"batch_size": 4, "log_every": 1, **options})
    return Trainer(objective or small_objective(), crops or small_crops(), recipe, **own)


@pytest.fixture
def make() -> Callable[..., Trainer]:
    return make_trainer
