"""The tests of compiled kernels, each in a process of its own: this one has defined all kernels for the interpreter.

`pytest --emulate 90 tests/ptx` runs them without a process more, and the slow ones too, which `make emulate` runs.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ptx.cuda import nvcc

FOLDER = Path(__file__).parent


def run(target, *files):
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:xdist", "-p", "no:cacheprovider"]
    # what pytest and its plugins say to a worker is not for the session that it starts
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    done = subprocess.run(
        [*command, "--emulate", target, "-m", "not slow", *(str(FOLDER / file) for file in files)],
        cwd=FOLDER.parents[1], env=kept, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


# classes, for which pytest-xdist takes different processes
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
class TestAmpere:
    def test_triton(self):
        run("80", "test_faults.py", "test_kernels.py", "test_losses.py", "test_whole.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
class TestHopper:
    def test_triton(self):
        run("90", "test_faults.py", "test_kernels.py", "test_losses.py", "test_whole.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
class TestBoth:
    def test_emulator(self):
        run("90", "test_emulator.py")

    @pytest.mark.skipif(nvcc() is None, reason="there is no nvcc")
    @pytest.mark.parametrize("target", ["csrc80", "csrc90"])
    def test_csrc(self, target):
        run(target, "test_losses.py", "test_whole.py")
