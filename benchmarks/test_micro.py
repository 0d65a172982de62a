"""The cases as pytest-benchmark micro-benchmarks on a CPU: `pytest benchmarks --benchmark-only`.

For a quick look with the tool people know; `python -m benchmarks run` is what checks, interleaves and records.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.cases import CASES


@pytest.mark.parametrize("form", ["ours", "plain"])
@pytest.mark.parametrize("case", [case for case in CASES.values() if case.cpu], ids=lambda case: case.name)
def test_forward(benchmark: Any, case: Any, form: str) -> None:
    benchmark.group = case.name
    problem = case.problem("cpu", case.sizes("cpu", quick=True)[0].values)
    with torch.no_grad():
        benchmark(getattr(problem, form), *problem.inputs)
