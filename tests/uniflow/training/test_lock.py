"""One run at a time in a folder."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

from uniflow.training import lock
from uniflow.training.lock import LOCK, FolderInUseError, held

# what holds the folder without waiting for torch: the file alone, in a process that has a worker as a run may
HOLDER = """
import os, runpy, signal, sys
from pathlib import Path
held = runpy.run_path(sys.argv[1])["held"]
with held(Path(sys.argv[2])):
    worker = os.fork()
    if worker:
        print(worker, flush=True)
    signal.pause()
"""


@contextmanager
def another_process(folder):
    """One that holds the folder; it and its worker are killed at the end."""
    command = [sys.executable, "-S", "-c", HOLDER, lock.__file__, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    try:
        yield process
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)
        process.communicate()


def test_a_second_run_is_refused_by_the_name_of_the_first(tmp_path):
    with another_process(tmp_path / "run") as process:
        message = f"run is in use by process {process.pid} on {socket.gethostname()}; wait for it"
        for _ in range(2):
            with pytest.raises(FolderInUseError, match=message), held(tmp_path / "run"):
                pytest.fail("held twice")
        process.kill()
        process.wait()
        # its worker still lives, and has no lock
        with held(tmp_path / "run") as locked:
            assert locked
            assert (tmp_path / "run" / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        assert list((tmp_path / "run").iterdir()) == []


def test_what_was_made_for_the_lock_is_taken_away_again(tmp_path):
    out = tmp_path / "new" / "run"
    with pytest.raises(KeyError), held(out):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with held(out):
        (out / "log").touch()
    assert list(out.iterdir()) == [out / "log"]


def test_a_lock_that_was_taken_away_meanwhile_is_none(tmp_path, monkeypatch):
    """The file may be another's by the time that it is locked."""
    lockf, seen = lock.fcntl.lockf, []

    def late(descriptor, how):
        if not seen:
            (tmp_path / LOCK).unlink()
        seen.append(os.fstat(descriptor).st_ino)
        lockf(descriptor, how)

    monkeypatch.setattr(lock.fcntl, "lockf", late)
    with held(tmp_path) as locked:
        assert locked
        assert (tmp_path / LOCK).read_text()
        assert len(seen) == 2


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "lockf", none)
    with held(tmp_path) as locked:
        assert not locked


def test_a_link_in_its_place_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"), held(tmp_path):
        pytest.fail("followed")
    assert (tmp_path / "precious").read_text() == "x"
