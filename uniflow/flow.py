"""The times that flow matching is trained at: t = 0 is noise, t = 1 the image, as in the release."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _draw(
    draw: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device | None, generator: torch.Generator | None
) -> Tensor:
    how: dict[str, Any] = {"dtype": torch.float32, "device": device}
    # a call that names a generator, even None, cannot be compiled for a batch of any size
    return draw(shape, **how) if generator is None else draw(shape, **how, generator=generator)


def _lognormal(*how: Any) -> Tensor:
    return _draw(torch.randn, *how).sigmoid_()


def _uniform(*how: Any) -> Tensor:
    return _draw(torch.rand, *how)


def _fat_lognormal(*how: Any) -> Tensor:
    from_tails = _uniform(*how) >= 0.9
    return torch.where(from_tails, _uniform(*how), _lognormal(*how))


T_DISTRIBUTIONS = {"fat_lognormal": _fat_lognormal, "lognormal": _lognormal, "uniform": _uniform}


def sample_t(
    shape: tuple[int, ...],
    distribution: str = "fat_lognormal",
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Times to train at, in [0, 1], float32.

    Args:
        shape: of the result.
        distribution: "uniform"; "lognormal", sigmoid(N(0, 1)); or "fat_lognormal", lognormal with probability 0.9 and
            uniform else (the release's `train_schedule`, from FlowMo).
        device: where the times are wanted.
        generator: of that device.

    Raises:
        ValueError: for an unknown distribution, naming those there are.
    """
    if distribution not in T_DISTRIBUTIONS:
        raise ValueError(f"t_distribution: expected one of {', '.join(T_DISTRIBUTIONS)}, got {distribution!r}")
    return T_DISTRIBUTIONS[distribution](shape, device, generator)


def sample_intervals(
    shape: tuple[int, ...],
    share_equal: float = 0.75,
    distribution: str = "lognormal",
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Where steps begin and end, to train heads of two times at: [*shape, 2], float32, the earlier one first.

    Args:
        shape: of the result but for its last dimension.
        share_equal: how likely both are the same, where the objective is flow matching; 0.75 in the paper.
        distribution: of each time, see `sample_t`.
        device: where the times are wanted.
        generator: of that device.

    Raises:
        ValueError: for an unknown distribution, or a share that is none.

    Source: Geng et al. 2025, Mean Flows for One-step Generative Modeling, with its share of r = t.
    """
    if not 0 <= share_equal <= 1:
        raise ValueError(f"share_equal: expected a number in [0, 1], got {share_equal}")
    begin, end = sample_t((*shape, 2), distribution, device, generator).sort(-1).values.unbind(-1)
    equal = _uniform(shape, device, generator) < share_equal
    return torch.stack([begin, torch.where(equal, begin, end)], dim=-1)
