"""Training steps of whole configs on random tokens: compiled, and timed on one device, one process at a time."""

import dataclasses
import functools
import importlib
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from hydrax.core.typing import Array
from hydrax.eval.kernels import SIDES
from hydrax.eval.sides import workers
from hydrax.eval.timing import Times, isolated, queued, times_of
from hydrax.models.lm import Blueprint, blueprint
from hydrax.models.spec import BYTE_VOCABULARY
from hydrax.train import folder
from hydrax.train.config import RunConfig
from hydrax.train.figure import BASELINE, INK, TRAIN, VALIDATION, blank, quiet, save
from hydrax.train.loop import compute_dtype
from hydrax.train.optim import frozen, make_optimizer, make_schedule
from hydrax.train.state import State, init_state
from hydrax.train.step import make_train_step

PEAK = {"NVIDIA H100 80GB HBM3": 989e12}
"""bf16 FLOP/s of dense matrix products by device, from data sheets."""

WARMUP = 3

PEERS = {"fla": ("hydrax.eval.sides.fla_train", {"eager": False, "torch.compile": True})}
"""The module of another library that trains the same model, and the last argument of its `sample` by variant."""

MEMORY_HEAVY = 8
"""Processes at most that compile a peer's training step at the same time: each holds a few of its layers."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A config in a process of its own: seconds of its steps, and what else one sees."""

    device: str
    parameters: int
    compile_seconds: float
    step_seconds: list[float]
    loss: float  # of the last step, on tokens without meaning
    peak_bytes: int | None  # of the device, None where that is not known
    note: str = ""  # what is wrong with it


@dataclasses.dataclass(frozen=True)
class Variant:
    """Who trains what: `call()` is one turn, in a process of its own."""

    side: str
    name: str
    tokens: int  # per step
    call: Callable[[], Sample]


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant of the config, and all its turns; None for what is not known.

    `utilisation` counts 6 FLOPs per parameter and token; `note` says what is wrong, or why there is nothing else.
    """

    side: str
    variant: str
    parameters: int | None = None
    compile_seconds: float | None = None
    step: Times | None = None
    step_seconds: tuple[float, ...] = ()
    tokens_per_second: float | None = None
    utilisation: float | None = None
    peak_bytes: int | None = None
    loss: float | None = None
    note: str = ""


def training_step(cfg: RunConfig, dtype: jnp.dtype) -> tuple[Blueprint, Callable, Callable[[], State]]:
    """The model, its training step, and what makes its first state."""
    plan = blueprint(
        cfg.model, remat=cfg.train.remat, unroll=cfg.train.unroll, strategy=cfg.mesh.strategy, layout=cfg.mesh.layout
    )
    tx = make_optimizer(cfg.optim, cfg.train.steps, plan.meta)
    schedule = make_schedule(cfg.optim, cfg.train.steps)
    how: dict[str, Any] = {"dtype": dtype, "accumulate": cfg.train.accumulate, "z_loss": cfg.optim.z_loss}
    how |= {"frozen": frozen(cfg.optim, plan.meta), "spike": cfg.optim.spike}
    return plan, make_train_step(plan, tx, schedule, **how), lambda: init_state(plan, tx, jax.random.key(0))


def compiled(cfg: RunConfig, dtype: jnp.dtype) -> jax.stages.Compiled:
    """(state, batch) -> (state, metrics), without any array made."""
    _, step, start = training_step(cfg, dtype)
    shapes = jax.eval_shape(functools.partial(batch, cfg))
    return jax.jit(step, donate_argnums=0).lower(jax.eval_shape(start), shapes).compile()


def batch(cfg: RunConfig) -> dict[str, Array]:
    """Rows of random tokens, one document each; with `data.documents` the model is told so."""
    B, T = cfg.train.batch_size, cfg.data.seq_len
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, cfg.model.vocab_size or BYTE_VOCABULARY)
    facts = {
        "segment_ids": jnp.ones((B, T), jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)),
    }
    return {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, 1),
        "weights": jnp.ones((B, T), jnp.float32),
        "bytes": jnp.full((B,), T, jnp.float32),
        **(facts if cfg.data.documents else {}),
    }


def sample(cfg: RunConfig, steps: int) -> Sample:
    """`steps` steps of a config in this process, one queued while another runs."""
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
    seconds = queued(once, jax.block_until_ready, steps)
    device = jax.local_devices()[0]
    return Sample(
        device=device.device_kind,
        parameters=sum(int(np.prod(shape.shape)) for shape in plan.shapes.values()),
        compile_seconds=compile_seconds,
        step_seconds=seconds,
        loss=float(metrics["loss"]),
        peak_bytes=(device.memory_stats() or {}).get("peak_bytes_in_use"),
    )


def ours(cfgs: dict[str, RunConfig], steps: int) -> list[Variant]:
    """The configs as variants, by name."""
    return [Variant("hydrax", name, _tokens(cfg), functools.partial(sample, cfg, steps)) for name, cfg in cfgs.items()]


def theirs(peer: str, cfg: RunConfig, steps: int) -> list[Variant]:
    """The same model trained by another library.

    Raises:
      ConfigError: a model that it does not have.
    """
    name, variants = PEERS[peer]
    module = importlib.import_module(name)
    module.architecture(cfg.model)
    calls = {variant: functools.partial(module.sample, cfg, steps, last) for variant, last in variants.items()}
    return [Variant(peer, variant, _tokens(cfg), call) for variant, call in calls.items()]


def prepare(peer: str, cfg: RunConfig, seconds: float, say: Callable[[str], None]) -> None:
    """Compiles the peer's kernels in many processes, for as long as it may take."""
    workers.share(
        *(PEERS[peer][0], "compile_share", cfg),
        workers=min(MEMORY_HEAVY, workers.many()),
        seconds=seconds,
        say=lambda text: say(f"compiling kernels of {peer}: {text}"),
    )


