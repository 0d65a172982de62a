"""Which tests are a session's own: with --emulate those of kernels, without it those that start such sessions."""

import pytest

INSIDE = ["test_emulator.py", "test_faults.py", "test_kernels.py", "test_losses.py"]


def pytest_ignore_collect(collection_path, config):
    if collection_path.parent.name != "ptx" or not collection_path.name.startswith("test_"):
        return None
    inside = collection_path.name in INSIDE
    return True if inside != bool(config.getoption("--emulate")) else None


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.manual_seed(0)
