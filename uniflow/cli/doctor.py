"""`uniflow doctor`: the report of uniflow_kernels as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

import uniflow_kernels


def doctor() -> None:
    """Print the report."""
    report = uniflow_kernels.doctor()
    console = Console()
    environment = Table(show_header=False, box=None)
    for name, value in report.environment.items():
        environment.add_row(name, value)
    console.print(environment)
    ops = Table("op", "runs on", "why not something faster")
    for op in report.ops:
        ops.add_row(op.op, op.runs, op.why)
    console.print(ops)
