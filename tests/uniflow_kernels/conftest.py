"""What the tests of several ops share."""

import os

import pytest

from uniflow_kernels import backend, cpu_kernels


@pytest.fixture(params=["eager", "triton", "cpu"])
def on_each_backend(request):
    """Plain PyTorch, the Triton kernels in the interpreter, and the compiled CPU part."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("tests/gpu runs the kernels on a GPU")
    if request.param == "cpu" and cpu_kernels.why_not_built():
        pytest.skip(cpu_kernels.why_not_built())
    with backend(request.param):
        yield request.param
