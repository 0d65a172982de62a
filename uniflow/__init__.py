"""UniFlow: a visual tokenizer that both understands and generates."""

from uniflow.checkpoint import CheckpointError
from uniflow.config import UniFlowConfig
from uniflow.images import denormalize, normalize
from uniflow.model import UniFlow
from uniflow.objective import UniFlowObjective

__all__ = ["CheckpointError", "UniFlow", "UniFlowConfig", "UniFlowObjective", "denormalize", "normalize"]
