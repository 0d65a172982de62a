"""One of two processes: the commands that they execute together; started by test_distributed.py."""

import json
import os
import sys

import torch

from uniflow.cli import run


def main(first_port: int, commands: list[list[str]]) -> int:
    """Until one fails; each has a port of its own, on which the two meet."""
    torch.set_num_threads(1)
    for number, command in enumerate(commands):
        os.environ["MASTER_PORT"] = str(first_port + number)
        if status := run(command):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), json.loads(sys.argv[2])))
