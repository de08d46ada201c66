"""Training steps on 1, 2, 4, 8 devices of one host: cells that are first compared with one device, then timed.

A cell is a config on a mesh, in a process of its own, so that one that fails or has no memory leaves the others alone.
A small model of the same pattern, mesh axes and strategy must have the losses of one device; otherwise it is not timed.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from hydrax.core.build import Check, ConfigError, Positive, build
from hydrax.core.config import load_config
from hydrax.eval import dry_run, training
from hydrax.eval.sides import workers
from hydrax.eval.timing import Times, isolated, queued, times_of
from hydrax.eval.tolerances import TOLERANCE
from hydrax.models.cost import cost
from hydrax.models.divided import check_divided
from hydrax.parallel.mesh import AXES
from hydrax.parallel.rules import batch_sharding
from hydrax.train import folder
from hydrax.train.config import RunConfig
from hydrax.train.loop import compute_dtype
from hydrax.train.optim import make_optimizer
from hydrax.train.progress import PEAK_FLOPS
from hydrax.train.state import abstract_state, shardings

PARTS = ("fsdp", "context", "tensor", "expert")

LINKS = {"NVIDIA A100": 300e9, "NVIDIA H100": 450e9, "NVIDIA H200": 450e9, "NVIDIA B200": 900e9}
"""Bytes per second that a device receives over NVLink (vendors' figures), by the beginning of `device_kind`."""

EXPLICIT = re.compile(r'op_name="[^"]*/(?:all_gather|all_to_all|ppermute)[^"/]*"')
"""Collectives that the ops of mixers ask for themselves; those of parameters and gradients are the compiler's."""

HYBRID, LINEAR = "every(3, gdn, attn)", ("allgather_state", "ring_state")
CONTEXT: dict[str, tuple[str, tuple[str, ...]]] = {
    "gdn": ("fill(gdn)", (*LINEAR, "ulysses")),
    "mamba2": ("fill(mamba2)", (*LINEAR, "ulysses")),
    "hybrid": (HYBRID, ("allgather_state, allgather_kv", "allgather_state, ring", "ring_state, ring", "ulysses")),
}
"""Pattern and strategies of the models that divide one row: of each kind the states of linear layers, then keys."""

STEPS = 4
"""Steps whose losses are compared."""


@dataclasses.dataclass(frozen=True)
class Settings:
    size: Literal["full", "tiny"]  # tiny: the same matrix for virtual devices of a CPU
    parts: Annotated[tuple[Literal["fsdp", "context", "tensor", "expert"], ...], Check("at least one part", bool)]
    devices: tuple[Positive, ...]  # counts; empty: 1, 2, 4, 8 as far as there are, for tiny 1 and most
    context_lens: tuple[Positive, ...]  # tokens of the one row; empty: those of the size
    steps: Positive  # timed
    seconds: Positive  # of a cell, at most
    profile: str | None  # folder for traces of one step of every context cell


@dataclasses.dataclass(frozen=True)
class Cell:
    """A config on its mesh, and the small one that is compared with one device."""

    part: str
    model: str
    devices: int
    cfg: RunConfig
    small: RunConfig

    @property
    def name(self) -> str:
        strategy = f", {self.cfg.mesh.strategy}" if self.cfg.mesh.strategy else ""
        return f"{self.part}: {self.model}{strategy}, {self.cfg.data.seq_len:,} tokens, {self.devices} devices"


@dataclasses.dataclass(frozen=True)
class Row:
    """A cell as it was found; None for what is not known. Bytes are those of one device, per step."""

    part: str
    model: str
    strategy: str | None
    seq_len: int
    batch: int
    devices: int
    mesh: dict[str, int]
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
    nbytes: int | None = None  # of results of all collectives
    mixers_nbytes: int | None = None  # of those that mixers ask for
    predicted_bytes: int | None = None  # of memory, by the compiler for this mesh
    peak_bytes: int | None = None  # of memory, as the device counted
    error: str | None = None


SIZES: dict[str, dict[str, Any]] = {
    "full": {"rows": 4, "seq_len": 4096, "context_lens": (131_072, 524_288, 1_048_576)},
    "tiny": {"rows": 1, "seq_len": 64, "context_lens": (128, 256)},
}
TINY = {
    "model.d_model": 64,
    "model.num_layers": 4,
    "model.ffn_dim": 128,
    "model.vocab_size": 256,
    "model.mixers.gdn": {"heads": 8, "key_dim": 8, "value_dim": 8},
    "model.mixers.attn": {"heads": 8, "kv_heads": 8, "key_dim": 8},
    "model.mixers.mamba2": {"heads": 8, "key_dim": 8, "value_dim": 16},
    "train.dtype": "float32",
    "optim.lr": 3e-3,
    "optim.warmup": 1,
    "optim.eps": 1e-2,  # at 1e-8 the first updates are signs, and rounding decides those of small gradients
}
HEADS = {  # as many as devices, for ulysses
    "model.mixers.attn": {"heads": 8, "kv_heads": 8, "key_dim": 128},
    "model.mixers.mamba2": {"heads": 8, "key_dim": 128, "value_dim": 64},
}


def cells(settings: Settings, present: int) -> Iterator[Cell]:
    """The matrix, on the counts of devices that are asked for, or else 1, 2, 4, 8 of those `present`.

    Raises:
      ConfigError: more devices than there are.
    """
    for n in settings.devices:
        if n > present:
            raise ConfigError("devices", n, f"expected at most the {present} that are present")
    size = SIZES[settings.size]
    counts = [n for n in (1, 2, 4, 8) if n <= present]
    if settings.size == "tiny":  # compiling is most of it
        counts = [n for n in counts if n in (counts[0], counts[-1])]
    for n in settings.devices or counts:
        for part in settings.parts:
            if part == "fsdp":
                yield _cell(settings, part, "hybrid", n, size["seq_len"], size["rows"] * n, {"mesh.fsdp": n})
            elif part == "tensor" and n % 2 == 0:
                mesh = {"mesh.fsdp": n // 2, "mesh.tensor": 2}
                yield _cell(settings, part, "hybrid", n, size["seq_len"], size["rows"] * n, mesh)
            elif part == "expert":
                moe: dict[str, Any] = {
                    "model.ffn": "moe",
                    "model.moe": {"experts": 8, "top_k": 2, "width": 512, "balance": 0.01},
                }
                moe |= {"mesh.expert": n, "mesh.fsdp": 1}
                yield _cell(settings, part, "moe", n, size["seq_len"], size["rows"] * n, moe)
            elif part == "context":
                yield from _context(settings, n, settings.context_lens or size["context_lens"])


def _context(settings: Settings, n: int, lengths: tuple[int, ...]) -> Iterator[Cell]:
    for length in lengths:
        for model, (pattern, strategies) in CONTEXT.items():
            for strategy in strategies if n > 1 else [None]:
                how = {"mesh.context": n, "mesh.fsdp": 1, "mesh.strategy": strategy, "model.pattern": pattern}
                cell = _cell(settings, "context", model, n, length, 1, {**HEADS, **how})
                check_divided(cell.cfg.model, cell.cfg.mesh, dict.fromkeys(AXES, 1) | {"context": n}, length)
                yield cell


def _cell(settings: Settings, part: str, model: str, n: int, seq_len: int, batch: int, how: dict[str, Any]) -> Cell:
    common = {"train.accumulate": 1, "data.documents": False, "train.steps": 1000, **how}
    base = "lm:1b3" if part in ("fsdp", "tensor") else "lm:340m"
    given: dict[str, Any] = {"data.seq_len": seq_len, "train.batch_size": batch}
    if settings.size == "tiny":
        whole = _config(base, {**common, **TINY, **given})
        return Cell(part, model, n, whole, whole)
    tiny = _config(base, {**common, **TINY, "data.seq_len": min(seq_len, 128), "train.batch_size": min(batch, n)})
    given |= {"model.vocab_size": 32_000} | ({"train.remat": "full"} if part == "context" else {})
    return Cell(part, model, n, _config(base, {**common, **given}), tiny)


def _config(base: str, overrides: dict[str, Any]) -> RunConfig:
    return build(RunConfig, load_config(base, **overrides).to_dict())


def bench(settings: Settings, present: int) -> Iterator[Row]:
    """A row after another, with its efficiency against those before; what fails is a row with an error."""
    alone: dict[tuple, float] = {}
    losses: dict[str, tuple[float, ...]] = {}
    for cell in list(cells(settings, present)):
        single = repr(_single(cell.small))
        try:
            row = workers.limited(settings.seconds, measure, cell, settings, losses.get(single))
            losses[single] = row.losses_alone
        except RuntimeError as error:  # out of memory, or took too long
            row = dataclasses.replace(_blank(cell), error=str(error))
        if row.tokens_per_second is not None:
            speed, weak = row.tokens_per_second / row.devices, row.part != "context"
            key = ("fsdp" if row.part == "tensor" else row.part, row.model, None if weak else row.seq_len)
            if row.devices == 1:
                alone[key] = speed
            row = dataclasses.replace(row, efficiency=speed / alone[key] if key in alone else None)
        yield row


def _blank(cell: Cell) -> Row:
    mesh = {axis: getattr(cell.cfg.mesh, axis) for axis in AXES}
    cfg = cell.cfg
    return Row(cell.part, cell.model, cfg.mesh.strategy, cfg.data.seq_len, cfg.train.batch_size, cell.devices, mesh)


def look() -> tuple[int, dict[str, Any]]:
    """How many devices there are, and where, from a process that gives them back."""
    return isolated(_look)


def _look() -> tuple[int, dict[str, Any]]:
    return jax.device_count(), folder.environment()


def measure(cell: Cell, settings: Settings, want: tuple[float, ...] | None = None) -> Row:
    """A cell in this process: compared with the losses of one device (`want`, if known already), then timed."""
    row, single, steps = _blank(cell), _single(cell.small), None
    with jax.default_matmul_precision("highest"):
        if cell.devices > 1:
            steps = _Steps(cell.small)
            got = steps.losses(STEPS)
            want = want or _Steps(single).losses(STEPS)
        else:
            steps = _Steps(single)
            got = want = steps.losses(STEPS)
    difference = max(abs(a - b) / abs(b) for a, b in zip(got, want, strict=True))
    row = dataclasses.replace(row, losses=got, losses_alone=want, loss_difference=difference)
    if not difference <= TOLERANCE["fp32_model"]:
        return dataclasses.replace(row, error=f"losses differ from those of one device by {difference:.1e}: not timed")
    try:
        return _timed(row, cell, settings, steps if cell.small == cell.cfg else None)
    except Exception as error:  # the losses are known; no memory for the large model is the usual reason
        return dataclasses.replace(row, error=workers.line(error))


def _single(cfg: RunConfig) -> RunConfig:
    """The same on one device."""
    ones: dict[str, Any] = dict.fromkeys(AXES, 1)
    return dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, strategy=None, **ones))


