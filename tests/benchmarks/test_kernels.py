"""docs/kernels.md is made of the counts in benchmarks/results, which are no measurements."""

import json

import pytest

from benchmarks import kernels, results
from tests.ptx.count import kernels_of


def test_the_page_is_that_of_the_files():
    assert (results.ROOT / "docs" / "kernels.md").read_text() == kernels.page(results.FOLDER)


@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_is_counted(arch):
    parts = json.loads((results.FOLDER / f"emulated-sm{arch}.json").read_text())["parts"]
    for part, csrc in {"Triton": False, "CUDA": True}.items():
        assert {kernel["kernel"] for kernel in parts[part]} == kernels_of(csrc, arch)


def test_no_counts_are_no_page(tmp_path):
    assert kernels.page(tmp_path) is None


def test_counts_are_no_measurements():
    assert (results.FOLDER / "emulated-sm90.json").is_file()
    assert all("emulated" not in file for file in results.load_all(results.FOLDER))
