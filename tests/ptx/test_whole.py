"""What tests before these have run: every kernel of the project, and every asynchronous one in both orders."""

import pytest

from tests.ptx.count import kernels_of
from tests.ptx.counters import short


def test_every_kernel_has_run(request):
    session = request.config.pluginmanager.get_plugin("emulated")
    before = {item.path.name for item in request.session.items}
    if not before >= ({"test_losses.py"} if session.csrc else {"test_losses.py", "test_kernels.py"}):
        pytest.skip("only some of the tests are run")
    assert {short(name) for name in session.emulation.counters} >= kernels_of(session.csrc, session.arch)
