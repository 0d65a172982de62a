"""docs/kernels.md is made of the counts in benchmarks/results, which are no measurements."""

from benchmarks import kernels, results


def test_the_page_is_that_of_the_files():
    assert (results.ROOT / "docs" / "kernels.md").read_text() == kernels.page(results.FOLDER)


def test_no_counts_are_no_page(tmp_path):
    assert kernels.page(tmp_path) is None


def test_counts_are_no_measurements():
    assert (results.FOLDER / "emulated-sm90.json").is_file()
    assert all("emulated" not in file for file in results.load_all(results.FOLDER))
