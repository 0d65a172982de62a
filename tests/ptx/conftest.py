"""Which tests are a session's own: with --emulate those of kernels, without it those that start such sessions."""

import pytest

OF_CSRC = ["test_losses.py", "test_whole.py"]
INSIDE = ["test_emulator.py", "test_faults.py", "test_kernels.py", *OF_CSRC]


def pytest_ignore_collect(collection_path, config):
    if collection_path.parent.name != "ptx" or not collection_path.name.startswith("test_"):
        return None
    target = config.getoption("--emulate") or ""
    inside = collection_path.name in (OF_CSRC if target.startswith("csrc") else INSIDE)
    return True if inside != bool(target) else None


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.manual_seed(0)
