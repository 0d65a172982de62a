"""What the tests of patched heads share."""

from __future__ import annotations

import pytest

from uniflow_kernels.dropin import running


@pytest.fixture
def served(monkeypatch):
    """As where kernels serve every head; what they compute is computed by its definition."""
    monkeypatch.setattr(running, "is_plain", lambda on_cuda: False)
    monkeypatch.setattr(running, "why_not_device", lambda *_: None)
    monkeypatch.setattr(running, "choose_path", lambda call: "eager")
