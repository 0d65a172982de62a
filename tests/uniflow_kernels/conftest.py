"""What the tests of several ops share."""

import os

import pytest

from uniflow_kernels import backend, cpu_kernels


@pytest.fixture(params=["eager", "triton"])
def on_each_backend(request):
    """Plain PyTorch, and the Triton kernels in the interpreter."""
    yield from run_on(request.param)


@pytest.fixture(params=["eager", "triton", "cpu"])
def on_all_backends(request):
    """And the compiled CPU part, for the ops that it has."""
    yield from run_on(request.param)


def run_on(name):
    if name == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("tests/gpu runs the kernels on a GPU")
    if name == "cpu" and cpu_kernels.why_not_built():
        pytest.skip(cpu_kernels.why_not_built())
    with backend(name):
        yield name
