"""The ops of hydrax."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.core.typing import Array
from hydrax.eval.kernels import LOW, Problem, Shape
from hydrax.eval.timing import seconds_of
from hydrax.ops.delta import delta_rule
from hydrax.ops.linear import linear_attention
from hydrax.ops.scan import linear_scan

OPS: dict[str, Callable[..., Any]] = {
    "linear_attention": linear_attention,
    "delta_rule": delta_rule,
    "linear_scan": linear_scan,
}


def facts() -> dict[str, Any]:
    """The device, and versions."""
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


def definition(problem: Problem, shape: Shape) -> dict[str, np.ndarray]:
    """The output and gradients of the recurrence in fp32."""
    return _results(problem, shape, "float32", "recurrent")


def evaluate(problem: Problem, shape: Shape) -> dict[str, np.ndarray]:
    """The output and gradients of what the op chooses."""
    return _results(problem, shape, "bfloat16", None)


def sample(problem: Problem, shape: Shape, name: str, calls: int) -> float:
    """Seconds per call of a pass."""
    return seconds_of(_program(problem, shape)[name], calls)


def _results(problem: Problem, shape: Shape, dtype: str, impl: str | None) -> dict[str, np.ndarray]:
    x, do = _inputs(problem, shape, dtype)
    if problem.shape:
        found = dict(zip(("o", "state"), jax.jit(functools.partial(OPS[problem.op], impl=impl))(**x), strict=True))
    else:
        o, gradients = jax.jit(functools.partial(_pull, problem, impl))(x, do)
        found = {"o": o, **gradients}
    return {name: np.asarray(a, np.float32) for name, a in found.items()}


def _inputs(problem: Problem, shape: Shape, dtype: str) -> tuple[dict[str, Array], Array]:
    x = {n: jnp.asarray(a, dtype if n in LOW else "float32") for n, a in problem.inputs(shape).items()}
    return x, jnp.asarray(problem.cotangent(shape), dtype)


def _forward(problem: Problem, impl: str | None, x: dict[str, Array]) -> Array:
    return OPS[problem.op](**x, impl=impl)[0]


def _pull(problem: Problem, impl: str | None, x: dict[str, Array], do: Array) -> tuple[Array, dict[str, Array]]:
    own = {name: x[name] for name in problem.learned(x)}
    o, pullback = jax.vjp(lambda own: _forward(problem, impl, x | own), own)
    return o, {f"d{name}": a for name, a in pullback(do.astype(o.dtype))[0].items()}


@functools.lru_cache(1)
def _program(problem: Problem, shape: Shape) -> dict[str, Callable[[], Any]]:
    """The passes, compiled and called once; the last problem makes room."""
    x, do = _inputs(problem, shape, "bfloat16")
    if problem.shape:
        return {"forward": _steps(OPS[problem.op], x)}
    forward = jax.jit(functools.partial(_forward, problem, None))
    both = jax.jit(functools.partial(_pull, problem, None))
    calls: dict[str, Callable[[], Any]] = {
        "forward": functools.partial(forward, x),
        "forward_backward": functools.partial(both, x, do),
    }
    for call in calls.values():
        jax.block_until_ready(call())
    return calls


def _steps(op: Callable[..., Any], x: dict[str, Array]) -> Callable[[], Array]:
    """A token after another, from state to state."""

    def step(state: Array, rest: dict[str, Array]) -> tuple[Array, Array]:
        return op(**rest, initial_state=state)

    run = jax.jit(step, donate_argnums=0)
    state = x.pop("initial_state")

    def call() -> Array:
        nonlocal state
        o, state = run(state, x)
        return o

    jax.block_until_ready(call())
    return call
