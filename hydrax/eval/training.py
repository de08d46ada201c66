"""Training steps of whole configs on random tokens: compiled, and timed on one device."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from hydrax.core.typing import Array
from hydrax.eval.timing import Times, isolated, seconds_of, times_of
from hydrax.models.lm import Blueprint, blueprint
from hydrax.models.spec import BYTE_VOCABULARY
from hydrax.train import folder
from hydrax.train.config import RunConfig
from hydrax.train.loop import compute_dtype
from hydrax.train.optim import make_optimizer, make_schedule
from hydrax.train.state import State, init_state
from hydrax.train.step import make_train_step

PEAK = {"NVIDIA H100 80GB HBM3": 989e12}
"""bf16 FLOP/s of dense matrix products by device, from data sheets."""

WARMUP = 3


@dataclasses.dataclass(frozen=True)
class Sample:
    """A config in a process of its own: seconds of its steps, and what else one sees."""

    device: str
    parameters: int
    compile_seconds: float
    step_seconds: list[float]
    loss: float  # of the last step, on tokens without meaning
    peak_bytes: int | None  # of the device, None where that is not known


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant of the config. `utilisation` counts 6 FLOPs per parameter and token, None on unknown devices."""

    variant: str
    parameters: int
    compile_seconds: float
    step: Times
    tokens_per_second: float
    utilisation: float | None
    peak_bytes: int | None
    loss: float


def training_step(cfg: RunConfig, dtype: jnp.dtype) -> tuple[Blueprint, Callable, Callable[[], State]]:
    """The model, its training step, and what makes its first state."""
    plan = blueprint(cfg.model, remat=cfg.train.remat, unroll=cfg.train.unroll)
    tx = make_optimizer(cfg.optim, cfg.train.steps, plan.meta)
    schedule = make_schedule(cfg.optim, cfg.train.steps)
    how: dict[str, Any] = {"dtype": dtype, "accumulate": cfg.train.accumulate, "z_loss": cfg.optim.z_loss}
    return plan, make_train_step(plan, tx, schedule, **how), lambda: init_state(plan, tx, jax.random.key(0))


def compiled(cfg: RunConfig, dtype: jnp.dtype) -> jax.stages.Compiled:
    """(state, batch) -> (state, metrics), without any array made."""
    _, step, start = training_step(cfg, dtype)
    shapes = jax.eval_shape(functools.partial(batch, cfg))
    return jax.jit(step, donate_argnums=0).lower(jax.eval_shape(start), shapes).compile()


def batch(cfg: RunConfig) -> dict[str, Array]:
    """Rows of random tokens, one document each."""
    B, T = cfg.train.batch_size, cfg.data.seq_len
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, cfg.model.vocab_size or BYTE_VOCABULARY)
    return {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, 1),
        "segment_ids": jnp.ones((B, T), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)),
        "weights": jnp.ones((B, T), jnp.float32),
        "bytes": jnp.full((B,), T, jnp.float32),
    }


def sample(cfg: RunConfig, steps: int) -> Sample:
    """`steps` steps of a config, one after another, in this process."""
    dtype = compute_dtype(cfg.train.dtype)
    began = time.perf_counter()
    step = compiled(cfg, dtype)
    compile_seconds = time.perf_counter() - began
    plan, _, start = training_step(cfg, dtype)
    rows, state, metrics = jax.jit(functools.partial(batch, cfg))(), jax.jit(start)(), {}

    def once() -> dict[str, Array]:
        nonlocal state, metrics
        state, metrics = step(state, rows)
        return metrics

    for _ in range(WARMUP):
        once()
    jax.block_until_ready(metrics)
    seconds = [seconds_of(once) for _ in range(steps)]
    device = jax.local_devices()[0]
    return Sample(
        device=device.device_kind,
        parameters=sum(int(np.prod(shape.shape)) for shape in plan.shapes.values()),
        compile_seconds=compile_seconds,
        step_seconds=seconds,
        loss=float(metrics["loss"]),
        peak_bytes=(device.memory_stats() or {}).get("peak_bytes_in_use"),
    )


def compare(cfgs: dict[str, RunConfig], rounds: int, steps: int, record: Callable[[str, Sample], None]) -> list[Row]:
    """A row per variant. They take turns, each time in a new process, so that no two share the device."""
    samples: dict[str, list[Sample]] = {variant: [] for variant in cfgs}
    for _ in range(rounds):
        for variant, cfg in cfgs.items():
            samples[variant].append(isolated(sample, cfg, steps))
            record(variant, samples[variant][-1])
    return [_row(variant, cfgs[variant], own) for variant, own in samples.items()]


def _row(variant: str, cfg: RunConfig, samples: Sequence[Sample]) -> Row:
    first = samples[0]
    times = times_of([seconds for s in samples for seconds in s.step_seconds], 1)
    speed = cfg.train.batch_size * cfg.data.seq_len / times.median
    peak = PEAK.get(first.device)
    peaks = [s.peak_bytes for s in samples if s.peak_bytes is not None]
    return Row(
        variant=variant,
        parameters=first.parameters,
        compile_seconds=min(s.compile_seconds for s in samples),
        step=times,
        tokens_per_second=speed,
        utilisation=6 * first.parameters * speed / peak if peak else None,
        peak_bytes=max(peaks, default=None),
        loss=samples[-1].loss,
    )


def table(rows: Sequence[Row]) -> Table:
    """A line per variant."""
    columns = ("variant", "parameters", "compile s", "step ms", "tokens/s", "of peak", "GiB")
    result = Table(*columns, caption="of peak: 6 FLOPs per parameter and token against the device's bf16 products")
    for row in rows:
        result.add_row(
            row.variant or "as given",
            f"{row.parameters / 1e6:,.1f}M",
            f"{row.compile_seconds:.1f}",
            f"{1e3 * row.step.median:,.1f}",
            f"{row.tokens_per_second:,.0f}",
            "" if row.utilisation is None else f"{row.utilisation:.1%}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}",
        )
    return result


def environment() -> dict[str, Any]:
    """Where it was measured."""
    return {**isolated(folder.environment), "cores": os.cpu_count()}
