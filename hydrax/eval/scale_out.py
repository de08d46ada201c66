"""Training steps on 1, 2, 4, 8 devices of one host: cells that are first compared with one device, then timed.

A cell is a config on a mesh, in a process of its own, so that one that fails or has no memory leaves the others alone.
A small model of the same pattern, mesh axes and strategy must have the losses of one device; otherwise it is not timed.
What is predicted follows from the compiled program: bytes over the links, memory, and with the model's FLOPs the time.
"""

import dataclasses
import functools
import json
import math
import pathlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core.build import ConfigError, differences
from hydrax.eval import dry_run, overlap, training
from hydrax.eval.scale_out_matrix import Cell, Settings
from hydrax.eval.sides import workers
from hydrax.eval.timing import Times, isolated, queued, seconds_of, times_of
from hydrax.eval.tolerances import TOLERANCE
from hydrax.models.cost import cost
from hydrax.parallel.mesh import AXES
from hydrax.parallel.rules import batch_sharding
from hydrax.train import folder
from hydrax.train.config import RunConfig
from hydrax.train.loop import compute_dtype
from hydrax.train.optim import make_optimizer
from hydrax.train.progress import PEAK_FLOPS
from hydrax.train.state import abstract_state, shardings

LINKS = {"NVIDIA A100": 300e9, "NVIDIA H100": 450e9, "NVIDIA H200": 450e9, "NVIDIA B200": 900e9}
"""Bytes per second that a device receives over NVLink (vendors' figures), by the beginning of `device_kind`."""

EXPLICIT = re.compile(r'op_name="[^"]*/(?:all_gather|all_to_all|ppermute|reduce_scatter)[^"/]*"')
"""Collectives that the ops of mixers ask for themselves; those of parameters and gradients are the compiler's."""


REPEATED = {"full": 4 / 3}
"""FLOPs with those that the backward pass repeats, by `train.remat`; of others that repeat less, 1."""

STEPS = 4
"""Steps whose losses are compared."""

TIMED = 60
"""Seconds of timed steps, at most, unless one alone is longer."""

SAME = {"environment": ("packages", "backend", "devices", "git"), "settings": ("size", "steps")}
"""In what commands for one file must agree."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A cell as it was found; None for what is not known. Bytes are those of one device, per step."""

    cell: str
    part: str
    model: str
    strategy: str | None
    seq_len: int
    batch: int
    devices: int
    mesh: dict[str, int]
    layout: str
    losses: tuple[float, ...] = ()  # of the small model
    losses_alone: tuple[float, ...] = ()  # of the same on one device
    loss_difference: float | None = None  # from one device, relative, the largest
    step: Times | None = None
    tokens_per_second: float | None = None
    efficiency: float | None = None  # of a device, against one device alone
    predicted_seconds: float | None = None  # all FLOPs at the peak, then all bytes over the link, nothing overlapped
    compile_seconds: float | None = None
    loss: float | None = None  # after the timed steps
    flops: float | None = None  # of one device
    collectives: dict[str, int] | None = None  # bytes of results by kind
    nbytes: int | None = None  # into a device, of all collectives
    mixers_nbytes: int | None = None  # into a device, of those that mixers ask for
    overlapped: float | None = None  # of the time of collectives, that in which the device also computes; by a trace
    predicted_bytes: int | None = None  # of memory, by the compiler for this mesh
    peak_bytes: int | None = None  # of memory, as the device counted
    error: str | None = None


def bench(settings: Settings, chosen: Sequence[Cell], found: Sequence[Row] = ()) -> Iterator[Row]:
    """A row after another; what fails is a row with an error.

    Args:
      chosen: what is measured, but for those among the rows `found` without an error; failed ones come last.
    """
    before = {row.cell: row for row in found}
    losses: dict[str, tuple[float, ...]] = {}
    for cell in chosen:
        if cell.name in before:
            _learn(losses, cell, before[cell.name])
    todo = [cell for cell in chosen if cell.name not in before]
    todo += [cell for cell in chosen if cell.name in before and before[cell.name].error]
    for cell in todo:
        try:
            row = workers.limited(settings.seconds, measure, cell, settings, losses)
        except RuntimeError as error:  # out of memory, or took too long
            row = dataclasses.replace(_blank(cell), error=str(error))
        _learn(losses, cell, row)
        yield row


