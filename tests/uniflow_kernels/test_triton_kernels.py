"""Whether Triton can start a kernel here, before one is asked to."""

import shutil
import sysconfig

import pytest
import torch

from uniflow_kernels import triton_kernels

triton = pytest.importorskip("triton")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Set what a machine has: its Triton, whether there is a compiler, and the headers."""

    def make(version, compiler, headers=True):
        monkeypatch.setattr(triton, "__version__", version)
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if compiler else None)
        (tmp_path / "Python.h").touch() if headers else (tmp_path / "Python.h").unlink(missing_ok=True)
        monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
        monkeypatch.setattr(triton_kernels, "architecture", lambda device: 90)
        triton_kernels.why_not_launched.cache_clear()
        return triton_kernels.why_not_on(torch.device("cuda"), torch.bfloat16)

    yield make
    triton_kernels.why_not_launched.cache_clear()


def test_an_older_triton_needs_a_compiler_and_headers(machine):
    assert machine("3.6.0", compiler=True) is None
    assert "needs a C compiler" in machine("3.6.0", compiler=False)
    assert "needs Python.h" in machine("3.7.1", compiler=True, headers=False)


def test_a_newer_one_needs_none(machine):
    assert machine("3.8.0", compiler=False, headers=False) is None
    assert machine("3.10.0+git123", compiler=False, headers=False) is None


def test_a_compiler_may_be_named(machine, monkeypatch):
    machine("3.6.0", compiler=False)
    monkeypatch.setenv("CC", "/opt/cc")
    triton_kernels.why_not_launched.cache_clear()
    assert triton_kernels.why_not_on(torch.device("cuda"), torch.bfloat16) is None
