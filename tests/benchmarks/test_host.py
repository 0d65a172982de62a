import json
import os
import shutil
import subprocess
import sys

import pytest

from benchmarks import report, results
from benchmarks.__main__ import main
from benchmarks.compare import compare


def entry(median, launches, what="down"):
    times = {"q1": median - 1, "median": median, "q3": median + 1, "samples": 9}
    size = {"what": what, "Triton": "3.6"}
    call = {"host_us": times, "launches": launches}
    return {"case": "host", "size": size, "status": "measured", "forms": {"ours": {"call": call}}}


def test_an_unknown_question_is_named(capsys):
    assert main(["host", "--cases", "launches,lunches"]) == 2
    assert "no question lunches; there are launches, blocks, chunk" in capsys.readouterr().err


def test_the_page_has_a_table_of_its_own_and_no_plot_takes_part(results_file, tmp_path):
    pytest.importorskip("matplotlib")
    files = [results.load(results_file()), results.load(results_file("host.json", entries=[entry(14.2, 1)]))]
    report.write(files, tmp_path / "docs")
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert page.index("### Host time") > page.index("| flow_head | tokens 256")
    assert "| down | 3.6 | 14.2 (13.2-15.2) | 1 |" in page


def test_compare_knows_host_time_and_launches(results_file):
    old, new = (
        results.load(results_file(f"{name}.json", entries=[entry(*of)]))
        for name, of in (("old", (50, 2)), ("new", (14, 1)))
    )
    assert compare(old, new) == [
        "host (what down, Triton 3.6): ours call host_us 50 -> 14 (-72.0%)",
        "host (what down, Triton 3.6): ours call launches 2 -> 1",
    ]


SCRIPT = """
from functools import partial
from unittest.mock import patch
import torch
from benchmarks import host
from benchmarks.host import passes
from benchmarks.__main__ import main
from uniflow_kernels.triton_kernels.activation import activation_backward

def backward(device):
    du, p = (torch.zeros(8, 64, device=device) for _ in range(2))
    yield host.Timed("backward", partial(activation_backward, du, p))
    yield host.Timed("none", torch.Tensor, partial(activation_backward, du, p), per=2)
    yield next(passes.chunk(device))

with patch.object(host, "questions", lambda: {"of a test": backward}):
    raise SystemExit(main(["host", "--seconds", "0.01", "--out", OUT]))
"""


@pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("clang")), reason="no C compiler")
def test_launches_that_do_nothing_are_timed_and_counted(tmp_path):
    """In a process of its own, since what stands in for the driver is for good."""
    out = tmp_path / "host.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = SCRIPT.replace("OUT", repr(str(out)))
    said = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    one, none, chunk = (found["forms"]["ours"]["call"] for found in json.loads(out.read_text())["entries"])
    assert one["launches"] == 2  # the kernel, and the sum of what its programs summed
    assert one["host_us"]["median"] > 0
    assert none["launches"] == -1  # of two calls the first less the second, by what lies between them
    assert none["host_us"]["median"] < 0
    # 13 a block; 8 of the last norm and of sums over programs; 34 of embeddings, input, output, loss and gradients
    assert chunk["launches"] == 13 * 12 + 8 + 34
