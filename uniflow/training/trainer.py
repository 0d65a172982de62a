"""The training loop. It never waits for the GPU: what a step measured is looked at when it has arrived."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from uniflow.checkpoint import CheckpointError
from uniflow.data import Batch, Positions, Samples, load
from uniflow.training.changes import check_alike, described, differences, place_in, settings_of
from uniflow.training.checkpoints import Checkpoints, random_states, replacing_folder, write_tensors
from uniflow.training.interfaces import Resizable, student_of
from uniflow.training.logs import Log, Report, count_flops, is_finite, peak_flops, peak_memory
from uniflow.training.measures import Measures
from uniflow.training.optimization import (
    MovingAverage,
    averaged,
    check_vision,
    freeze,
    make_optimizer,
    set_learning_rates,
)
from uniflow.training.processes import (
    READER_LOST,
    Processes,
    ProcessLostError,
    gathered,
    replicate,
    shard,
    synchronized,
    watching_readers,
)
from uniflow.training.recipe import Recipe
from uniflow.training.sizes import sizes_of
from uniflow.training.state import (
    Progress,
    read_image_size,
    read_optimizer,
    read_progress,
    read_random_states,
    read_settings,
    read_weights,
    write_training,
    write_weights,
)
from uniflow.training.steps import Arriving, MadeStep, plain
from uniflow.training.validation import Validator
from uniflow_kernels.torch_private import end_readers, tree_map_only


class Trainer:
    """Trains `objective.student` as a recipe says.

    A step takes `recipe.batch_size` of the samples, at positions that follow each other; its times and noise are
    seeded by step and micro-batch. So a run that goes on from a checkpoint makes the steps of one that never stopped,
    to the bit where the device's sums are reproducible.

    A step whose loss or gradient is not finite changes nothing, nor does any later one: the run stops when the host
    learns of it, with the weights as they were before.

    Args:
        objective: a module with a `student`, on the device to train on; called with what `samples` collates, brought to
            that device, it gives `Losses`. See `uniflow.training.interfaces`, and `UniFlowObjective` for one.
        samples: see `uniflow.data.Samples`.
        recipe: see `Recipe`; checkpoints hold it with what "auto" stood for. Its stages may say sizes if the objective
            is `Resizable`.
        out: folder for checkpoints and what is left of failures; nothing is written without one.
        logs: told of every `recipe.log_every`-th step and of a stage's last.
        validator: scores the student every `recipe.validate_every` steps.
        processes: this process's place among others.
        settings: by name, what else the run is made with: kept in checkpoints beside the recipe, as JSON, and compared
            when a run goes on.

    Raises:
        TypeError: if the student lacks something, naming what.
        ValueError: if the recipe does not fit the number of processes, or processes have another one; if a stage's size
            is none for the objective or the samples, or it trains a vision encoder that the student does not have.
    """

    def __init__(
        self,
        objective: nn.Module,
        samples: Samples,
        recipe: Recipe,
        out: Path | None = None,
        logs: Sequence[Log] = (),
        validator: Validator | None = None,
        processes: Processes | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.objective = objective
        self.student = student_of(objective)
        self.samples = samples
        self._asked = recipe
        recipe = self.recipe = recipe.on(self.student.device.type)
        self.out = out
        self.logs = list(logs)
        self.validator = validator
        self.processes = processes or Processes()
        self.device = self.student.device
        self._others = settings or {}
        self.settings = settings_of(recipe, self._others)
        check_alike(self.settings, self.processes)
        self.micro_batches, self.micro_batch_size = recipe.micro_batches(self.processes.world)
        self.checkpoints = Checkpoints(out / "checkpoints", recipe.keep, self.processes) if out else None
        self.progress = Progress()
        self.latest: Path | None = None  # checkpoint
        self._saved = -1  # its step
        self._losses: list[float] = []
        self._measures = Measures()
        self._under_way: deque[MadeStep] = deque()
        self._failed: MadeStep | None = None
        self._halted = torch.zeros(
            (), dtype=torch.float32, device=self.device
        )  # 1 from the first step that is not finite
        self._stop = False
        self._peak = peak_flops(self.device)  # in bfloat16
        check_vision(self.student, recipe)
        self._sizes, self._samples = sizes_of(recipe, objective, samples)  # of each stage
        self._flops = [self._count_flops(number) for number in range(len(recipe.stages))]  # of a sample
        if recipe.teacher_precision is not None:
            self._lower_teacher(recipe.teacher_precision)
        self.average: MovingAverage | None = None
        self._resize(self._sizes[0])
        if recipe.parallel == "fsdp":
            shard(objective, recipe.precision, self.processes)
        if recipe.ema_decay is not None:
            self.average = MovingAverage(self.student, recipe.ema_decay)
        self._start_stage()

    def run(self) -> list[float]:
        """Train to the end of the recipe, or until `stop` is called; then save. The total loss of every step made here.

        Raises:
            FloatingPointError: if a loss or gradient is not finite, naming the step's samples; they, the weights and
                the random states are then in `out`/failure-STEP.
            ProcessLostError: if a process that reads samples has been killed.
        """
        self._prepare()
        self._images, self._since = 0, time.perf_counter()
        self._stage_began = self._since - self.progress.stage_seconds
        self._start_reading()
        self.objective.train()
        with watching_readers():
            try:
                while not self.finished and self._advance():
                    pass
                self.save()
            finally:
                end_readers(self._batches)
        self.objective.eval()
        return self._losses

    @property
    def finished(self) -> bool:
        """Whether all stages are done."""
        return self.progress.stage == len(self.recipe.stages)

    def _start_reading(self) -> None:
        positions = Positions(
            self.progress.samples,
            self.recipe.batch_size,
            self.micro_batch_size,
            self.processes.rank,
            self.processes.world,
        )
        self._batches = load(self.samples, positions, self.recipe.workers, pin_memory=self.device.type == "cuda")

    def stop(self) -> None:
        """Finish the step under way, save, and return from `run`; for signal handlers."""
        self._stop = True

    def _prepare(self) -> None:
        """What waits until it is known how the run goes on: the precision of what is frozen, and compiled layers."""
        lower: Any = getattr(self.objective, "lower_frozen", None)
        if self.recipe.precision != "bfloat16":
            self._peak = None
        elif lower is not None:
            lower(torch.bfloat16)
        if self.recipe.compile:
            kinds = {type(layer) for layer in self.student.layers()}
            for module in self.objective.modules():
                if type(module) in kinds:
                    module.compile()

    def _lower_teacher(self, precision: str) -> None:
        lower: Any = getattr(self.objective, "lower_teacher", None)
        if lower is None:
            raise ValueError(f"teacher_precision: a {type(self.objective).__name__} has no teacher")
        lower(precision)

    def _advance(self) -> bool:
        """A step and what is due after it, or False if the run shall stop."""
        recipe, progress = self.recipe, self.progress
        spent = self.stage.spent(progress.stage_step + 1, self._seconds())
        spent, stop, failed = self.processes.largest(spent, self._stop, self._failed is not None)
        if failed:
            self._fail()
        if stop:
            return False
        progress.step += 1
        progress.stage_step += 1
        progress.samples += recipe.batch_size
        self._under_way.append(self._step(min(spent, 1.0)))
        self._collect(wait=False)
        if progress.step % recipe.validate_every == 0:
            self.validate()
        if spent >= 1:
            self._collect(wait=True)
            progress.stage += 1
            if not self.finished:  # the last one's place is kept: with a larger budget it goes on
                progress.stage_step, self._stage_began = 0, time.perf_counter()
                before = self.samples
                self._start_stage()
                if self.samples is not before:  # what was read ahead is of another size
                    end_readers(self._batches)
                    self._start_reading()
        if progress.step % recipe.save_every == 0:
            self.save()
        return True

    @property
    def _stage_number(self) -> int:
        """Of the stage under way, or the last one of a finished run."""
        return min(self.progress.stage, len(self.recipe.stages) - 1)

    def _start_stage(self) -> None:
        number = self._stage_number
        self.stage, self.samples = self.recipe.stages[number], self._samples[number]
        self._resize(self._sizes[number])
        self.optimizer = make_optimizer(self.student, self.stage, self.recipe)
        self.trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        # what is called to train: DDP looks at what is frozen when it is made
        self.parallel = replicate(self.objective, self.processes)

    def _resize(self, size: int | None) -> None:
        """Bring the objective to a size, with the averages of what it trains."""
        if isinstance(self.objective, Resizable) and size not in (None, self.objective.image_size):
            averages = None if self.average is None else self.average.values
            self.objective.resize(size, averages)
            if self.average is not None:
                self.average.follow(self.student)

    def _count_flops(self, number: int) -> float | None:
        if self._peak is None:
            return None
        freeze(self.student, self.recipe.stages[number])
        samples = self._samples[number]
        values = [samples[position].value for position in range(self.micro_batch_size)]
        flops = count_flops(self.objective, samples.collate(values))
        return None if flops is None else flops / self.micro_batch_size

    def _step(self, spent: float) -> MadeStep:
        """Gradients of all micro-batches, and an update; nothing in here waits for the device."""
        factor = set_learning_rates(self.optimizer, self.stage, self.progress.stage_step, spent)
        batches, seeds, measured = [], [], []
        for number in range(self.micro_batches):
            batch, seed = self._read(), self._seed(number)
            torch.manual_seed(seed)
            with synchronized(self.parallel, last=number == self.micro_batches - 1):
                with self._autocast():
                    losses = self.parallel(*self._moved(batch.inputs))
                (losses.total / self.micro_batches).backward()
            measured.append(self._measures.row(losses))
            batches.append(batch)
            seeds.append(seed)
        own = torch.stack(measured).mean(0)
        skipped = own.new_full((1,), sum(len(batch.skipped) for batch in batches))
        everyone = self.processes.average(torch.cat([own, skipped]))
        norm = self._update(everyone[0])
        numbers = Arriving(torch.cat([own[:1], norm.view(1), everyone]))
        return MadeStep(
            self.progress.step, self.progress.stage, spent, self._seconds(), factor, batches, seeds, numbers
        )

    def _read(self) -> Batch:
        try:
            batch = next(self._batches)
        except (ConnectionError, EOFError, FileNotFoundError):  # it was killed while it handed one over
            raise ProcessLostError(READER_LOST) from None
        if isinstance(batch, Exception):
            raise batch
        return batch

    def _moved(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tree_map_only(Tensor, lambda tensor: tensor.to(self.device, non_blocking=True), inputs)

    def _update(self, loss: Tensor) -> Tensor:
        """Clip, update, average; the gradient's norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.trained, self.recipe.max_gradient_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._halted = torch.maximum(self._halted, 1 - (loss.isfinite() & norm.isfinite()).float())
        # as GradScaler does: the fused kernel then leaves everything as it is
        self.optimizer.found_inf = self._halted  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        return norm

    def _seed(self, number: int) -> int:
        place = self.processes.rank * self.micro_batches + number
        words = np.random.SeedSequence((self.recipe.seed, self.progress.step, place)).generate_state(1, np.uint64)
        return int(words[0])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

    def _seconds(self) -> float:
        return time.perf_counter() - self._stage_began

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """What happens in the block is no training: it counts neither for the stage's budget nor for images/s."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._stage_began += seconds
        self._since += seconds

    # what steps have measured

    def _collect(self, wait: bool) -> None:
        """Look at the steps whose numbers have arrived, or at all."""
        while self._under_way and (wait or self._under_way[0].numbers.here()):
            step = self._under_way.popleft()
            _, norm, loss, *measured, skipped = step.numbers.values()
            if self._failed is None and not is_finite(loss, norm):
                self._failed = step
            if self._failed is not None:
                continue
            self._losses.append(loss)
            self._images += self.recipe.batch_size
            self.progress.skipped += round(skipped * self.processes.world)
            names = [name for batch in step.batches for name in batch.skipped]
            if names:
                for log in self.logs:
                    log.skipped(step.number, names)
            if self.processes.first and (step.number % self.recipe.log_every == 0 or step.spent >= 1):
                self._report(step, norm, loss, measured)

    def _report(self, step: MadeStep, norm: float, loss: float, measured: list[float]) -> None:
        stage, flops = self.recipe.stages[step.stage], self._flops[step.stage]
        now = time.perf_counter()
        rate = self._images / (now - self._since)
        self._images, self._since = 0, now
        report = Report(
            step=step.number,
            stage=step.stage,
            spent=step.spent,
            seconds_left=step.seconds * (1 / step.spent - 1),
            loss=loss,
            measured=self._measures.by_name(measured),
            gradient_norm=norm,
            learning_rate=stage.learning_rate * step.factor,
            encoder_learning_rate=stage.encoder_rate * step.factor if stage.train == "all" else None,
            images_per_second=rate,
            mfu=rate / self.processes.world * flops / self._peak if flops and self._peak else None,
            memory=peak_memory(self.device),
            skipped=self.progress.skipped,
        )
        for log in self.logs:
            log.report(report)

    def _fail(self) -> None:
        """Keep what is needed to look into the step that was not finite, and raise. All processes come here."""
        self._collect(wait=True)  # another process may have seen it first
        step = self._failed
        assert step is not None
        kept = ""
        if self.out is not None:
            folder = self.out / f"failure-{step.number:08}"
            kept = f"; batch, weights before the step and random states are in {folder}"
            with replacing_folder(folder, self.processes) as temporary:
                write_weights(temporary, self.student, None, self.optimizer, self.processes)
                batch = {
                    "inputs": [plain(batch.inputs) for batch in step.batches],  # of each micro-batch
                    "names": step.names,
                    "seeds": step.seeds,  # of torch.manual_seed before each micro-batch
                    **random_states(),
                }
                write_tensors(temporary / f"batch-{self.processes.rank}.pt", batch)
        raise FloatingPointError(f"{step.what_is_wrong()}{kept}; a lower learning rate may help")

    # checkpoints and validation

    def save(self) -> None:
        """Write a checkpoint of the last step, unless there is one. All processes come here together.

        Raises:
            FloatingPointError: see `run`.
            OSError: if it cannot be written; older checkpoints are then as they were.
        """
        self._collect(wait=True)
        if self._failed is not None:  # the same step for all: its numbers are everyone's
            self._fail()
        if self.checkpoints is None or self._saved == self.progress.step:
            return
        self.progress.stage_seconds = self._seconds()
        with self._off_the_clock(), self.checkpoints.writing(self.progress.step) as folder:
            write_weights(folder, self.student, self.average, self.optimizer, self.processes)
            write_training(folder, self.progress, self.settings, self.processes)
        self.latest, self._saved = self.checkpoints.path(self.progress.step), self.progress.step

    def resume(self, folder: Path) -> str:
        """Go on from a checkpoint when `run` is called.

        The stage under way, or the last one of a finished run, goes on to the end of the budget that it has now. What
        the recipe leaves open ("auto") stays as it was.

        Returns:
            What else the checkpoint's run was made with, as in "recipe.stages.0.steps (9, was 6)"; empty if it was the
            same.

        Raises:
            CheckpointError: if it is of another model, was written under another `recipe.parallel`, or cannot go on
                with what has changed, naming the key.
        """
        progress = read_progress(folder)
        there = read_settings(folder, progress)
        self._keep_choices(there, folder)
        differing = differences(there, self.settings)
        stages = len(there["recipe"]["stages"])
        self.progress, begun = place_in(self.recipe, differing, progress, stages, folder)
        if isinstance(self.objective, Resizable):
            was, now = read_image_size(folder), self._sizes[self._stage_number]
            if begun and was != now:
                raise CheckpointError(
                    f"{folder} cannot go on with another image_size ({now}, was {was}): that stage has begun"
                )
            try:
                self._resize(was)
            except ValueError as error:
                raise CheckpointError(f"{folder}: {error}") from None
        read_weights(folder, self.student, self.average, self.processes)
        self._start_stage()
        if begun:
            read_optimizer(folder, self.student, self.optimizer, self.processes)
        read_random_states(folder, self.processes)
        self.latest, self._saved = folder, self.progress.step
        return described(differing)

    def _keep_choices(self, there: dict[str, Any], folder: Path) -> None:
        recipe = self._asked.on(self.device.type, there["recipe"])
        if recipe.parallel == "fsdp" and recipe.precision != self.recipe.precision:
            raise CheckpointError(
                f"{folder} is of a run in {recipe.precision}, and the parameters are sharded for one in "
                f"{self.recipe.precision}: say recipe.precision"
            )
        self.recipe, self.settings = recipe, settings_of(recipe, self._others)

    def validate(self) -> None:
        """Score the student, with its averaged parameters where they are kept, and tell the logs."""
        if self.validator is None:
            return
        # compiled layers would be compiled again for pictures that are scored once in a while
        eager = torch.compiler.set_stance("force_eager") if self.recipe.compile else nullcontext()
        off, averages, whole = self._off_the_clock(), averaged(self.average), gathered(self.objective)
        with off, averages, whole, eager, torch.no_grad(), self._autocast():
            self.student.eval()
            validation = self.validator.score(self.student, self.progress.step, self.processes)
            self.student.train()
        if self.processes.first:
            for log in self.logs:
                log.validation(validation)
