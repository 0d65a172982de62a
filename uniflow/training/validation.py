"""Scoring on what is not trained on, whatever is trained."""

from __future__ import annotations

from typing import Any, Protocol

from uniflow.training.logs import Validation
from uniflow.training.processes import Processes


class Validator(Protocol):
    """What scores a student now and then."""

    def score(self, student: Any, step: int, processes: Processes) -> Validation:
        """Scores of the objective's student, which is in evaluation mode; all processes come here together."""
        ...
