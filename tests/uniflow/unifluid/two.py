"""Two processes: the commands that they execute together; started by test_distributed.py."""

import json
import os
import sys
from pathlib import Path

# what both would import, before there are two
import torchmetrics  # noqa: F401
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

import uniflow.cli.unifluid  # noqa: F401
from tests.uniflow.training.two import both
from uniflow.cli import run


def main(commands: list[list[str]]) -> int:
    """Until one fails; each has a port of its own, on which the two meet."""
    for command in commands:
        if status := run(command):
            return status
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    return 0


if __name__ == "__main__":
    ends = both(lambda: main(json.loads(sys.argv[2])), Path(sys.argv[1]))
    sys.exit("\n".join(message for message, status in ends if status) or 0)
