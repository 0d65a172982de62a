"""Two processes: what they do together, each with its own results."""

import json
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.conftest import fork
from tests.uniflow.training.conftest import Heard, small_crops, small_objective
from uniflow.training import Recipe, Stage, Trainer
from uniflow.training.processes import Processes, joined

STAGES = (Stage(3, train="decoder", warmup_steps=0), Stage(3, encoder_learning_rate=1e-3, warmup_steps=0))


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in names.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def both(act: Callable[[], int | None], folder: Path, world: int = 2) -> list[tuple[str, int]]:
    """Let two (or more) processes of a job act and exit; what each said on stderr, and its status."""
    port = free_port()

    def act_as(rank: int) -> int | None:
        os.environ.update(environment(rank, world, port))
        return act()

    said = [folder / f"stderr-{rank}" for rank in range(world)]
    started = [fork(partial(act_as, rank), file) for rank, file in enumerate(said)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
    return [(file.read_text(), status) for file, status in zip(said, statuses, strict=True)]


def trainer(processes: Processes, out: Path, memory: str | None = None, **options: object) -> tuple[Trainer, Heard]:
    """The run that one process and two shall make alike; with a memory, of which layers are recomputed to fit it."""
    recipe = Recipe(
        STAGES, **{"batch_size": 4, "micro_batch_size": 1, "log_every": 1, "ema_decay": 0.9, "save_every": 2, **options}
    )
    heard = Heard()
    objective = small_objective()
    if memory is not None:
        objective.student.gradient_checkpointing_enable(flow_head=False, memory=memory)
    made = Trainer(objective, small_crops(), recipe, out, [heard], processes=processes)
    made.checkpoints.keep = 9
    return made, heard


def results(made: Trainer, heard: Heard) -> dict[str, object]:
    return {
        "losses": made.run(),
        "norms": [report.gradient_norm for report in heard.reports],
    }


def main(folder: Path) -> None:
    """What each of the two does."""

    def together(name: str, processes: Processes, start: Path | None = None, **options: object) -> None:
        made, heard = trainer(processes, folder / name, **options)
        if start is not None:
            made.resume(start)
        found = results(made, heard)
        (folder / f"{name}-{processes.rank}.json").write_text(json.dumps(found))

    with joined(torch.device("cpu")) as (processes, _):
        try:
            trainer(processes, folder / "unlike", batch_size=4 + 2 * processes.rank)
        except ValueError as error:
            (folder / f"unlike-{processes.rank}.json").write_text(json.dumps(str(error)))
        together("ddp", processes, memory="80%")  # in the second stage the encoder keeps less
        together("fsdp", processes, memory="80%", parallel="fsdp")
        together("resumed", processes, folder / "alone" / "checkpoints" / "step-00000002", save_every=9)
        together("half", processes, parallel="fsdp", precision="bfloat16", save_every=9, ema_decay=None)
        if processes.rank == 1:
            register_optimizer_step_post_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        together("killed", processes)
