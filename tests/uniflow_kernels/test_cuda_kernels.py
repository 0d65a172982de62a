import importlib.util

import pytest
import torch

from uniflow_kernels import backend, cuda_kernels, velocity_loss

built = pytest.mark.skipif(
    importlib.util.find_spec("uniflow_kernels._cuda") is None, reason="the CUDA part was not built"
)


def test_a_cpu_is_refused_by_name():
    with backend("cuda"), pytest.raises(ValueError, match=r"velocity_loss: backend 'cuda' cannot serve .* not on cpu"):
        velocity_loss(torch.zeros(1, 4, 48), torch.zeros(1, 3, 8, 8), 4, seed=0)


def test_what_is_not_built_is_said(monkeypatch):
    monkeypatch.setattr(cuda_kernels, "_is_built", lambda: False)
    assert "not built" in cuda_kernels.why_not_built()


@built
def test_the_module_imports_where_there_is_no_driver():
    assert cuda_kernels.why_not_built() is None
    assert cuda_kernels.why_not_patch(3, 14, 592) is None
    assert "does not fit into its shared memory" in cuda_kernels.why_not_patch(3, 64, 3 * 64 * 64)


@built
def test_tiles_fit_into_shared_memory_and_keep_pairs_of_rows():
    module = importlib.import_module("uniflow_kernels._cuda")
    for channels in (1, 3, 4, 16):
        for patch in (1, 2, 3, 7, 14, 16, 32, 50):
            length = channels * patch * patch
            for columns in (length, -(-length // 16) * 16):
                width = module.tile_width(length, columns, 1 << 20)
                floats = -(-length // 4) * 4 + -(-columns // 4)
                assert width * floats <= module.MOST_PIXELS
                assert width % 2 == 0 or width <= 1
                assert (width > 0) == (floats <= module.MOST_PIXELS)
                assert module.tile_width(length, columns, 3) <= 3
