import json

import pytest
import torch
from torch import nn

from benchmarks.case import Case, Problem, Work, at


def product(layer, x):
    return layer(x)


@pytest.fixture
def make_case():
    """A case of one product; the forms are what the test gives."""

    def make(ours=product, plain=product, libraries=None):
        def build(tokens):
            layer = nn.Linear(16, 16)
            x = torch.randn(tokens, 16, requires_grad=True)
            return Problem(
                inputs=(layer, x),
                ours=ours,
                plain=plain,
                tokens=tokens,
                forward=Work.of(2 * tokens * 256, layer, x, x),
                backward=Work.of(4 * tokens * 256, layer, x, x),
                libraries=libraries or {},
            )

        sizes = (at(tokens=8, quick=True), at(tokens=32, quick=True), at(tokens=64))
        return Case("product", "What does one product cost?", build, cuda=sizes, cpu=sizes)

    return make


@pytest.fixture
def results_file(tmp_path):
    """Writes a results file with one measured entry; its median and quartiles are the test's."""

    def write(name="results.json", median=10.0, spread=0.2, saved=1000, **changes):
        times = {"q1": median - spread / 2, "median": median, "q3": median + spread / 2, "samples": 9}

        def form(factor):
            scaled = {k: v * factor if k != "samples" else v for k, v in times.items()}
            passes = {name: {"wall_ms": scaled, "peak_bytes": 5000} for name in ("forward", "backward", "both")}
            return {**passes, "saved_bytes": saved}

        entries = [
            {
                "case": "flow_head",
                "size": {"tokens": tokens, "dtype": "float32"},
                "status": "measured",
                "tokens": tokens,
                "work": {"forward": {"bytes": 10**6, "flops": 10**8}, "backward": {"bytes": 10**6, "flops": 2 * 10**8}},
                "forms": {"ours": form(1), "plain": form(2), "compile": form(1.5)},
            }
            for tokens in (64, 256)
        ]
        results = {
            "schema": 1,
            "machine": "cpu",
            "environment": {"torch": "2.13.0"},
            "commit": "0" * 12,
            "date": "2026-01-02T03:04:05Z",
            "ceilings": {"copy": 1e10, "product": {"float32": 1e11}},
            "entries": entries,
            **changes,
        }
        path = tmp_path / name
        path.write_text(json.dumps(results))
        return path

    return write
