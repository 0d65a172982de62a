import threading

import pytest

from uniflow_kernels import backend
from uniflow_kernels.choice import choose, requested


def test_blocks_nest_over_the_environment(monkeypatch):
    assert requested() == "auto"
    monkeypatch.setenv("UNIFLOW_BACKEND", "triton")
    assert requested() == "triton"
    with backend("eager"):
        assert requested() == "eager"
        with backend("auto"):
            assert requested() == "auto"
        assert requested() == "eager"
    assert requested() == "triton"


def test_a_block_holds_in_its_thread_and_the_environment_in_all(monkeypatch):
    found = []
    for name in ("auto", "triton"):
        monkeypatch.setenv("UNIFLOW_BACKEND", name)
        with backend("eager"):
            thread = threading.Thread(target=lambda: found.append(requested()))
            thread.start()
            thread.join()
            assert requested() == "eager"
    assert found == ["auto", "triton"]


def test_auto_takes_the_first_that_can_serve():
    assert choose("op", {"cuda": None, "triton": None}) == "cuda"
    assert choose("op", {"cuda": "not built", "triton": None}) == "triton"
    assert choose("op", {"cuda": "not built", "triton": "no GPU"}) == "eager"
    assert choose("op", {}) == "eager"


def test_a_backend_asked_for_serves_or_raises():
    with backend("triton"):
        assert choose("op", {"cuda": None, "triton": None}) == "triton"
        with pytest.raises(ValueError, match="op: backend 'triton' cannot serve this input: no GPU"):
            choose("op", {"triton": "no GPU"})
        with pytest.raises(ValueError, match="op has no such kernel"):
            choose("op", {"cuda": None})
    with backend("eager"):
        assert choose("op", {"cuda": None}) == "eager"


def test_unknown_names_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend: expected one of auto, eager, triton, cuda, cpu, got 'fast'"):
        backend("fast").__enter__()
    monkeypatch.setenv("UNIFLOW_BACKEND", "quick")
    with pytest.raises(ValueError, match="UNIFLOW_BACKEND: expected one of"):
        requested()
