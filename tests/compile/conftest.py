import pytest

from tests.compile.compiling import OLDEST


@pytest.fixture(scope="module", params=["installed", "oldest"])
def oldest(request):
    """Both Tritons in turn: whether it is the oldest that is supported."""
    if request.param == "oldest" and not OLDEST.is_dir():
        pytest.skip("the oldest Triton is not installed beside the other: `make test` does it")
    return request.param == "oldest"
