"""Ops side by side, at several lengths of a row: accuracy first, then time and memory.

Outputs and all gradients of a short row are compared with the definition in fp32. Time and memory are those of the
forward pass, and of forward + backward.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.eval.layer import PASSES, Callee, Inputs, Memory, Program, forward_backward, uncached
from hydrax.eval.timing import Times, side_by_side
from hydrax.eval.tolerances import op_tolerance, relative_rms


class Contender(Callee, Protocol):
    """An op as a layer without parameters: x holds what has a gradient. `dtype` is that of its values."""

    dtype: str

    @property
    def definition(self) -> "Contender": ...


class Settings(Protocol):
    """What is measured, and how long.

    Attributes:
      seq_lens: tokens of a row.
      check: tokens of the row on which results are compared; 0: they are not.
      repeats: samples of a program, at most.
      seconds: of measuring after which a program gets no further sample.
      threads: programs compiled at the same time.
    """

    @property
    def seq_lens(self) -> tuple[int, ...]: ...
    @property
    def check(self) -> int: ...
    @property
    def repeats(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def threads(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Measured:
    """A pass."""

    compile_seconds: float
    seconds: Times
    memory: Memory


@dataclasses.dataclass(frozen=True)
class Row:
    """A subject at one width and length. `verdict`: "right", "not checked", or what is wrong with its results."""

    subject: str
    width: int
    seq_len: int
    verdict: str
    errors: dict[str, float]
    results: dict[str, Measured]
    error: str | None  # why a pass is missing


class Plan:
    """A subject at one width, while it is compiled: its check, and a program per length and pass."""

    def __init__(self, name: str, width: int, op: Contender, settings: Settings, pool: concurrent.futures.Executor):
        self.name, self.width, self.op = name, width, op
        self.check = pool.submit(compare, op, settings.check)
        self.programs = {
            (seq_len, which): pool.submit(Program, op, which, None, 1, seq_len)
            for seq_len in sorted(set(settings.seq_lens))
            for which in PASSES
        }


def bench(ops: Mapping[tuple[str, int], Contender], settings: Settings) -> Iterator[list[Row]]:
    """The rows of one subject and width after another, by length. What fails is a row with an error."""
    with uncached(), concurrent.futures.ThreadPoolExecutor(settings.threads) as pool:
        plans = [Plan(name, width, op, settings, pool) for (name, width), op in ops.items()]
    # Leaving the pool waits for all: compilers would disturb what is timed.
    while plans:  # what was measured makes room
        yield measure(plans.pop(0), settings)


def measure(plan: Plan, settings: Settings) -> list[Row]:
    """The rows of one subject and width."""
    verdict, errors = plan.check.result()
    programs: dict[tuple[int, str], Program] = {}
    failed: dict[int, str] = {}
    lengths = sorted(set(settings.seq_lens))
    for seq_len in lengths:
        try:
            inputs = plan.op.inputs(1, seq_len)
            for which in PASSES:
                program = plan.programs[seq_len, which].result()
                program.start(None, inputs)
                programs[seq_len, which] = program
        except Exception as error:  # out of memory, or whatever an op raises
            failed[seq_len] = _line(error)
    times = side_by_side(programs, repeats=settings.repeats, seconds=settings.seconds)
    found = {key: Measured(p.compile_seconds, times[key], p.memory) for key, p in programs.items()}
    by_pass = {T: {which: found[T, which] for which in PASSES if (T, which) in found} for T in lengths}
    return [Row(plan.name, plan.width, T, verdict, errors, by_pass[T], failed.get(T)) for T in lengths]


def compare(op: Contender, seq_len: int) -> tuple[str, dict[str, float]]:
    """How far the results of a short row are from those of the definition; of no tokens nothing is known."""
    if not seq_len:
        return "not checked", {}
    inputs = op.inputs(1, seq_len)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), {"x": inputs["x"], "dy": inputs["dy"]})
    try:
        found, expected = _results(op, inputs), _results(op.definition, inputs | wide)
    except Exception as error:
        return f"fails: {_line(error)}", {}
    errors = {name: relative_rms(found[name], expected[name]) for name in expected}
    wrong = [name for name, x in errors.items() if not x <= op_tolerance(name, op.dtype)]
    return (f"wrong: {', '.join(wrong)}" if wrong else "right"), errors


def _results(op: Contender, inputs: Inputs) -> Mapping[str, np.ndarray]:
    """The output and all gradients."""
    o, (_, dx) = jax.jit(functools.partial(forward_backward, op, None))(**inputs)
    return {name: np.asarray(a, np.float32) for name, a in {"o": o, **{f"d{n}": a for n, a in dx.items()}}.items()}


def _line(error: Exception) -> str:
    """The beginning of what an error says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
