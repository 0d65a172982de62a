"""What becomes of a guidance scale from one step of a drawing to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

SCHEDULES = ("constant", "linear", "cosine")


def guidance_scales(scale: float, sizes: Sequence[int], schedule: str = "constant") -> list[float]:
    """The guidance scale of each step of a drawing.

    With a the share of the picture's tokens that are drawn when a step is done, "constant" is the scale in every step;
    "linear" grows with the tokens, 1 + (scale - 1) * a; "cosine" slowly at first and at last,
    1 + (scale - 1) * (1 - cos(pi * a)) / 2. Both end at the scale. A scale of 1 stays 1.

    Args:
        scale: of guidance; 1 is none.
        sizes: how many tokens each step gives, see `uniflow.unifluid.orders.group_sizes`.
        schedule: one of `SCHEDULES`.

    Raises:
        ValueError: for an unknown schedule.

    Source: "linear" is that of MAR (Li et al. 2024; `sample_tokens`), after Muse; its last step has a share of one
    token less. MAR has no cosine; this one is RAR's (Yu et al. 2024), with a power of 1, which counts the tokens before
    the step.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"cfg_schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if schedule == "constant":
        return [scale] * len(sizes)
    shares = [drawn / sum(sizes) for drawn in accumulate(sizes)]
    if schedule == "cosine":
        shares = [(1 - math.cos(math.pi * share)) / 2 for share in shares]
    return [1 + (scale - 1) * share for share in shares]