def _learn(losses: dict[str, tuple[float, ...]], cell: Cell, row: Row) -> None:
    """Adds what is known of the small models of other cells, by their configs, unless it is wrong."""
    if row.loss_difference is not None and row.loss_difference <= TOLERANCE["fp32_model"]:
        losses |= {repr(_single(cell.small)): row.losses_alone, repr(cell.small): row.losses}


def joined(rows: Sequence[Row], row: Row) -> list[Row]:
    """The rows with another, in place of that of its cell if there is one, and with efficiencies against one device."""
    rows = [old for old in rows if old.cell != row.cell] + [row]
    alone = {_base(r): r.tokens_per_second for r in rows if r.devices == 1 and r.tokens_per_second}
    return [dataclasses.replace(r, efficiency=_efficiency(r, alone.get(_base(r)))) for r in rows]


def _base(row: Row) -> tuple[str, str, int]:
    """Rows that are compared: tensor parallelism with the same model on one device, which is that of fsdp."""
    return "fsdp" if row.part == "tensor" else row.part, row.model, row.seq_len


def _efficiency(row: Row, alone: float | None) -> float | None:
    return row.tokens_per_second / row.devices / alone if row.tokens_per_second and alone else None


def earlier(path: pathlib.Path | None, environment: Mapping[str, Any], settings: Settings) -> tuple[str, list[Row]]:
    """Command and rows of a file that an earlier command has written, nothing if there is none.

    Raises:
      ConfigError: it is something else, or was measured otherwise.
    """
    if path is None or not path.exists():
        return "", []
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        rows = [_row(row) for row in values["rows"]]
        command, was = values["command"], {part: {k: values[part][k] for k in keys} for part, keys in SAME.items()}
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError("out", str(path), "expected a new file, or one of this command with --scaling") from None
    given = {"environment": environment, "settings": dataclasses.asdict(settings)}
    changes = differences(was, {part: {k: given[part][k] for k in keys} for part, keys in SAME.items()})
    if changes:
        raise ConfigError("out", str(path), f"its cells were measured otherwise ({changes[0]}): expected a new file")
    return command, rows


def _row(values: dict[str, Any]) -> Row:
    step = values["step"] and Times(**values["step"])
    return Row(**{**values, "step": step, **{k: tuple(values[k]) for k in ("losses", "losses_alone")}})


def _blank(cell: Cell) -> Row:
    mesh = {axis: getattr(cell.cfg.mesh, axis) for axis in AXES}
    cfg, what = cell.cfg, (cell.name, cell.part, cell.model, cell.cfg.mesh.strategy)
    return Row(*what, cfg.data.seq_len, cfg.train.batch_size, cell.devices, mesh, cfg.mesh.layout)


def look() -> tuple[int, dict[str, Any]]:
    """How many devices there are, and where, from a process that gives them back."""
    return isolated(_look)


def _look() -> tuple[int, dict[str, Any]]:
    return jax.device_count(), folder.environment()


def measure(cell: Cell, settings: Settings, known: Mapping[str, tuple[float, ...]]) -> Row:
    """A cell in this process: its small model compared with the losses of one device, then the large one timed.

    Args:
      known: losses of small models, by config.
    """
    row, single, same = _blank(cell), _single(cell.small), cell.small == cell.cfg
    steps = None if repr(cell.small) in known and not same else _steps(cell.small)
    got = steps.losses(STEPS) if steps else known[repr(cell.small)]
    want = got if cell.devices == 1 else known.get(repr(single)) or _steps(single).losses(STEPS)
    difference = max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))
    row = dataclasses.replace(row, losses=got, losses_alone=want, loss_difference=difference)
    if not difference <= TOLERANCE["fp32_model"]:
        return dataclasses.replace(row, error=f"losses differ from those of one device by {difference:.1e}: not timed")
    try:
        return _timed(row, cell, settings, steps if same else None)
    except Exception as error:  # the losses are known; no memory for the large model is the usual reason
        return dataclasses.replace(row, error=workers.line(error))


def _steps(cfg: RunConfig) -> "_Steps":
    """Those of a small model, in all digits."""
    with jax.default_matmul_precision("highest"):
        return _Steps(cfg)


