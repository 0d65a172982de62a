"""Two machines, as far as one can stand for both: two torchrun agents on the loopback address, a process each."""

import os
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
from torch.distributed.run import main as torchrun

from tests.conftest import fork
from tests.uniflow.test_cli import losses, ok, train_file  # noqa: F401
from tests.uniflow.training.two import free_port

LINE = re.compile(r"^    torchrun (--nnodes .*)$", re.MULTILINE)


@pytest.mark.slow
def test_the_lines_of_the_documentation(capsys, train_file, tmp_path, monkeypatch):  # noqa: F811
    """Both agents, as docs/training.md has them, make the steps that one process makes alone."""
    recipe = "{stages: [{steps: 2}], batch_size: 4, micro_batch_size: 1, log_every: 1}"
    config = train_file(recipe=recipe)
    ok(capsys, "train", config, "--out", tmp_path / "alone")

    lines = LINE.findall((Path(__file__).parents[3] / "docs" / "training.md").read_text())
    small = {
        "--nproc-per-node": "1",
        "--master-addr": "127.0.0.1",
        "--master-port": str(free_port()),
        "train": str(config),
        "--out": str(tmp_path / "nodes"),
    }
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    agents = []
    for line in lines:
        words = shlex.split(line)
        for place, word in enumerate(words):
            if word in small:
                words[place + 1] = small[word]
        agents.append(fork(partial(torchrun, words), tmp_path / f"stderr-{len(agents)}"))
    assert len(agents) == 2
    statuses = [os.waitstatus_to_exitcode(os.waitpid(agent, 0)[1]) for agent in agents]
    said = [(tmp_path / f"stderr-{node}").read_text() for node in range(2)]
    assert statuses == [0, 0], said
    assert losses(tmp_path / "nodes") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert (tmp_path / "nodes" / "log-1.jsonl").exists()  # the second node's process
