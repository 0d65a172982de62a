"""Ctrl-C while a call lasts that Python cannot interrupt."""

import subprocess
import sys
import time

import pytest

PROGRAM = """
import hashlib, signal, sys, threading
from uniflow.atomic import replacing
from uniflow.cli.interrupts import answered

{before}
with answered():
    with replacing(sys.argv[1]) as temporary:
        temporary.write_text("half")
        print("done", flush=True)
        {work}
"""
LONG = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000_000)'  # minutes inside one call
SOON = "threading.Timer(0.1, signal.raise_signal, [signal.SIGINT]).start()"


@pytest.mark.parametrize(
    ("work", "status"),
    [(f"{SOON}; {LONG}", 130), ("signal.raise_signal(signal.SIGINT)", 1), ("pass", 0)],
    ids=["inside a call", "between calls", "none"],
)
def test_an_interrupt_is_answered_and_nothing_is_half_written(tmp_path, work, status):
    path = tmp_path / "x.txt"
    path.write_text("old")
    program = PROGRAM.format(before="", work=work)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status if status != 1 else "KeyboardInterrupt" in done.stderr
    assert done.stdout == "done\n"
    assert [found.name for found in tmp_path.iterdir()] == ["x.txt"]
    assert path.read_text() == ("old" if status else "half")
    assert time.monotonic() - start < 30
