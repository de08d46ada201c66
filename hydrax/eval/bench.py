"""Time and memory of mixers, each alone as one layer: with its projections, convolutions, gates and norms.

Time is what a caller waits for; memory is what the compiled program asks for. To measure another use of a layer, add a
row to `layer.PASSES`; whatever else can be called can be timed beside it by `timing.side_by_side`.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

import jax

from hydrax import mixers
from hydrax.core import tree
from hydrax.core.build import Check, ConfigError, Positive, PositiveFloat
from hydrax.eval.layer import PASSES, Layer, Memory, Program, default_config, uncached
from hydrax.eval.timing import Times, isolated, side_by_side
from hydrax.ops.table import complaint
from hydrax.train import folder

Value = TypeVar("Value")
Key = tuple[int, str]
"""Length and pass."""


@dataclasses.dataclass(frozen=True)
class Settings:
    mixers: Annotated[tuple[str, ...], Check("at least one mixer", bool)]
    d_model: Positive  # width of the layer, from which the mixer's default widths follow
    batch: Positive  # rows
    seq_lens: Annotated[tuple[Positive, ...], Check("at least one length", bool)]  # tokens of a row
    dtype: Literal["float32", "bfloat16"]  # of activations and of matrices
    impl: str | None  # implementation of the ops; None: their own choice
    backward: bool  # measure more than the forward pass
    repeats: Positive  # samples of a program, at most
    seconds: PositiveFloat  # of measuring after which a program gets no further sample
    threads: Positive  # programs of a mixer compiled at the same time
    isolate: bool  # a new process for every mixer

    def __post_init__(self) -> None:
        for name in self.mixers:
            if name not in mixers.TABLE:
                raise ConfigError("mixers", name, f"expected all, or some of {', '.join(mixers.names())}")
            default_config(name, self.d_model)

    def layer(self, name: str) -> Layer:
        """The layer to measure."""
        return Layer(name, self.d_model, self.dtype, self.impl)

    @property
    def passes(self) -> list[str]:
        """What to measure of it."""
        return list(PASSES) if self.backward else ["forward"]


@dataclasses.dataclass(frozen=True)
class Result:
    """A program. Its ratios are of times per token, to the shortest row of the same mixer: 1 if time is linear in T."""

    compile_seconds: float
    seconds: Times
    ns_per_token: float
    flops_per_second: float
    ratio: float  # of medians
    ratio_of_minima: float
    memory: Memory


@dataclasses.dataclass(frozen=True)
class Row:
    """A mixer at one length."""

    mixer: str
    seq_len: int
    options: dict[str, Any]
    parameters: int
    flops_per_token: float  # of the forward pass
    state_bytes: int  # of one row while decoding
    results: dict[str, Result]  # by pass
    error: str | None  # why one is missing


def everything(d_model: int) -> tuple[str, ...]:
    """The mixers with a state of fixed size: all but softmax attention, whose keys and values grow with the row."""
    return tuple(name for name in mixers.names() if not mixers.row(name).grows(default_config(name, d_model)))


def check(settings: Settings) -> None:
    """Refuses what only the ops know to be wrong.

    Raises:
      ConfigError: an op cannot serve `impl`, or there is none of that name.
    """
    if settings.impl is None:
        return
    named = complaint(settings.impl) if "=" in settings.impl else None
    if reason := named or _call(settings, _refusal, settings):
        raise ConfigError("impl", settings.impl, reason)


def environment(settings: Settings) -> dict[str, Any]:
    """Where the measurements are made."""
    return {**_call(settings, folder.environment), "cores": os.cpu_count()}


def bench(settings: Settings) -> Iterator[list[Row]]:
    """The rows of one mixer after another, by length. What fails is a row with an error."""
    for name in settings.mixers:
        try:
            yield _call(settings, measure, name, settings)
        except Exception as error:  # an isolated process that died is one, too
            yield _rows(settings, settings.layer(name), {}, {}, dict.fromkeys(settings.seq_lens, _line(error)))


def measure(name: str, settings: Settings) -> list[Row]:
    """The rows of one mixer, measured in this process."""
    layer = settings.layer(name)
    params, inputs = layer.init(), functools.cache(functools.partial(layer.inputs, settings.batch))
    keys = [(seq_len, name) for seq_len in sorted(set(settings.seq_lens)) for name in settings.passes]
    programs: dict[Key, Program] = {}
    errors: dict[int, str] = {}
    with uncached(), concurrent.futures.ThreadPoolExecutor(settings.threads) as pool:
        futures = {
            (seq_len, name): pool.submit(Program, layer, name, params, settings.batch, seq_len)
            for seq_len, name in keys
        }
    for seq_len, name in keys:  # short rows first: each new peak of memory is higher, and can be read
        try:
            program = futures.pop((seq_len, name)).result()
            program.start(params, inputs(seq_len))
            programs[seq_len, name] = program
        except Exception as error:  # out of memory, or whatever a mixer raises
            errors.setdefault(seq_len, f"{name}: {_line(error)}")
    times = side_by_side(programs, repeats=settings.repeats, seconds=settings.seconds)
    return _rows(settings, layer, programs, times, errors)


def _rows(
    settings: Settings,
    layer: Layer,
    programs: Mapping[Key, Program],
    times: Mapping[Key, Times],
    errors: Mapping[int, str],
) -> list[Row]:
    return [
        Row(
            mixer=layer.name,
            seq_len=seq_len,
            options=dataclasses.asdict(layer.cfg),
            parameters=tree.count(layer.shapes),
            flops_per_token=layer.flops(seq_len),
            state_bytes=layer.row.state_bytes(layer.cfg, seq_len, layer.dtype.itemsize),
            results={
                name: _result(settings, layer, (seq_len, name), programs[seq_len, name], times)
                for name in settings.passes
                if (seq_len, name) in programs
            },
            error=errors.get(seq_len),
        )
        for seq_len in sorted(set(settings.seq_lens))
    ]


def _result(settings: Settings, layer: Layer, key: Key, program: Program, times: Mapping[Key, Times]) -> Result:
    (seq_len, name), own = key, times[key]
    shortest = min(length for length, other in times if other == name)
    short, tokens = times[shortest, name], settings.batch * seq_len
    return Result(
        compile_seconds=program.compile_seconds,
        seconds=own,
        ns_per_token=own.median / tokens * 1e9,
        flops_per_second=PASSES[name].forwards * layer.flops(seq_len) * tokens / own.median,
        ratio=own.median / seq_len / (short.median / shortest),
        ratio_of_minima=own.minimum / seq_len / (short.minimum / shortest),
        memory=program.memory,
    )


def _refusal(settings: Settings) -> str | None:
    """What an op says to `impl` that cannot serve it."""
    for layer in map(settings.layer, settings.mixers):
        inputs = jax.eval_shape(functools.partial(layer.inputs, settings.batch, min(settings.seq_lens)))
        try:
            jax.eval_shape(layer, layer.shapes, inputs["x"], inputs["facts"])
        except ValueError as error:
            return str(error)
    return None


def _call(settings: Settings, function: Callable[..., Value], *args: Any) -> Value:
    """Its value; from a new process if mixers are to be isolated."""
    return isolated(function, *args) if settings.isolate else function(*args)


def _line(error: Exception) -> str:
    """The beginning of what an error says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
