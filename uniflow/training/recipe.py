"""How to train, as dataclasses: what the Trainer takes, and the whole run as a YAML file describes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from uniflow.reading import read_yaml, shown
from uniflow.recomputation import memory_of
from uniflow_kernels.triton_kernels import why_not_launched

# read by pydantic where a configuration comes from a file; the classes themselves need no pydantic
NO_UNKNOWN_KEYS = {"extra": "forbid"}


@dataclass(frozen=True)
class Stage:
    """A part of a run with its own optimizer and schedule.

    The learning rate rises for `warmup_steps` and falls as a half cosine to `final_learning_rate`, over the budget that
    is further spent: `steps` or, if given, `seconds`. The stage ends when either is spent.

    Attributes:
        steps: optimizer steps.
        train: "all", or "decoder": what is pretrained, UniFlow's encoder, is frozen.
        learning_rate: the highest.
        encoder_learning_rate: the encoder's highest, if it is another.
        vision_learning_rate: the highest of a vision encoder that the student has beside what it is made of; without
            one the encoder is frozen.
        final_learning_rate: where the half cosine ends; those of encoders end at the same share of their highest.
        image_size: what is trained at from here on, in pixels; if not given as before, at first the model's own.
        warmup_steps: may be 0.
        seconds: of training; runs that end by the clock are not repeated to the bit.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    steps: int
    train: Literal["all", "decoder"] = "all"
    learning_rate: float = 1e-3
    encoder_learning_rate: float | None = None
    warmup_steps: int = 50
    seconds: float | None = None
    final_learning_rate: float = 0.0
    image_size: int | None = None
    vision_learning_rate: float | None = None

    def __post_init__(self) -> None:
        at_least(self, 1, "steps")
        _at_most(self, 2**62, "steps")
        rates = ("learning_rate", "encoder_learning_rate", "vision_learning_rate", "final_learning_rate")
        at_least(self, 0, *rates, "warmup_steps")
        _above_zero(self, "seconds", "image_size")
        _one_of(self, "train", ("all", "decoder"))
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate: expected at most the learning_rate, {self.learning_rate}, "
                f"got {self.final_learning_rate}"
            )

    @property
    def encoder_rate(self) -> float:
        """The encoder's highest learning rate."""
        return self.learning_rate if self.encoder_learning_rate is None else self.encoder_learning_rate

    def spent(self, steps: int, seconds: float) -> float:
        """The share of its budget that so many steps and seconds make up; from 1 on it is over."""
        return max(steps / self.steps, seconds / (self.seconds or float("inf")))


