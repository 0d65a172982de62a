import subprocess
import sys

from tests.compile.compiling import OLDEST, _environment


def test_the_oldest_triton_is_the_one_that_is_used(oldest):
    command = [sys.executable, "-c", "import triton; print(triton.__file__, triton.__version__)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment(oldest))
    assert done.stdout.startswith(str(OLDEST)) == oldest
    assert done.stdout.strip().endswith("3.6.0") or not oldest
