"""What a training step needs of every device of a mesh, without the devices: memory, and what moves between them.

The step is partitioned and compiled for virtual CPU devices, with the shardings of a real run. The shards of the state
are exact. What the compiler adds to them, and the types in which values travel, are those of XLA for CPUs, which has
no products in bfloat16: an upper bound for accelerators.
"""

import collections
import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from hydrax.core.build import ConfigError, plain
from hydrax.eval import training
from hydrax.eval.report import write
from hydrax.eval.timing import isolated
from hydrax.models.divided import check_divided
from hydrax.parallel.mesh import AXES, MeshConfig, make_mesh
from hydrax.parallel.rules import batch_sharding, batch_shards
from hydrax.train.config import RunConfig
from hydrax.train.optim import make_optimizer
from hydrax.train.state import State, abstract_state, shardings

BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "f64": 64}
QUICK: dict[str, str | bool] = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
"""The program is read, never run."""

RECEIVED: dict[str, Callable[[int], float]] = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
"""What a device receives among n, in bytes per byte of its result, by the algorithm that sends least (a ring)."""

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(rf"= (.*?) ({'|'.join(RECEIVED)})(-start)?\(")
CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
DEVICES = re.compile(r"^HloModule .*\bnum_partitions=(\d+)", re.MULTILINE)
GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]<=|mesh\[(.*?)\] \{(.*?)\})")
"""Who exchanges with whom: the first group, or how many each has, or a mesh and its axes; all devices if none."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One of the largest parameters, and its part on a device."""

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    partition: tuple[str, ...]  # mesh axes of every dimension, with + between them
    shard: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """All operations of a kind in one training step: how many, and bytes of their results on a device."""

    kind: str
    count: int
    nbytes: int
    received: int  # bytes over the links into a device, see `RECEIVED`


@dataclasses.dataclass(frozen=True)
class DryRun:
    """Bytes are those of one device."""

    mesh: Mapping[str, int]
    batch: tuple[int, int]  # rows of all devices, tokens of a row
    memory: Mapping[str, int]
    parameters: tuple[Parameter, ...]  # the largest, of `arrays`
    arrays: int
    collectives: tuple[Collective, ...]


def mesh_sizes(text: str, base: MeshConfig) -> MeshConfig:
    """`base` with the sizes of "fsdp=8,tensor=2"; axes that are not named have one device.

    Raises:
      ConfigError: an unknown axis, or a size that is no positive integer.
    """
    sizes: dict[str, Any] = dict.fromkeys(AXES, 1)
    for entry in text.split(","):
        axis, _, size = entry.strip().partition("=")
        if axis not in AXES or not size.isdecimal() or int(size) < 1:
            raise ConfigError("mesh", text, f"expected <axis>=<devices>, with commas between; axes: {', '.join(AXES)}")
        sizes[axis] = int(size)
    return dataclasses.replace(base, **sizes)


def dry_run(cfg: RunConfig, largest: int = 8) -> DryRun:
    """A training step of `cfg` on `cfg.mesh`, in a new process with as many virtual devices.

    Args:
      largest: parameters to list.

    Raises:
      ConfigError: a batch that the mesh cannot divide.
    """
    return isolated(_dry_run, cfg, largest)


def _dry_run(cfg: RunConfig, largest: int) -> DryRun:
    sizes = [getattr(cfg.mesh, axis) for axis in AXES]
    os.environ["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", math.prod(sizes))
    mesh = make_mesh(cfg.mesh)
    parts = cfg.train.accumulate * batch_shards(mesh)
    if cfg.train.batch_size % parts:
        allowed = f"expected a multiple of {parts} (train.accumulate x devices that share the batch)"
        raise ConfigError("train.batch_size", cfg.train.batch_size, allowed)
    check_divided(cfg.model, cfg.mesh, mesh.shape, cfg.data.seq_len)
    dtype = jnp.dtype("bfloat16" if cfg.train.dtype == "auto" else cfg.train.dtype)
    plan, step, _ = training.training_step(cfg, dtype)
    state = abstract_state(plan, make_optimizer(cfg.optim, cfg.train.steps, plan.meta), mesh)
    place, rows = shardings(state), batch_sharding(mesh)
    with jax.set_mesh(mesh):
        batch = jax.eval_shape(functools.partial(training.batch, cfg))
        program = jax.jit(step, in_shardings=(place, rows), out_shardings=(place, None), donate_argnums=0)
        compiled = program.lower(state, batch).compile(compiler_options=QUICK)
    params = sorted(state["params"].items(), key=lambda item: -math.prod(item[1].shape))
    return DryRun(
        mesh=dict(zip(AXES, sizes, strict=True)),
        batch=(cfg.train.batch_size, cfg.data.seq_len),
        memory=_memory(state, compiled),
        parameters=tuple(_parameter(name, plan.meta[name].axes, x) for name, x in params[:largest]),
        arrays=len(params),
        collectives=tuple(collectives(compiled.as_text() or "")),
    )


