"""What a run is made with, as its checkpoints keep it: what may be another when it goes on, and what may not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from uniflow.checkpoint import CheckpointError
from uniflow.reading import shown
from uniflow.training.processes import Processes
from uniflow.training.recipe import Recipe
from uniflow.training.state import Progress

Differences = dict[str, tuple[Any, Any]]


def settings_of(recipe: Recipe, others: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe, and by name what else a run is made with, as JSON has it."""
    return json.loads(json.dumps({"recipe": asdict(recipe), **others}, default=str, allow_nan=False))


def differences(one: Any, other: Any, key: str = "") -> Differences:
    """Where two settings differ, by keys as in recipe.stages.0.steps; None stands for what is not there."""
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = {name: (one.get(name), other.get(name)) for name in {**one, **other}}
    elif isinstance(one, list) and isinstance(other, list) and any(isinstance(part, dict) for part in other):
        pairs = dict(enumerate(zip_longest(one, other)))
    else:
        return {} if one == other else {key: (one, other)}
    below = [differences(*pair, f"{key}.{name}".removeprefix(".")) for name, pair in pairs.items()]
    return {found: pair for part in below for found, pair in part.items()}


def described(differing: Differences, before: str = "was") -> str:
    """As in "recipe.stages.0.steps (9, was 6)"."""
    # keys too may come from a file
    keys = {key: key if key.isprintable() else shown(key) for key in differing}
    return ", ".join(f"{keys[key]} ({_short(now)}, {before} {_short(was)})" for key, (was, now) in differing.items())


def _short(value: Any) -> str:
    return "none" if value is None else shown(value)


def check_alike(settings: Mapping[str, Any], processes: Processes) -> None:
    """Refuse, in all processes, to train where one of them has other settings than the first.

    Raises:
        ValueError: naming the process and the keys.
    """
    first, *others = processes.of_all(settings)
    for rank, its in enumerate(others, start=1):
        differing = differences(first, its)
        if differing:
            raise ValueError(f"process {rank} of the job has another {described(differing, 'the first has')}")


def place_in(
    recipe: Recipe, differing: Differences, progress: Progress, stages: int, folder: Path
) -> tuple[Progress, bool]:
    """Where a run goes on from a checkpoint, and whether with the checkpoint's optimizer.

    The stage that was under way, or the last one of a finished run, goes on to the end of the budget that it has now,
    at the learning rates of its schedule as it is now. Later stages may be any, more or fewer.

    Args:
        recipe: what it shall go on with.
        differing: what its settings have other values for than those of the checkpoint.
        progress: of the checkpoint.
        stages: how many the checkpoint's recipe has.
        folder: the checkpoint.

    Raises:
        CheckpointError: naming a key that cannot be another.
    """
    current = min(progress.stage, stages - 1)  # whose optimizer it has
    for key, (was, now) in differing.items():
        obstacle = _obstacle(key, was, now, progress, current)
        if obstacle:
            raise CheckpointError(f"{folder} cannot go on with another {described({key: (was, now)})}: {obstacle}")
    if not progress.stage_step:
        return replace(progress, stage=current), False
    if recipe.stages[current].spent(progress.stage_step, progress.stage_seconds) < 1:
        return replace(progress, stage=current), True
    if current + 1 == len(recipe.stages):
        return replace(progress, stage=current + 1), True
    return replace(progress, stage=current + 1, stage_step=0, stage_seconds=0.0), False


def _obstacle(key: str, was: Any, now: Any, progress: Progress, current: int) -> str | None:
    match key.split("."):
        case ["recipe", "ema_decay"] if was is None:
            return "it has no moving average"
        case ["recipe", "stages", number, *_] if int(number) < current:
            return "that stage is over"
        case ["recipe", "stages", number, *rest] if int(number) == current and progress.stage_step:
            if rest in ([], ["train"]) or (rest == ["vision_learning_rate"] and None in (was, now)):
                return "that stage has begun"
            if rest == ["steps"] and now < progress.stage_step:
                return f"that stage has made {progress.stage_step} steps"
            if rest == ["seconds"] and now is not None and now <= progress.stage_seconds:
                return f"that stage has taken {progress.stage_seconds:.0f} s"
    return None
