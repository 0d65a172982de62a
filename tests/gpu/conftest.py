import shutil
import subprocess
import sys

import pytest


@pytest.fixture(params=["memcheck", "racecheck"])
def sanitized(request):
    """Runs a program under compute-sanitizer and fails with what it says."""
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("needs compute-sanitizer")

    def run(program):
        command = ["compute-sanitizer", "--tool", request.param, "--error-exitcode", "9", sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    return run