def _single(cfg: RunConfig) -> RunConfig:
    """The same on one device."""
    ones: dict[str, Any] = dict.fromkeys(AXES, 1)
    return dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, strategy=None, **ones))


def _timed(row: Row, cell: Cell, settings: Settings, steps: "_Steps | None") -> Row:
    """The row with the times of its large model; of `steps`, if that is the small one."""
    steps = steps or _Steps(cell.cfg)
    row = dataclasses.replace(row, compile_seconds=steps.compile_seconds, **_program(cell, steps.program))
    _, seconds = (seconds_of(steps.once) for _ in range(2))  # the first one also allocates
    count = max(1, min(settings.steps, int(TIMED / seconds)))
    times = times_of(queued(steps.once, jax.block_until_ready, count), 1)
    if settings.profile:
        traces = pathlib.Path(settings.profile, re.sub(r"[^a-z0-9_]+", "_", cell.name))
        with jax.profiler.trace(str(traces)):
            jax.block_until_ready(steps.once())
        row = dataclasses.replace(row, overlapped=overlap.overlapped(traces))
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in steps.mesh.devices.flat]
    return dataclasses.replace(
        row,
        step=times,
        tokens_per_second=row.batch * row.seq_len / times.median,
        loss=float(steps.metrics["loss"]),
        peak_bytes=max((peak for peak in peaks if peak is not None), default=None),
    )


def _program(cell: Cell, compiled: jax.stages.Compiled) -> dict[str, Any]:
    """What is known of the compiled step: bytes that move, FLOPs, memory, and the time that follows."""
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    moved = list(dry_run.collectives(text))
    asked = "\n".join(x for x in text.splitlines() if not dry_run.INSTRUCTION.search(x) or EXPLICIT.search(x))
    cfg, received = cell.cfg, sum(c.received for c in moved)
    per_token = cost(cfg.model, seq_len=cfg.data.seq_len).train_flops_per_token
    flops = per_token * cfg.train.batch_size * cfg.data.seq_len / cell.devices
    peak, link = (_of_device(table) for table in (PEAK_FLOPS, LINKS))
    repeated = REPEATED.get(cfg.train.remat, 1)
    return {
        "flops": flops,
        "collectives": {c.kind: c.nbytes for c in moved},
        "nbytes": received,
        "mixers_nbytes": sum(c.received for c in dry_run.collectives(asked)),
        "predicted_seconds": repeated * flops / peak + received / link if peak and link else None,
        "predicted_bytes": memory and memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }


def _of_device(table: dict[str, float]) -> float | None:
    kind = jax.devices()[0].device_kind
    return next((value for name, value in table.items() if kind.startswith(name)), None)


class _Steps:
    """A config's training step on the first devices of this process, its state and its one batch."""

    def __init__(self, cfg: RunConfig):
        sizes = [getattr(cfg.mesh, axis) for axis in AXES]
        auto = (jax.sharding.AxisType.Auto,) * len(AXES)
        self.mesh = jax.make_mesh(sizes, AXES, axis_types=auto, devices=jax.devices()[: math.prod(sizes)])
        plan, step, start = training.training_step(cfg, compute_dtype(cfg.train.dtype))
        state = abstract_state(plan, make_optimizer(cfg.optim, cfg.train.steps, plan.meta), self.mesh)
        place, rows = shardings(state), batch_sharding(self.mesh)
        make = functools.partial(training.batch, cfg)
        with jax.set_mesh(self.mesh):
            jitted = jax.jit(step, in_shardings=(place, rows), out_shardings=(place, None), donate_argnums=0)
            began = time.perf_counter()
            self.program = jitted.lower(state, jax.eval_shape(make)).compile()
            self.compile_seconds = time.perf_counter() - began
            self._batch = jax.jit(make, out_shardings=rows)()
            self._state = jax.jit(start, out_shardings=place)()
        self.metrics: dict[str, jnp.ndarray] = {}

    def once(self) -> dict[str, jnp.ndarray]:
        """One more step; its metrics."""
        self._state, self.metrics = self.program(self._state, self._batch)
        return self.metrics

    def losses(self, steps: int) -> tuple[float, ...]:
        """Of the next steps."""
        return tuple(float(self.once()["loss"]) for _ in range(steps))
