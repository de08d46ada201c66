"""Training steps on 1, 2, 4, 8 devices of one host: compared with one device, timed, and set beside a prediction.

    predicted seconds = FLOPs of a device / (u · peak) + bytes that it receives / bandwidth of its links

u is the share of the peak that the fewest devices reached in the same cell, so there the prediction is no news; the
second term is what communication costs where nothing hides it.
"""

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.table import Table

from hydrax.core.build import ConfigError, Positive
from hydrax.eval import dry_run, training
from hydrax.eval.scaling_matrix import Cell, chosen
from hydrax.eval.sides import workers
from hydrax.eval.timing import Times, isolated, queued, times_of
from hydrax.models.cost import cost
from hydrax.models.divided import check_divided
from hydrax.models.spec import BYTE_VOCABULARY
from hydrax.parallel.mesh import AXES, MeshConfig, make_mesh
from hydrax.parallel.rules import batch_sharding
from hydrax.train.config import RunConfig
from hydrax.train.figure import INK, blank, quiet, save, series
from hydrax.train.loop import compute_dtype
from hydrax.train.optim import make_optimizer
from hydrax.train.state import abstract_state, new_state, shardings

LINKS = {"NVIDIA H100 80GB HBM3": 450e9, "NVIDIA H200": 450e9}
"""Bytes per second that a device receives from the others of its host, from data sheets: NVLink 4, one direction."""

CHECKED_STEPS = 3
SAME = 1e-4
"""Largest relative difference of losses in fp32: sums over devices are rounded in another order."""


@dataclasses.dataclass(frozen=True)
class Settings:
    cells: tuple[str, ...]
    devices: tuple[Positive, ...]
    size: str
    steps: Positive  # that are timed
    limit: Positive  # seconds for a cell on so many devices
    trace: str | None  # folder for the profile of one step of every cell


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a process with its devices found."""

    worst: float  # relative difference of a loss to that on one device
    seconds: list[float]
    compile_seconds: float
    memory: int | None  # bytes of the fullest device
    moved: Mapping[str, tuple[int, int]]  # kind of collective -> how many, bytes of results on a device
    device: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A cell on so many devices; what is None is not known, and `note` says why.

    Attributes:
      verdict: "right", "one device", or what is wrong with its losses, and then it was not timed.
      efficiency: tokens per second and device, relative to `against`, the fewest devices that ran the cell.
    """

    cell: str
    devices: int
    mesh: Mapping[str, Any]
    tokens: int  # per step
    flops: float  # per step, of all devices
    verdict: str
    step: Times | None = None
    tokens_per_second: float | None = None
    against: int | None = None
    efficiency: float | None = None
    predicted_seconds: float | None = None
    memory: int | None = None
    predicted_memory: int | None = None
    moved: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    compile_seconds: float | None = None
    device: str = ""
    note: str = ""

    @property
    def nbytes(self) -> int:
        """That a device receives in a step, about: all devices count as one group."""
        n = self.devices
        times = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
        return round(sum(times.get(kind, (n - 1) / n) * nbytes for kind, (_, nbytes) in self.moved.items()))


def present() -> tuple[str, int]:
    """The platform and the number of its devices, asked in a process that leaves them alone afterwards."""
    return isolated(_present)


def _present() -> tuple[str, int]:
    return jax.default_backend(), jax.device_count()


def counts(given: str, found: int) -> tuple[int, ...]:
    """The numbers of devices of "1,2,4", or the powers of two up to `found`.

    Raises:
      ConfigError: no numbers, or more than there are.
    """
    if not given:
        return tuple(2**i for i in range(found.bit_length()))
    values = given.split(",")
    if not all(v.strip().isdecimal() and 1 <= int(v) <= found for v in values):
        raise ConfigError("devices", given, f"expected numbers from 1 to {found}, with commas between them")
    return tuple(sorted({int(v) for v in values}))


def bench(cells: Sequence[Cell], settings: Settings, platform: str) -> Iterator[Row]:
    """Row after row, every cell in a process of its own. What fails is a row with a note, and the others go on."""
    for cell in cells:
        done: list[Row] = []
        for devices in settings.devices:
            if devices >= cell.least:
                row = _measured(cell, devices, settings, platform)
                done.append(judged(row, done))
                yield done[-1]


def _measured(cell: Cell, devices: int, settings: Settings, platform: str) -> Row:
    cfg = cell.config(devices, settings.size)
    row = _blank(cell, devices, cfg)
    trace = None if settings.trace is None else str(pathlib.Path(settings.trace) / cell.label / str(devices))
    try:
        check_divided(cfg.model, cfg.mesh, dict(zip(AXES, cfg.mesh.sizes(devices), strict=True)), cfg.data.seq_len)
        held = workers.limited(settings.limit, dry_run.dry_run, cfg).memory if settings.size == "full" else {}
        found = workers.limited(settings.limit, _sample, cell.label, devices, settings, platform, trace)
    except (ConfigError, RuntimeError) as error:
        return dataclasses.replace(row, verdict="failed", note=str(error))
    row = dataclasses.replace(
        row,
        verdict=verdict(devices, found.worst),
        moved=found.moved,
        memory=found.memory,
        predicted_memory=sum(held.values()) or None,
        compile_seconds=found.compile_seconds,
        device=found.device,
    )
    if not found.seconds:
        return row
    step = times_of(found.seconds, 1)
    return dataclasses.replace(row, step=step, tokens_per_second=row.tokens / step.median)