def _timed(row: Row, cell: Cell, settings: Settings, steps: "_Steps | None") -> Row:
    """The row with the times of its large model; of `steps`, if that is the small one."""
    steps = steps or _Steps(cell.cfg)
    row = dataclasses.replace(row, compile_seconds=steps.compile_seconds, **_program(cell, steps.program))
    for _ in range(training.WARMUP):
        steps.once()
    jax.block_until_ready(steps.metrics)
    times = times_of(queued(steps.once, jax.block_until_ready, settings.steps), 1)
    if settings.profile and cell.part == "context":
        with jax.profiler.trace(f"{settings.profile}/{re.sub(r'[^a-z0-9_]+', '_', cell.name)}"):
            jax.block_until_ready(steps.once())
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
    moved = {c.kind: c.nbytes for c in dry_run.collectives(text)}
    asked = "\n".join(x for x in text.splitlines() if not dry_run.INSTRUCTION.search(x) or EXPLICIT.search(x))
    cfg, nbytes = cell.cfg, sum(moved.values())
    per_token = cost(cfg.model, seq_len=cfg.data.seq_len).train_flops_per_token
    flops = per_token * cfg.train.batch_size * cfg.data.seq_len / cell.devices
    peak, link = (_of_device(table) for table in (PEAK_FLOPS, LINKS))
    return {
        "flops": flops,
        "collectives": moved,
        "nbytes": nbytes,
        "mixers_nbytes": sum(c.nbytes for c in dry_run.collectives(asked)),
        "predicted_seconds": flops / peak + nbytes / link if peak and link else None,
        "predicted_bytes": memory and memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }


def _of_device(table: dict[str, float]) -> float | None:
    kind = jax.devices()[0].device_kind
    return next((value for name, value in table.items() if kind.startswith(name)), None)


class _Steps:
    """A config's training step on the first devices of this process, its state and its one batch."""

    def __init__(self, cfg: RunConfig):
        sizes = [getattr(cfg.mesh, axis) for axis in AXES]
        count = functools.reduce(lambda a, b: a * b, sizes)
        auto = (jax.sharding.AxisType.Auto,) * len(AXES)
        self.mesh = jax.make_mesh(sizes, AXES, axis_types=auto, devices=jax.devices()[:count])
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
