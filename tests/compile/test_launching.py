import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compile.compiling import _environment

SCRIPT = Path(__file__).with_name("launching.py")


@pytest.fixture(scope="module")
def said(oldest):
    """What each check failed with, or nothing; by both Tritons."""
    command = [sys.executable, "-m", "tests.compile.launching"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment(oldest))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", re.findall(r"@check\ndef (\w+)", SCRIPT.read_text()))
def test_launch(said, name):
    assert said[name] == "", said[name]
