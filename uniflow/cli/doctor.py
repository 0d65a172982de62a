"""`uniflow doctor`: the report of uniflow_kernels as tables."""

from __future__ import annotations

from dataclasses import asdict

import uniflow_kernels
from uniflow.cli.printing import Column, Table, say, say_json


def doctor(as_json: bool) -> None:
    """Print the report."""
    report = uniflow_kernels.doctor()
    if as_json:
        say_json(asdict(report))
        return
    _print(("environment", "what is here"), list(report.environment.items()))
    say("")
    _print(("op", "runs on", "why not something faster"), [(op.op, op.runs, op.why) for op in report.ops])


def _print(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    table = Table([Column(heading, "", width=width) for heading, width in zip(headings, widths, strict=True)])
    for row in rows:
        table.row(*row)
