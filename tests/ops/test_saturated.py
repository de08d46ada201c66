"""Gates at their ends over 100,000 tokens: what keeps nearly all (1 - 1e-6), nearly nothing, and both in turn.

The reference is the recurrence in fp64. What hardly decays is where fp32 is weakest: a decay is rounded to 2^-24, and a
state that n of them have kept may be off by n 2^-24 of itself. Forms in chunks round once per chunk, `selective_scan`
once per token: that much is granted beside the table of tolerances, and no more. (`linear_scan` is given its decays:
they are the same in fp64.) What forgets has nothing to be off by.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.typing import Array, PyTree
from hydrax.ops.delta import delta_rule
from hydrax.ops.ema import ema
from hydrax.ops.linear import linear_attention
from hydrax.ops.lstm import lstm
from hydrax.ops.scan import linear_scan, selective_scan
from hydrax.ops.slots import slot_attention
from tests.tolerances import TOLERANCE, assert_close, assert_trees_close

pytestmark = pytest.mark.thorough

T, PIECE, CHUNK, LAST = 100_000, 1000, 64, 8
KEEPS, FORGETS = -1e-6, -40.0

Draw = Callable[..., Array]


def gates(kind: str, draw: Draw, *shape: int) -> Array:
    """Log-decays [1,T,*shape] of that kind; "both" forgets at one token of 1000."""
    forgets = {"keeps": 0.0, "forgets": 1.0, "both": 1e-3}[kind]
    rare = jax.scipy.stats.norm.cdf(draw(9, *shape)) < forgets
    return jnp.where(rare, FORGETS, KEEPS).astype(jnp.float32)


def _unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _matrix(kind: str, draw: Draw, *per: int) -> tuple:
    return draw(0, 2, 4), _unit(draw(1, 2, 4)), draw(2, 2, 4), gates(kind, draw, *per)


def _delta(kind: str, draw: Draw, *per: int) -> tuple:
    q, k, v, g = _matrix(kind, draw, *per)
    return q, k, v, 2 * jax.nn.sigmoid(draw(3, 2)), g


def _scan(kind: str, draw: Draw) -> tuple:
    return jnp.exp(gates(kind, draw, 4)), draw(0, 4)


def _selective(kind: str, draw: Draw) -> tuple:
    return draw(0, 4), -gates(kind, draw, 4), -jnp.ones((4, 1), jnp.float32), draw(1, 1), draw(2, 1)


def _slots(kind: str, draw: Draw) -> tuple:
    g = gates(kind, draw, 2, 3)
    return draw(0, 2, 4), draw(1, 2, 4), draw(2, 2, 4), -jnp.expm1(g), g


def _average(kind: str, draw: Draw) -> tuple:
    g = {"keeps": [KEEPS, KEEPS], "forgets": [FORGETS, FORGETS], "both": [KEEPS, FORGETS]}[kind]
    return draw(0, 2), jnp.full((2, 2), jnp.asarray(g, jnp.float32)), jnp.ones((2, 2)), jnp.ones((2, 2))


def _lstm(kind: str, draw: Draw) -> tuple:
    gate = gates(kind, draw, 1, 2)
    f = jnp.where(gate == KEEPS, -jnp.log(jnp.expm1(jnp.float32(-KEEPS))), gate)  # σ(f) is the decay
    x = draw(0, 1, 4, 2)
    return x.at[:, :, :, 1].set(f), 0.3 * _unit(jax.random.normal(jax.random.key(5), (1, 2, 4, 2), jnp.float32))


OPS: dict[str, tuple[Callable, Callable]] = {
    "linear_attention, by head": (linear_attention, lambda kind, draw: _matrix(kind, draw, 2)),
    "linear_attention, by channel": (linear_attention, lambda kind, draw: _matrix(kind, draw, 2, 4)),
    "delta_rule, by head": (delta_rule, lambda kind, draw: _delta(kind, draw, 2)),
    "delta_rule, by channel": (delta_rule, lambda kind, draw: _delta(kind, draw, 2, 4)),
    "linear_scan": (linear_scan, _scan),
    "selective_scan": (selective_scan, _selective),
    "slot_attention": (slot_attention, _slots),
    "ema": (ema, _average),
    "lstm": (lstm, _lstm),
}
"""The op, and its arguments for a piece of the row."""
CHEAP = {"linear_scan"}
BY_TOKEN = {"selective_scan"}
"""Ops that round the decay of every token."""


def long_row(name: str, kind: str, dtype: jnp.dtype, impl: str) -> tuple[PyTree, Array]:
    """The last state, and the last outputs of each piece."""
    op, make = OPS[name]

    def piece(state: PyTree, i: Array) -> tuple[PyTree, Array]:
        def draw(which: int, *shape: int) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), i), which)
            return jax.random.normal(key, (1, PIECE, *shape), jnp.float32)

        args = jax.tree.map(lambda a: a.astype(dtype), make(kind, draw))
        y, state = op(*args, initial_state=state, impl=impl, **({} if impl == "recurrent" else {"chunk_size": CHUNK}))
        return state, y[:, -LAST:]

    @jax.jit
    def run() -> tuple[PyTree, Array]:
        state, _ = jax.eval_shape(lambda: piece(None, jnp.int32(0)))
        start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state)
        return jax.lax.scan(piece, start, jnp.arange(T // PIECE, dtype=jnp.int32))

    return jax.tree.map(np.asarray, run())


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in CHEAP else pytest.mark.slow) for n in OPS])
@pytest.mark.parametrize("kind", ["keeps", "forgets", "both"])
def test_saturated_gates_leave_no_drift(name: str, kind: str) -> None:
    with jax.enable_x64(True):
        want, y_want = long_row(name, kind, jnp.dtype(jnp.float64), "recurrent")
    got, y = long_row(name, kind, jnp.dtype(jnp.float32), "chunked")
    roundings = 0 if kind == "forgets" else T / (1 if name in BY_TOKEN else CHUNK)
    tolerance = TOLERANCE["fp32_op"] + roundings * 2.0**-24
    assert_close("outputs", y, y_want, tolerance)
    assert_close("last outputs", y[-1], y_want[-1], tolerance)
    assert_trees_close("state", got, want, tolerance)
