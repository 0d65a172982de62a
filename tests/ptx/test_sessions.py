"""The tests of compiled kernels, each in a process of its own: this one has defined all kernels for the interpreter.

`pytest --emulate 90 tests/ptx` runs them without a process more.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("target", "file"), [("90", "test_emulator.py")])
def test_session(target, file):
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:xdist", "-p", "no:cacheprovider"]
    # what pytest and its plugins say to a worker is not for the session that it starts
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    done = subprocess.run(
        [*command, "--emulate", target, str(FOLDER / file)],
        cwd=FOLDER.parents[1], env=kept, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
