"""Ops of hydrax beside those of another library: the same values, on one device, in turns.

Each library has a process of its own (`sides`), which holds one problem at a time. First comes accuracy: outputs and
all gradients of a small problem against the recurrence in fp32. Then the processes are timed alternately, at full
size; time is what a caller waits for per call, of many calls in a row. A library that compiles when it is first called
can do so before, in many processes (`prepare`).
"""

import concurrent.futures
import dataclasses
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import ml_dtypes
import numpy as np

from hydrax.core.build import Check, ConfigError, NonNegative, Positive
from hydrax.eval.sides import workers
from hydrax.eval.timing import Times, isolated, times_of
from hydrax.eval.tolerances import op_tolerance, relative_rms
from hydrax.train import folder

BANDWIDTH = {"NVIDIA H100 80GB HBM3": 3.35e12}
"""Bytes per second between memory and chip by device, from data sheets."""

SIDES = {"hydrax": "hydrax.eval.sides.ours", "fla": "hydrax.eval.sides.fla"}
"""Who can be timed, and the module that does it: `facts()`, `evaluate(...)` and `sample(...)`; a peer's also has
`compile_share(...)`."""

PEERS = {"fla": ("fla", "torch")}
"""The sides that are other libraries, and what has to be installed for them."""

PASSES = ("forward", "forward_backward")

LOW = ("q", "k", "v", "a", "b")
"""Inputs that come in bfloat16; the others are fp32."""

Shape = tuple[int, int, int, int]
"""B, T, H and D = K = V."""

DECODED: Shape = (128, 1, 16, 128)
"""One token of each of many rows."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """An op of hydrax with one kind of decay, and what the other library calls it.

    With a `shape` of its own, of one token, it is a step of decoding: forward only, the state being updated in place.
    """

    op: str
    decay: str = "none"
    peer: str | None = None
    gate: float = 1.0  # log-decays are log sigmoid(N(0, 1)) times this
    shape: Shape | None = None

    @property
    def passes(self) -> tuple[str, ...]:
        return PASSES[:1] if self.shape else PASSES

    def shapes(self, wanted: Sequence[Shape]) -> Sequence[Shape]:
        """Those it is timed at."""
        return (self.shape,) if self.shape else wanted

    @property
    def checked(self) -> Shape:
        """That at which results are compared."""
        return (2, *self.shape[1:]) if self.shape else CHECKED

    def inputs(self, shape: Shape) -> dict[str, np.ndarray]:
        """Normal values, rounded to bfloat16 where they are `LOW`; keys of norm 1."""
        B, T, H, D = shape
        draw = _rows(np.random.default_rng(0), B, T)
        if self.op == "linear_scan":
            return {"a": _low(_sigmoid(draw(H, D))), "b": _low(draw(H, D))}
        k = draw(H, D)
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        x = {"q": _low(draw(H, D)), "k": _low(k), "v": _low(draw(H, D))}
        if self.op == "delta_rule":
            x["beta"] = _sigmoid(draw(H))
        if self.decay == "constant":
            x["log_decay"] = -(2.0 ** (-8 * (np.arange(H, dtype=np.float32) + 1) / H))
        if self.decay in ("scalar", "vector"):
            x["log_decay"] = self.gate * np.log(_sigmoid(draw(*((H,) if self.decay == "scalar" else (H, D)))))
        if self.shape:
            x["initial_state"] = draw(H, D, D)[:, 0]
        return x

    def learned(self, x: Mapping[str, Any]) -> tuple[str, ...]:
        """The inputs with gradients: all but a constant decay."""
        return tuple(name for name in x if not (name == "log_decay" and self.decay == "constant"))

    def cotangent(self, shape: Shape) -> np.ndarray:
        """Of the output."""
        B, T, H, D = shape
        return _low(_rows(np.random.default_rng(1), B, T)(H, D))

    def bytes(self, shape: Shape, name: str) -> int:
        """What a pass reads and writes at least: each of its inputs and results once."""
        B, T, H, D = shape
        token = self.inputs((1, 1, H, D))
        size = {
            n: x.size * (2 if n in LOW else 4) * (B * T if n in self.learned(token) else 1) for n, x in token.items()
        }
        forward = sum(size.values()) + B * T * H * D * (4 if self.op == "linear_scan" else 2)
        forward += size.get("initial_state", 0)
        return forward if name == "forward" else 2 * forward + sum(size[n] for n in self.learned(token))


def _rows(rng: np.random.Generator, B: int, T: int) -> Callable[..., np.ndarray]:
    """Draws [B,T,...]; long rows repeat themselves, since drawing takes longer than what is measured."""
    t = min(T, 2048)

    def draw(*shape: int) -> np.ndarray:
        block = rng.standard_normal((1, t, *shape), np.float32)
        return np.tile(block, (B, -(-T // t), *[1] * len(shape)))[:, :T]

    return draw


def _low(x: np.ndarray) -> np.ndarray:
    """x rounded to bfloat16, in fp32."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


