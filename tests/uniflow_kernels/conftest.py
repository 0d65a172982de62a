"""What the tests of several ops share."""

import os

import pytest

from uniflow_kernels import backend


@pytest.fixture(params=["eager", "triton"])
def on_each_backend(request):
    """Plain PyTorch, and the Triton kernels in the interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("tests/gpu runs the kernels on a GPU")
    with backend(request.param):
        yield request.param
