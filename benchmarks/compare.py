"""What moved from one results file to another, beyond the spread that each has on its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.results import Entry, key, title

PASSES, CLOCKS = ("forward", "backward", "both", "call"), ("gpu_ms", "wall_ms", "host_us")


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for all that moved: medians by more than both interquartile ranges together, counts by anything."""
    lines = []
    if old["machine"] != new["machine"]:
        lines.append(f"different machines: {old['machine']} and {new['machine']}")
    before = {key(entry): entry for entry in old["entries"]}
    for entry in new["entries"]:
        known = before.pop(key(entry), None)
        if known is not None:
            lines += [f"{title(entry)}: {change}" for change in _changes(known, entry)]
    return lines or ["nothing moved beyond its own spread"]


def _changes(old: Entry, new: Entry) -> Iterator[str]:
    if old["status"] != new["status"]:
        yield f"was {old['status']}, is {new['status']}"
    for label in old["forms"].keys() & new["forms"].keys():
        a, b = old["forms"][label], new["forms"][label]
        for name in PASSES:
            for clock in CLOCKS:
                if (times := (a.get(name, {}).get(clock), b.get(name, {}).get(clock))) and all(times):
                    yield from _moved(f"{label} {name} {clock}", *times)
            yield from _counted(
                f"{label} {name} launches", a.get(name, {}).get("launches"), b.get(name, {}).get("launches")
            )
        yield from _counted(f"{label} saved bytes", a.get("saved_bytes"), b.get("saved_bytes"))


def _moved(what: str, a: dict[str, float], b: dict[str, float]) -> Iterator[str]:
    if abs(b["median"] - a["median"]) > a["q3"] - a["q1"] + b["q3"] - b["q1"]:
        yield f"{what} {a['median']:.4g} -> {b['median']:.4g} ({b['median'] / a['median'] - 1:+.1%})"


def _counted(what: str, a: int | None, b: int | None) -> Iterator[str]:
    if a is not None and b is not None and a != b:
        yield f"{what} {a} -> {b}"