PROBLEMS = {
    "constant": Problem("linear_attention", "constant", "simple_gla"),
    "scalar": Problem("linear_attention", "scalar", "simple_gla"),
    "vector": Problem("linear_attention", "vector", "gla", gate=1 / 16),
    "delta": Problem("delta_rule", "none", "delta_rule"),
    "gated_delta": Problem("delta_rule", "scalar", "gated_delta_rule"),
    "kda": Problem("delta_rule", "vector", "kda", gate=1 / 16),
    "scan": Problem("linear_scan"),
    "decode": Problem("linear_attention", "scalar", shape=DECODED),
    "decode_delta": Problem("delta_rule", "scalar", shape=DECODED),
}

CHECKED: Shape = (2, 512, 16, 128)
"""Where results are compared: short, since the recurrence keeps a state per token; with the heads of what is timed,
since a library tunes its kernels for their number."""


@dataclasses.dataclass(frozen=True)
class Settings:
    problems: Annotated[tuple[str, ...], Check("at least one problem", bool)]
    shapes: Annotated[tuple[Shape, ...], Check("at least one shape", bool)]
    peer: str | None  # the other library; None: hydrax alone
    rounds: Positive  # turns of each process
    calls: Positive  # calls in a row per turn
    seconds: Positive = 300  # of a library for one answer, at most; then its process is replaced
    prepare: NonNegative = 0  # seconds in which many processes compile the peer's kernels before

    def __post_init__(self) -> None:
        for name in self.problems:
            if name not in PROBLEMS:
                raise ConfigError("problems", name, f"expected all, or some of {', '.join(PROBLEMS)}")


@dataclasses.dataclass(frozen=True)
class Row:
    """One library at one problem, shape and pass.

    `verdict`: "right", or what is wrong with its results; of such a peer only the time counts.
    """

    problem: str
    shape: Shape
    side: str
    pass_: str
    verdict: str
    errors: dict[str, float]
    seconds: Times | None
    bytes: int
    floor_seconds: float | None


def peer(name: str, *also: str) -> str | None:
    """The other library of that name, None for "none"; of "auto" the one that can run here. `also` are needed as well.

    Raises:
      ConfigError: it is not known, not installed, or there is no GPU.
    """
    if name not in ("auto", "none", *PEERS):
        raise ConfigError("peer", name, f"expected auto, none or one of {', '.join(PEERS)}")
    wanted = [] if name == "none" else [name] if name in PEERS else list(PEERS)
    installed = [peer for peer in wanted if all(map(importlib.util.find_spec, (*PEERS[peer], *also)))]
    if name in PEERS and not installed:
        raise ConfigError("peer", name, f"expected {', '.join((*PEERS[name], *also))} to be installed")
    if not installed or isolated(jax.default_backend) == "gpu":
        return next(iter(installed), None)
    if name in PEERS:
        raise ConfigError("peer", name, "its kernels need a GPU, and JAX finds none here; expected none")
    return None


def prepare(settings: Settings, say: Callable[[str], None]) -> None:
    """Compiles the peer's kernels in many processes, for as long as it may take."""
    if settings.peer is None or not settings.prepare:
        return
    problems = [PROBLEMS[name] for name in settings.problems if PROBLEMS[name].peer]
    what = (SIDES[settings.peer], "compile_share", problems, (*settings.shapes, CHECKED))
    workers.share(
        *what,
        workers=workers.many(),
        seconds=settings.prepare,
        say=lambda text: say(f"compiling kernels of {settings.peer}: {text}"),
    )