def _blank(cell: Cell, devices: int, cfg: RunConfig) -> Row:
    tokens = cfg.train.batch_size * cfg.data.seq_len
    model = dataclasses.replace(cfg.model, vocab_size=cfg.model.vocab_size or BYTE_VOCABULARY)
    flops = tokens * cost(model, seq_len=cfg.data.seq_len).train_flops_per_token
    return Row(cell.label, devices, dict(cell.mesh(devices)), tokens, flops, "not run")


def verdict(devices: int, worst: float) -> str:
    if devices == 1:
        return "one device"
    return "right" if worst <= SAME else f"losses differ by {worst:.1e}"


def judged(row: Row, before: Sequence[Row]) -> Row:
    """With its efficiency against the fewest devices that ran the cell, and the predicted time."""
    if row.tokens_per_second is None or row.step is None:
        return row
    first = next((r for r in before if r.tokens_per_second is not None), row)
    assert first.tokens_per_second is not None and first.step is not None
    efficiency = row.tokens_per_second / row.devices / (first.tokens_per_second / first.devices)
    predicted = None
    if row.device in LINKS and row.device in training.PEAK:
        link, peak = LINKS[row.device], training.PEAK[row.device]
        alone = max(first.step.median - first.nbytes / link, 0.1 * first.step.median)
        used = first.flops / first.devices / alone / peak
        predicted = row.flops / row.devices / (used * peak) + row.nbytes / link
    return dataclasses.replace(row, against=first.devices, efficiency=efficiency, predicted_seconds=predicted)


# ------------------------------------------------------------------------------- in a process with its devices


def _sample(label: str, devices: int, settings: Settings, platform: str, trace: str | None) -> Sample:
    _take(devices, platform)
    (cell,) = chosen(label)
    worst = _worst(cell.small(devices)) if devices > 1 else 0.0
    cfg = cell.config(devices, settings.size)
    mesh = make_mesh(cfg.mesh)
    step, state, rows, compile_seconds = _prepared(cfg, mesh)
    kinds = {c.kind: (c.count, c.nbytes) for c in dry_run.collectives(step.as_text() or "")}
    seconds: list[float] = []
    if worst <= SAME:
        metrics: dict = {}

        def once() -> dict:
            nonlocal state, metrics
            state, metrics = step(state, rows)
            return metrics

        for _ in range(training.WARMUP):
            once()
        jax.block_until_ready(metrics)
        seconds = queued(once, jax.block_until_ready, settings.steps)
        if trace is not None:
            with jax.profiler.trace(trace):
                jax.block_until_ready(once())
    return Sample(worst, seconds, compile_seconds, _memory(step), kinds, jax.local_devices()[0].device_kind)


def _take(devices: int, platform: str) -> None:
    """Leaves this process so many devices, before JAX asks for any."""
    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", devices)
        return
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else [str(i) for i in range(devices)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[:devices])
    # Reductions inside the switch need multicast memory, which not every host lends to its guests: NCCL then hangs.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")


def _prepared(cfg: RunConfig, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any, float]:
    """The compiled step, a state and rows on the mesh, and seconds of compiling."""
    plan, step, _ = training.training_step(cfg, compute_dtype(cfg.train.dtype))
    tx = make_optimizer(cfg.optim, cfg.train.steps, plan.meta)
    abstract, of_rows = abstract_state(plan, tx, mesh), batch_sharding(mesh)
    place = shardings(abstract)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(functools.partial(training.batch, cfg))
        program = jax.jit(step, in_shardings=(place, of_rows), out_shardings=(place, None), donate_argnums=0)
        began = time.perf_counter()
        compiled = program.lower(abstract, shapes).compile()
        seconds = time.perf_counter() - began
        rows = jax.jit(functools.partial(training.batch, cfg), out_shardings=of_rows)()
    return compiled, new_state(plan, tx, 0, mesh), rows, seconds


def _worst(cfg: RunConfig) -> float:
    """The largest relative difference of a loss on the mesh of `cfg` to that on one device."""
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    alone = jax.make_mesh((1,) * len(AXES), AXES, auto, devices=jax.devices()[:1])
    single = dataclasses.replace(cfg, mesh=MeshConfig(fsdp=1))
    found = []
    for of, mesh in ((cfg, make_mesh(cfg.mesh)), (single, alone)):
        step, state, rows, _ = _prepared(of, mesh)
        losses = []
        for _ in range(CHECKED_STEPS):
            state, metrics = step(state, rows)
            losses.append(float(metrics["loss"]))
        found.append(losses)
    mine, right = np.asarray(found)
    return float(np.max(np.abs(mine - right) / np.abs(right)))