def _memory(state: State, compiled: jax.stages.Compiled) -> dict[str, int]:
    held = {"parameters": state["params"], "optimizer": state["opt_state"]}
    sizes = {name: sum(_shard_bytes(x) for x in jax.tree.leaves(part)) for name, part in held.items()}
    analysis = compiled.memory_analysis()
    assert analysis is not None  # the backend is XLA's own
    return sizes | {"activations, gradients": analysis.temp_size_in_bytes}


def _shard_bytes(x: jax.ShapeDtypeStruct) -> int:
    assert x.sharding is not None
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _parameter(name: str, axes: tuple[str, ...], x: jax.ShapeDtypeStruct) -> Parameter:
    sharding = x.sharding
    assert isinstance(sharding, jax.sharding.NamedSharding)
    on = [(entry,) if isinstance(entry, str) else entry or () for entry in sharding.spec]
    return Parameter(name, axes, x.shape, tuple("+".join(axes) for axes in on), sharding.shard_shape(x.shape))


def collectives(hlo: str) -> Iterator[Collective]:
    """Those of a compiled program, those in a loop as often as it runs (once where XLA does not know)."""
    own: dict[str, list[tuple[str, int, int]]] = collections.defaultdict(list)
    calls: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    name = entry = ""
    module = DEVICES.search(hlo)
    devices = int(module[1]) if module else 1
    for line in hlo.splitlines():
        if begins := COMPUTATION.match(line):
            name = begins[1]
            entry = name if line.startswith("ENTRY") else entry
        elif found := INSTRUCTION.search(line):
            nbytes = _result_bytes(*found.groups())
            own[name].append((found[2], nbytes, round(RECEIVED[found[2]](_members(line, devices)) * nbytes)))
        else:
            trips = TRIPS.search(line)
            called = CALLED.findall(line) + [
                c.strip().lstrip("%") for b in BRANCHES.findall(line) for c in b.split(",")
            ]
            calls[name] += [(other, int(trips[1]) if trips else 1) for other in called]
    totals: dict[str, list[int]] = {kind: [0, 0, 0] for kind in RECEIVED}
    todo = [(entry, 1)]
    while todo:
        name, times = todo.pop()
        for kind, *sizes in own[name]:
            totals[kind] = [old + times * n for old, n in zip(totals[kind], (1, *sizes), strict=True)]
        todo += [(other, times * trips) for other, trips in calls[name]]
    return (Collective(kind, *found) for kind, found in totals.items() if found[0])


def _members(instruction: str, devices: int) -> int:
    """How many devices exchange with each other in a collective."""
    found = GROUPS.search(instruction)
    if found is None:
        return devices
    group, each, mesh, along = found.groups()
    if mesh is None:
        return int(each or len(group.split(",")))
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
    return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", along))


def _result_bytes(types: str, kind: str, start: str | None) -> int:
    """Of an instruction; one that only starts the operation gives (operands, results, counters), but for sums."""
    arrays = [array for array in ARRAY.finditer(types) if array[1] != "u32"]
    both = start and types.startswith("(") and kind != "all-reduce"
    return sum(map(_array_bytes, arrays[len(arrays) // 2 :] if both else arrays))


def _array_bytes(array: re.Match) -> int:
    return math.prod(int(n) for n in array[2].split(",") if n) * BITS.get(array[1], 0) // 8


def show(run: DryRun, console: Console, json: str = "") -> None:
    """Prints it, and writes it to the file `json` if there is one."""
    if json:
        write(pathlib.Path(json), plain(dataclasses.asdict(run)), "json")
    console.print(*tables(run))


def tables(run: DryRun) -> list[Table]:
    """For people: memory, what moves, and how the largest parameters are divided."""
    axes = ", ".join(f"{axis} {size}" for axis, size in run.mesh.items() if size > 1) or "one device"
    rows, tokens = run.batch
    memory = Table("a device holds", "GiB", title=f"{axes}: {rows} x {tokens:,} tokens per step")
    for name, nbytes in [*run.memory.items(), ("all", sum(run.memory.values()))]:
        memory.add_row(name, f"{nbytes / 2**30:,.3f}", end_section=name == [*run.memory][-1])
    moved = Table("between devices", "per step", "MiB of results on a device", "MiB into a device")
    for c in run.collectives:
        moved.add_row(c.kind, f"{c.count:,}", f"{c.nbytes / 2**20:,.1f}", f"{c.received / 2**20:,.1f}")
    divided = Table("parameter", "shape", "logical axes", "mesh axes", "on a device", title=f"largest of {run.arrays}")
    for p in run.parameters:
        divided.add_row(p.name, _by(p.shape), ", ".join(p.axes), ", ".join(a or "-" for a in p.partition), _by(p.shard))
    for table in (memory, moved):
        for column in table.columns[1:]:
            column.justify = "right"
    return [memory, moved, divided]


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