def environment(settings: Settings) -> dict[str, Any]:
    """Where it is measured, and the versions on both sides."""
    names = [name for name in ("hydrax", settings.peer) if name]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # together: each imports for long
        facts = pool.map(lambda name: isolated(_alone, SIDES[name], "facts"), names)
        here = pool.submit(isolated, folder.environment)
        return {**here.result(), "sides": dict(zip(names, facts, strict=True))}


class Side:
    """A library in a process of its own, started on first use."""

    def __init__(self, name: str, seconds: float):
        self.name, self._seconds = name, seconds
        self._worker = workers.Worker()

    def ask(self, what: str, *args: Any) -> Any:
        """`what(*args)` of its module, there; raises what `Worker.ask` raises."""
        return self._worker.ask(self._seconds, _alone, SIDES[self.name], what, *args)

    def close(self) -> None:
        """Ends the process."""
        self._worker.close()


def _alone(module: str, what: str, *args: Any) -> Any:
    """`what(*args)` of a module. Two processes share the device: neither may take what it does not use."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return workers.call(module, what, *args)


def compare(settings: Settings) -> Iterator[list[Row]]:
    """The rows of one problem and shape after another."""
    sides = [Side(name, settings.seconds) for name in ("hydrax", settings.peer) if name]
    try:
        bandwidth = BANDWIDTH.get(sides[0].ask("facts")["device"])
        for name in settings.problems:
            problem = PROBLEMS[name]
            own = [side for side in sides if side.name == "hydrax" or problem.peer]
            out = {side.name: text for side in own if (text := _first(side, problem, settings.shapes))}
            left = [side for side in own if side.name not in out]
            verdicts = _verdicts(own[0], left, problem)
            for shape in problem.shapes(settings.shapes):
                yield _rows_of(name, shape, own, out, verdicts, settings, bandwidth)
    finally:
        for side in sides:
            side.close()


def _first(side: Side, problem: Problem, shapes: Sequence[Shape]) -> str:
    """Why it cannot be called. What is tuned at the first call is tuned here, not at the small shape of the check."""
    try:
        side.ask("sample", problem, problem.shapes(shapes)[0], problem.passes[-1], 1)
    except RuntimeError as error:
        return f"fails: {error}"
    return ""


def _verdicts(own: Side, sides: Sequence[Side], problem: Problem) -> dict[str, tuple[str, dict[str, float]]]:
    try:
        expected = own.ask("definition", problem, problem.checked) if sides else {}
    except RuntimeError as error:
        return {side.name: (f"not checked: {error}", {}) for side in sides}
    return {side.name: _verdict(side, problem, expected) for side in sides}


def _verdict(side: Side, problem: Problem, expected: Mapping[str, np.ndarray]) -> tuple[str, dict[str, float]]:
    try:
        found = side.ask("evaluate", problem, problem.checked)
    except RuntimeError as error:
        return f"fails: {error}", {}
    errors = {name: relative_rms(x, expected[name]) for name, x in found.items()}
    wrong = [name for name, x in errors.items() if not x <= op_tolerance(name, "bfloat16")]
    return (f"wrong: {', '.join(wrong)}" if wrong else "right"), errors


def _rows_of(
    name: str,
    shape: Shape,
    sides: Sequence[Side],
    out: Mapping[str, str],
    verdicts: Mapping[str, tuple[str, dict[str, float]]],
    settings: Settings,
    bandwidth: float | None,
) -> list[Row]:
    problem = PROBLEMS[name]
    samples: dict[tuple[str, str], list[float]] = {}
    failures = {(side, which): text for side, text in out.items() for which in problem.passes}
    for _ in range(settings.rounds):
        for side in sides:
            for which in problem.passes:
                key = side.name, which
                if key in failures:
                    continue
                try:
                    samples.setdefault(key, []).append(side.ask("sample", problem, shape, which, settings.calls))
                except RuntimeError as error:
                    failures[key] = f"fails: {error}"
    rows = []
    for side in sides:
        for which in problem.passes:
            key, size = (side.name, which), problem.bytes(shape, which)
            verdict, errors = verdicts.get(side.name, ("", {}))
            times = times_of(samples[key], settings.calls) if key not in failures else None
            floor = size / bandwidth if bandwidth else None
            verdict = failures.get(key, verdict)
            rows.append(Row(name, shape, side.name, which, verdict, errors, times, size, floor))
    return rows