def compare(variants: Sequence[Variant], rounds: int, seconds: float) -> Iterator[tuple[Row, list[Row]]]:
    """After every turn its row, and those of all variants so far.

    They take turns, each time in a new process, so that no two share the device. One that fails, or takes longer
    than `seconds`, gets no further turn.
    """
    samples: dict[int, list[Sample]] = {i: [] for i in range(len(variants))}
    failures: dict[int, str] = {}
    for _ in range(rounds):
        for i, variant in enumerate(variants):
            if i in failures:
                continue
            turn = []
            try:
                turn = [workers.limited(seconds, variant.call)]
            except RuntimeError as error:
                failures[i] = f"fails: {error}"
            samples[i] += turn
            rows = [
                _row(v, own, failures.get(j, ""))
                for j, (v, own) in enumerate(zip(variants, samples.values(), strict=True))
                if own or j in failures
            ]
            yield _row(variant, turn, failures.get(i, "")), rows


def _tokens(cfg: RunConfig) -> int:
    return cfg.train.batch_size * cfg.data.seq_len


def _row(variant: Variant, samples: Sequence[Sample], failure: str) -> Row:
    if not samples:
        return Row(variant.side, variant.name, note=failure)
    first = samples[0]
    seconds = tuple(seconds for s in samples for seconds in s.step_seconds)
    times = times_of(list(seconds), 1)
    speed = variant.tokens / times.median
    peak = PEAK.get(first.device)
    peaks = [s.peak_bytes for s in samples if s.peak_bytes is not None]
    return Row(
        side=variant.side,
        variant=variant.name,
        parameters=first.parameters,
        compile_seconds=min(s.compile_seconds for s in samples),
        step=times,
        step_seconds=seconds,
        tokens_per_second=speed,
        utilisation=6 * first.parameters * speed / peak if peak else None,
        peak_bytes=max(peaks, default=None),
        loss=samples[-1].loss,
        note=failure or first.note,
    )


def line(row: Row) -> str:
    """A row in brief."""
    if row.step is None or row.tokens_per_second is None:
        return f"{label(row)}: {row.note}"
    note = f" ({row.note})" if row.note else ""
    return f"{label(row)}: {1e3 * row.step.median:,.1f} ms per step, {row.tokens_per_second:,.0f} tokens/s{note}"


def label(row: Row) -> str:
    """Who and how."""
    return f"{row.side} {row.variant}".strip()


def table(rows: Sequence[Row]) -> Table:
    """A line per variant."""
    columns = ("library", "variant", "parameters", "compile s", "step ms", "tokens/s", "of peak", "GiB", "loss", "note")
    caption = "of peak: 6 FLOPs per parameter and token against the device's bf16 products; loss: of random tokens"
    result = Table(*columns, caption=caption)
    for row in rows:
        result.add_row(
            row.side,
            row.variant or "as given",
            "" if row.parameters is None else f"{row.parameters / 1e6:,.1f}M",
            "" if row.compile_seconds is None else f"{row.compile_seconds:.1f}",
            "" if row.step is None else f"{1e3 * row.step.median:,.1f}",
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            "" if row.utilisation is None else f"{row.utilisation:.1%}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}",
            "" if row.loss is None else f"{row.loss:.2f}",
            row.note,
        )
    for i, column in enumerate(result.columns):
        column.justify = "right" if 2 <= i <= 8 else "left"
    return result


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Tokens per second of every variant, as a PNG; bars: the middle 60 % of the steps."""
    timed = [row for row in rows if row.step and row.tokens_per_second]
    if not timed:
        return
    figure = blank(7.2, 0.9 + 0.42 * len(timed))
    axes = figure.add_subplot()
    for y, row in enumerate(timed):
        assert row.step and row.tokens_per_second
        speed, tokens = row.tokens_per_second, row.tokens_per_second * row.step.median
        axes.barh(y, speed, 0.62, color=VALIDATION if row.side == "hydrax" else TRAIN)
        fastest = tokens / row.step.p20
        axes.hlines(y, tokens / row.step.p80, fastest, color=BASELINE)
        share = "" if row.utilisation is None else f", {row.utilisation:.0%} of peak"
        axes.text(fastest, y, f"  {speed:,.0f}{share}", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(timed)), [label(row) for row in timed], fontsize=8)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens per second", color=INK)
    axes.set_xlim(0, 1.3 * max(row.tokens_per_second or 0 for row in timed))
    quiet(axes)
    axes.grid(axis="y", visible=False)
    axes.invert_yaxis()
    save(figure, path)


def environment(peer: str | None = None) -> dict[str, Any]:
    """Where it was measured, and the versions on the other side."""
    sides = {"sides": {peer: isolated(workers.call, SIDES[peer], "facts")}} if peer else {}
    return {**isolated(folder.environment), "cores": os.cpu_count(), **sides}
