"""The root of every run's configuration, and the sections that belong to training."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from hydrax.core.build import ConfigError, Fraction, NonNegative, NonNegativeFloat, Positive
from hydrax.data.loader import DataConfig
from hydrax.models.spec import ModelConfig
from hydrax.parallel.mesh import MeshConfig
from hydrax.train.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class TraceConfig:
    """Which steps `jax.profiler` traces; those after a SIGUSR1, too."""

    start: Positive | None = None  # first step; None: only on SIGUSR1
    steps: Positive = 3  # that are traced


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: Positive = 1000
    batch_size: Positive = 32  # rows per step, on all devices together
    accumulate: Positive = 1  # microbatches a step is cut into
    init_from: str | None = None  # whose weights to start from: a run's folder, folder@step, a mean folder@400,500
    seed: NonNegative = 0  # parameters and data order, or the rows of a task
    eval_every: NonNegative = 250  # steps between validations; 0: only at the end
    eval_rows: Positive = 256  # validation rows
    probes: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # tasks in bytes -> their options, whose accuracy every validation of a model of bytes reports too
    save_every: NonNegative = 250  # steps between checkpoints; 0: only at the end
    keep: Positive = 3  # newest checkpoints kept
    keep_every: NonNegative = 0  # checkpoints of multiples of this step are kept too; 0: none
    keep_best: NonNegative = 0  # checkpoints of lowest validation loss that are kept too
    log_every: Positive = 10  # steps between records
    max_skipped: Positive = 20  # steps in a row without a finite loss after which the run stops
    watchdog: NonNegative = 1800  # seconds without a finished step until the run shows its stacks and ends; 0: never
    remat: Literal["none", "offload", "full", "mixer", "dots"] = "none"  # what the backward pass recomputes
    unroll: Positive = 1  # repeated periods per iteration of the layer scan: longer to compile, faster on CPUs
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 on GPU and TPU
    tensorboard: bool = False  # also write tb/
    wandb: str | None = None  # also log to this Weights & Biases project
    trace: TraceConfig = dataclasses.field(default_factory=TraceConfig)  # into profile/

    def __post_init__(self) -> None:
        if self.batch_size % self.accumulate:
            allowed = f"expected a divisor of train.batch_size = {self.batch_size}"
            raise ConfigError("accumulate", self.accumulate, allowed)
        if self.keep_every and not (self.save_every and self.keep_every % self.save_every == 0):
            allowed = f"expected 0 or a multiple of train.save_every = {self.save_every}, not 0"
            raise ConfigError("keep_every", self.keep_every, allowed)
        if self.keep_best and not (self.eval_every and self.save_every % self.eval_every == 0):
            allowed = f"expected 0, or train.save_every a multiple of train.eval_every = {self.eval_every}, not 0"
            raise ConfigError("keep_best", self.keep_best, allowed)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    tokens: NonNegative = 256  # generated at the end of a run; 0: none
    temperature: NonNegativeFloat = 0.8  # 0: the most likely token every time
    top_p: Fraction = 0.95  # only among the likeliest tokens of this mass; 1: all
    prompt: str = ""  # text to continue; empty: a new document


@dataclasses.dataclass(frozen=True)
class RunConfig:
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
