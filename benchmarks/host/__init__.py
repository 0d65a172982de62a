"""What calls cost before a GPU has anything to do: the time of Python, of torch's dispatcher and of Triton's launches.

One file, one kind of question: `questions()` names them all. Without a GPU the launches do nothing, see `stand_in`;
with one they are made and not waited for.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import results
from benchmarks.host import stand_in
from benchmarks.measure import quartiles, synchronize

CASE = "host"  # of its entries in a results file
SAMPLE = 2e-3  # seconds that one sample takes at least
LEAST_SAMPLES = 5
MOST_CALLS = 200  # of a sample, so that a GPU's queue does not fill and hold the host up


@dataclass(frozen=True)
class Timed:
    """What is timed: a call, or what is between two of them.

    Args:
        name: of it in the results.
        call: is timed.
        less: a call whose time is taken away, such as that of a smaller head.
        per: what is left is divided by this.
    """

    name: str
    call: Callable[[], Any]
    less: Callable[[], Any] | None = None
    per: int = 1


Question = Callable[[torch.device], Iterator[Timed]]


def questions() -> dict[str, Question]:
    """All questions; each is given the device of its tensors."""
    from benchmarks.host import launches, passes, replays

    return {
        "launches": launches.launches,
        "blocks": passes.blocks,
        "chunk": passes.chunk,
        "replays": replays.replays,
    }


def measure(names: Sequence[str], seconds: float, say: Callable[[str], None]) -> list[results.Entry]:
    """Entries of a results file: microseconds of the process a call, and how many launches it makes.

    Args:
        names: of the questions.
        seconds: how long each call is timed.
        say: is told each line.

    Raises:
        HostError: if nothing can be launched here.
    """
    asked = questions()
    entries = []
    with stand_in.launching() as device:
        for name in names:
            for timed in asked[name](device):
                calls = [timed.call] if timed.less is None else [timed.call, timed.less]
                count = _first_less_second([stand_in.count(call) for call in calls]) / timed.per
                times = quartiles([sample / timed.per for sample in _microseconds(calls, seconds)])
                entry = {
                    "case": CASE,
                    "size": {"what": timed.name, "Triton": stand_in.version()},
                    "status": "measured",
                    "forms": {"ours": {"call": {"host_us": times, "launches": count}}},
                }
                entries.append(entry)
                say(f"{timed.name}: {times['median']:.1f} us ({times['q1']:.1f}-{times['q3']:.1f}), {count:g} launches")
    return entries


def _microseconds(calls: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Samples of the process' time a call; of two calls, in turn, of the first less the second."""
    numbers = []
    for call in calls:
        for _ in range(3):
            call()
        start = time.process_time()
        call()
        numbers.append(min(MOST_CALLS, max(1, int(SAMPLE / max(1e-9, time.process_time() - start)))))
    samples: list[float] = []
    gc.collect()
    end = time.perf_counter() + seconds
    while len(samples) < LEAST_SAMPLES or time.perf_counter() < end:
        each = []
        for call, number in zip(calls, numbers, strict=True):
            synchronize()
            start = time.process_time()
            for _ in range(number):
                call()
            each.append(1e6 * (time.process_time() - start) / number)
        samples.append(_first_less_second(each))
    synchronize()
    return samples


def _first_less_second(each: Sequence[float]) -> float:
    return each[0] - sum(each[1:])