def _memory(step: jax.stages.Compiled) -> int | None:
    """The peak of the fullest device; where it does not count, what the compiler says that the step needs."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [peak for peak in peaks if peak is not None]
    if known:
        return max(known)
    analysis = step.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes + analysis.argument_size_in_bytes


# ---------------------------------------------------------------------------------------------------- for people


def line(row: Row) -> str:
    """A row in brief."""
    start = f"{row.cell} on {row.devices}:"
    if row.step is None or row.tokens_per_second is None:
        return f"{start} {row.verdict}{f' ({row.note})' if row.note else ''}"
    known = [f"{1e3 * row.step.median:,.1f} ms", f"{row.tokens_per_second:,.0f} tokens/s", row.verdict]
    known += [] if row.efficiency is None else [f"efficiency {row.efficiency:.0%}"]
    return f"{start} {', '.join(known)}"


def table(rows: Sequence[Row]) -> Table:
    """A line per cell and number of devices."""
    columns = (
        "cell",
        "devices",
        "ms",
        "predicted",
        "tokens/s",
        "efficiency",
        "MiB moved",
        "GiB",
        "predicted",
        "losses",
    )
    caption = "MiB moved: results of collectives on a device in one step; losses: against one device, in fp32"
    result = Table(*columns, caption=caption)
    for row in rows:
        result.add_row(
            row.cell,
            str(row.devices),
            "" if row.step is None else f"{1e3 * row.step.median:,.1f}",
            "" if row.predicted_seconds is None else f"{1e3 * row.predicted_seconds:,.1f}",
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            "" if row.efficiency is None else f"{row.efficiency:.0%}",
            f"{row.nbytes / 2**20:,.1f}",
            "" if row.memory is None else f"{row.memory / 2**30:.2f}",
            "" if row.predicted_memory is None else f"{row.predicted_memory / 2**30:.2f}",
            f"{row.verdict} {row.note}".strip(),
        )
    for i, column in enumerate(result.columns):
        column.justify = "right" if 1 <= i <= 8 else "left"
    return result


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Tokens per second and efficiency against devices, a column per panel of cells; dashed: predicted."""
    timed = [row for row in rows if row.tokens_per_second is not None]
    if not timed:
        return
    panels = list(dict.fromkeys(_panel(row.cell) for row in timed))
    figure = blank(1.2 + 3.4 * len(panels), 6.4)
    grid = figure.subplots(2, len(panels), squeeze=False)
    for x, panel in enumerate(panels):
        cells = list(dict.fromkeys(row.cell for row in timed if _panel(row.cell) == panel))
        for i, cell in enumerate(cells):
            own, style = [row for row in timed if row.cell == cell], series(i)
            at = [row.devices for row in own]
            look: dict[str, Any] = {"color": style.color, "marker": style.marker, "markersize": 4, "linewidth": 1.3}
            label = cell.split("/", 1)[1].removesuffix(f"/{panel.rpartition(' ')[2]}")
            grid[0, x].plot(at, [row.tokens_per_second for row in own], label=label, **look)
            grid[1, x].plot(at, [row.efficiency for row in own], **look)
            known = [(row.devices, row.tokens / row.predicted_seconds) for row in own if row.predicted_seconds]
            if known:
                grid[0, x].plot(*zip(*known, strict=True), color=style.color, linewidth=1, linestyle="--")
        grid[0, x].set_title(panel, color=INK, fontsize=10)
        grid[0, x].set_yscale("log")
        grid[0, x].legend(frameon=False, fontsize=7)
        for axes in grid[:, x]:
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({row.devices for row in timed}), sorted({row.devices for row in timed}))
            quiet(axes)
        grid[1, x].set_ylim(0, max(1.1, 1.05 * max(row.efficiency or 0 for row in timed)))
        grid[1, x].set_xlabel("devices", color=INK)
    grid[0, 0].set_ylabel("tokens per second", color=INK)
    grid[1, 0].set_ylabel("efficiency", color=INK)
    save(figure, path)


def _panel(cell: str) -> str:
    group, _, rest = cell.partition("/")
    return f"context {rest.rpartition('/')[2]}" if group == "context" else group


def moved_by_length(rows: Sequence[Row]) -> dict[str, float]:
    """Of cells that differ in nothing but the length: bytes moved for the longest row over those for the shortest."""
    by_cell: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.cell.startswith("context/") and row.nbytes and row.devices > 1:
            by_cell.setdefault((row.cell.rpartition("/")[0], row.devices), []).append(row)
    found = {key: sorted(own, key=lambda row: row.tokens) for key, own in by_cell.items()}
    return {f"{cell} on {n}": own[-1].nbytes / own[0].nbytes for (cell, n), own in found.items() if len(own) > 1}