@dataclass(frozen=True)
class Recipe:
    """How the Trainer trains.

    Attributes:
        stages: one after the other.
        batch_size: samples in a step, over all processes.
        micro_batch_size: samples in a forward pass of one process; a step makes as many as it needs and adds up their
            gradients. The times and noise of a micro-batch depend on its place in the step, so that the same steps come
            out whatever the number of processes. None: a process's whole share.
        weight_decay: of parameters with more than one dimension; norms and biases have none.
        betas: of AdamW.
        max_gradient_norm: gradients are scaled down to it.
        ema_decay: of an exponential moving average of the parameters, kept and validated where given.
        precision: "bfloat16" runs the forward pass under autocast, and what is frozen beside the student in bfloat16;
            parameters and their updates stay in their dtype. "auto" is bfloat16 on CUDA and float32 elsewhere, see
            `on`.
        teacher_precision: "fp8" has the products of a frozen teacher's layers made of 8-bit floats (docs/fp8.md); None
            leaves them in the teacher's dtype.
        compile: run the student's layers and those of their kind (the teacher's) through torch.compile, which makes one
            of all that are alike. "auto" does where Triton can start kernels on CUDA.
        parallel: with more than one process, "ddp" or "fsdp" (fully_shard, checkpoints in shards).
        seed: of what the objective draws, times and noise (that of crops belongs to the data).
        workers: processes that read samples, for each process that trains.
        log_every, save_every, validate_every: in steps.
        keep: how many checkpoints; older ones are deleted.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    stages: tuple[Stage, ...]
    batch_size: int = 16
    micro_batch_size: int | None = None
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    max_gradient_norm: float = 1.0
    ema_decay: float | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    teacher_precision: Literal["fp8"] | None = None
    compile: Literal["auto"] | bool = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    seed: int = 0
    workers: int = 0
    log_every: int = 10
    save_every: int = 1000
    keep: int = 3
    validate_every: int = 1000

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages: expected at least one")
        at_least(self, 1, "batch_size", "micro_batch_size", "log_every", "save_every", "keep", "validate_every")
        at_least(self, 0, "weight_decay", "workers", "seed")
        # beyond what any machine has, and beyond what random generators take
        _at_most(self, 2**20, "batch_size", "micro_batch_size")
        _at_most(self, 2**10, "workers")
        _at_most(self, 2**63 - 1, "seed")
        _above_zero(self, "max_gradient_norm")
        _one_of(self, "precision", ("auto", "float32", "bfloat16"))
        _one_of(self, "teacher_precision", (None, "fp8"))
        _one_of(self, "compile", ("auto", False, True))
        _one_of(self, "parallel", ("ddp", "fsdp"))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected numbers from 0 and below 1, got {self.betas}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected a number between 0 and 1, got {self.ema_decay}")

    def on(self, device: str, before: Mapping[str, Any] | None = None) -> Recipe:
        """The recipe with what "auto" stands for.

        Args:
            device: kind of device, "cuda" or another.
            before: recipe of the run that is gone on with, as its checkpoint has it: what was chosen stays.
        """
        on_gpu = device == "cuda"
        chosen: dict[str, Any] = {
            "precision": "bfloat16" if on_gpu else "float32",
            "compile": on_gpu and why_not_launched() is None,
        }
        chosen |= {name: value for name, value in (before or {}).items() if name in chosen and value != "auto"}
        return replace(self, **{name: value for name, value in chosen.items() if getattr(self, name) == "auto"})

    def micro_batches(self, world: int) -> tuple[int, int]:
        """Number and size of the micro-batches that each of `world` processes goes through in a step.

        Raises:
            ValueError: if the batch cannot be divided so.
        """
        if self.batch_size % world:
            raise ValueError(f"batch_size: expected a multiple of the {world} processes, got {self.batch_size}")
        share = self.batch_size // world
        size = self.micro_batch_size or share
        if share % size:
            raise ValueError(
                f"micro_batch_size: expected a divisor of a process's share ({self.batch_size} / {world} = {share}), "
                f"got {size}"
            )
        return share // size, size


@dataclass(frozen=True)
class ModelChoice:
    """The model to train: a preset from scratch, a checkpoint folder, or a new decoder around a pretrained encoder.

    `encoder` is a folder that `UniFlow.from_encoder` reads. `config` changes fields of a preset's config, or of the
    decoder's around an encoder. `image_size`, in pixels, `drop_path_rate` and `latent_noise` take the place of what any
    of them has. `checkpointing` recomputes activations in the backward pass: those of the encoder's layers and the
    global blocks ("encoder"), or of the flow head's blocks too ("all"); or as few of the former as it takes for these
    to hold no more bytes at a time than that ("12GB"), or than that share of what they would ("50%"), see
    `UniFlow.gradient_checkpointing_enable`.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    preset: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    encoder: Path | None = None
    image_size: int | None = None
    drop_path_rate: float | None = None
    latent_noise: float | None = None
    checkpointing: str = "none"

    def __post_init__(self) -> None:
        if [self.preset, self.checkpoint, self.encoder].count(None) != 2:
            raise ValueError("expected one of preset, checkpoint and encoder")
        if self.checkpoint is not None and self.config:
            raise ValueError("config: changes a preset or goes around an encoder; a checkpoint has its own")
        if self.checkpointing not in ("none", "encoder", "all"):
            try:
                memory_of(self.checkpointing)
            except ValueError as error:
                raise ValueError(f"checkpointing: expected none, encoder or all, or {error}") from None
        for name in ("image_size", "drop_path_rate", "latent_noise"):
            if getattr(self, name) is not None and name in self.config:
                raise ValueError(f"{name}: is said twice, the other time in config")


