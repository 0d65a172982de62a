import os
import shutil
import subprocess
import sys
import time
from functools import partial

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--pretend", type=float, default=0.0, help="sleep for so many seconds in place of each GPU test")


@pytest.hookimpl(trylast=True)  # when there is a reporter
def pytest_configure(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        config.pluginmanager.register(TellAtOnce(reporter))


class TellAtOnce:
    """Failures in full as they happen: `make gpu` may be stopped before pytest would tell them."""

    def __init__(self, reporter):
        self.reporter = reporter

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.reporter.write_line(f"\nfailed: {report.nodeid} ({report.when})\n{report.longreprtext}")
            self.reporter.flush()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """Whether the test was pretended: it passes, without its fixtures, after as long as it is to take."""
    seconds = item.config.getoption("--pretend", 0.0)
    if not seconds:
        return None
    time.sleep(seconds)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for when in ("setup", "call", "teardown"):
        call = pytest.CallInfo.from_call(lambda: None, when=when)
        item.ihook.pytest_runtest_logreport(report=item.ihook.pytest_runtest_makereport(item=item, call=call))
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def under_sanitizer(tool, program):
    """Runs a program under compute-sanitizer and fails with what it says."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program]
    # in memory that torch keeps for later an access beyond a tensor's end is not seen
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.fixture(params=["memcheck", "racecheck"])
def sanitized(request):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("needs compute-sanitizer")
    return partial(under_sanitizer, request.param)


@pytest.fixture
def exact_float32():
    """Products of float32 without TF32, and the same numbers in each run."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    yield
    torch.set_float32_matmul_precision(before)