@dataclass(frozen=True)
class ObjectiveChoice:
    """The arguments of `UniFlowObjective`.

    `teacher` is a folder whose encoder teaches (see `EncoderTeacher.from_pretrained`); without one it is the student's
    own as it was at the start. `distill_weight` is 1 if not given, or 0 for a preset without a teacher: an encoder that
    knows nothing has nothing to teach. With another `flow_loss` than flow matching the model's flow head has two times
    (`flow_times` of its config), that of a checkpoint too, which is tuned.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    teacher: Path | None = None
    distill_weight: float | None = None
    flow_weight: float = 1.0
    beta: float = 2.0
    t_distribution: str = "fat_lognormal"
    t_per: Literal["token", "image"] = "token"
    layer_weights: Literal["adaptive", "uniform"] = "adaptive"
    chunk_tokens: int | Literal["auto"] | None = "auto"
    flow_loss: Literal["flow_matching", "mean_flow", "self_distillation"] = "flow_matching"
    share_equal: float = 0.75


@dataclass(frozen=True)
class DataChoice:
    """Where pictures come from, and how they are cropped.

    Attributes:
        folder: of pictures, at any depth.
        shards: WebDataset tar files, as in "data/train-{0000..0099}.tar" or "data/*.tar".
        validation: folder of pictures for PSNR, SSIM and sample reconstructions.
        validation_features: network for rFID on them, see `uniflow.evaluation.FeatureNetwork`.
        smallest_crop, flip: see `uniflow.data.RandomCrops`.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    folder: Path | None = None
    shards: str | None = None
    validation: Path | None = None
    validation_features: Path | None = None
    smallest_crop: float = 0.25
    flip: bool = True

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.shards is None):
            raise ValueError("expected either folder or shards")
        if self.validation is None and self.validation_features is not None:
            raise ValueError("validation_features: expected a folder in validation, which is scored with it")
        if not 0 < self.smallest_crop <= 1:
            raise ValueError(f"smallest_crop: expected a share in (0, 1], got {self.smallest_crop}")


@dataclass(frozen=True, kw_only=True)
class AnyRun:
    """What every run says, whatever it trains; paths are relative to where the command runs.

    Attributes:
        recipe: how it is trained.
        out: folder for checkpoints and logs.
        tensorboard: whether it is logged for TensorBoard.
        wandb: the project of Weights & Biases that it is logged to, if any.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    recipe: Recipe
    out: Path | None = None
    tensorboard: bool = True
    wandb: str | None = None

    def __post_init__(self) -> None:
        if self.wandb is not None and not self.wandb.strip():
            raise ValueError("wandb: expected the name of a project, got an empty one")


@dataclass(frozen=True, kw_only=True)
class Run(AnyRun):
    """A whole run, as the YAML file of `uniflow train` describes it."""

    __pydantic_config__ = NO_UNKNOWN_KEYS

    model: ModelChoice
    data: DataChoice
    objective: ObjectiveChoice = field(default_factory=ObjectiveChoice)


R = TypeVar("R", bound=AnyRun)


def read_run(path: Path, kind: type[R]) -> R:
    """Read a YAML file that describes a `kind` of run.

    Raises:
        ModuleNotFoundError: if yaml or pydantic is not installed.
        FileNotFoundError: if there is no such file.
        ValueError: if `uniflow.reading` takes it for no YAML, or naming the first key that is wrong, unknown or
            missing.
    """
    import pydantic

    values = read_yaml(path)
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] in ("missing", "value_error") else f", got {shown(first['input'])}"
        raise ValueError(f"{path}: {key + ': ' if key else ''}{message}{got}") from None


def at_least(recipe: object, least: float, *names: str) -> None:
    """Refuse fields below `least` or not finite, by name; None is left alone."""
    for name in names:
        value = getattr(recipe, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def _at_most(recipe: object, most: int, *names: str) -> None:
    for name in names:
        value = getattr(recipe, name)
        if value is not None and value > most:
            raise ValueError(f"{name}: expected at most {most}, got {value}")


def _above_zero(recipe: object, *names: str) -> None:
    for name in names:
        value = getattr(recipe, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}: expected more than 0, got {value}")


def _one_of(recipe: object, name: str, allowed: tuple[str | bool | None, ...]) -> None:
    if getattr(recipe, name) not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {getattr(recipe, name)!r}")
