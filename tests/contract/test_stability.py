"""Rows far longer than any test of values: no state drifts away from the recurrence, which runs in fp64 beside it.

A mixer whose state has a bounded size reads 200,000 tokens in pieces, as one does that serves a long row: the state of
a piece is where the next one starts. The reference is the definition, token by token over the whole row, in fp64: what
differs is rounding alone. So the criterion is the one of short rows, the table of tolerances for the outputs of every
piece and of the last, and for the state at the end. An error that grew with the row would fail there: without a bound
on it, sums of 200,000 rounded terms may be off by 1e-2 of themselves, angles of that many radians by 1e-2.

Mixers that keep all keys read 16,384 tokens at once. Their reference reads the last tokens in fp64, after a call that
fills the cache.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax import mixers
from hydrax.core.build import build
from hydrax.core.typing import Array, PyTree
from tests.contract.cases import Case, D, case, is_float, normal, tiny
from tests.tolerances import TOLERANCE, assert_close

LONG, PIECE, LAST = 200_000, 500, 16  # tokens of a row, of a call, and of those whose outputs are compared in each call
WHOLE, SOME = 16_384, 64  # tokens of a row whose keys are all kept, and of a stretch that is compared
CHEAP = {"hgrn"}
"""Mixers of the default tier."""


def bounded(name: str) -> bool:
    """Whether the state stops growing."""
    cfg = build(mixers.get(name).Config, tiny(name)).fill(D)
    return len({mixers.row(name).state_bytes(cfg, n, 4) for n in (LONG, 2 * LONG)}) == 1


BOUNDED = [name for name in mixers.names() if bounded(name) and name != "mlp"]
GROWING = [name for name in mixers.names() if not bounded(name)]
MEAN = np.clip(np.round(16 * normal(30, D)), -64, 63).astype(np.int32)
"""Of the tokens, in 1/32: sums grow and averages do not vanish."""


def tokens(call: Array, count: int, dtype: jnp.dtype) -> Array:
    """x of that call: integers of 8 bits over 32, so that no program rounds them, whatever the dtype."""
    key = jax.random.fold_in(jax.random.key(31), call)
    return (jax.random.randint(key, (1, count, D), -64, 64, jnp.int32) + MEAN).astype(dtype) / 32


def parameters(mixer: Case, dtype: jnp.dtype) -> dict[str, Array]:
    """As a step in that dtype gets them, the same numbers in all: those that are cast were rounded to bf16."""
    exact = {
        name: np.asarray(p).astype(jnp.bfloat16).astype(np.float32) if name in mixer.cast_names else np.asarray(p)
        for name, p in mixer.params.items()
    }
    cast = mixer.cast(dtype, jax.tree.map(jnp.asarray, exact))
    return jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, dtype)), cast)


def in_pieces(call: Callable, state: PyTree, count: int) -> tuple[PyTree, Array]:
    """`call`(state, number) -> (y, state), so many times: the last state, and the last outputs of each call."""

    def body(state: PyTree, i: Array) -> tuple[PyTree, Array]:
        y, new = call(state, i)
        return jax.tree.map(lambda a, old: a.astype(old.dtype), new, state), y[:, -LAST:]

    state, y = jax.lax.scan(body, state, jnp.arange(count, dtype=jnp.int32))
    return state, y


def long_row(name: str, dtype: jnp.dtype, impl: str | None) -> tuple[PyTree, np.ndarray]:
    """State and outputs of a mixer after `LONG` tokens."""
    mixer = case(name, chunk_size=64)

    @jax.jit
    def run(params: dict[str, Array]) -> tuple[PyTree, Array]:
        def call(state: PyTree, i: Array) -> tuple[Array, PyTree]:
            positions = i * PIECE + jnp.arange(PIECE, dtype=jnp.int32)[None]
            return mixer(params, tokens(i, PIECE, dtype), positions=positions, state=state, impl=impl)

        return in_pieces(call, mixer.init(1, LONG, dtype), LONG // PIECE)

    return jax.tree.map(np.asarray, run(parameters(mixer, dtype)))


def floats(tree: PyTree) -> PyTree:
    """The leaves that are measured: counts and places are compared as what they lead to."""
    return [(path, x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0] if is_float(x)]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in CHEAP else pytest.mark.slow) for n in BOUNDED])
def test_200_000_tokens_leave_no_drift(name: str) -> None:
    with jax.enable_x64(True):
        want, y_want = long_row(name, jnp.dtype(jnp.float64), "recurrent")
    for dtype, tolerance in ((jnp.float32, TOLERANCE["fp32_op"]), (jnp.bfloat16, TOLERANCE["bf16_long"])):
        got, y = long_row(name, jnp.dtype(dtype), None)
        assert_close(f"{dtype.__name__} outputs", y, y_want, tolerance)
        assert_close(f"{dtype.__name__} last outputs", y[-1], y_want[-1], tolerance)
        for (path, a), (_, b) in zip(floats(got), floats(want), strict=True):
            assert_close(f"{dtype.__name__} state {jax.tree_util.keystr(path)}", a, b, tolerance)


def whole_row(name: str, dtype: jnp.dtype) -> np.ndarray:
    """The last outputs of one call of `WHOLE` tokens; in fp64, of a call for these alone, by the definition."""
    mixer = case(name, chunk_size=64)
    params = parameters(mixer, dtype)
    x = tokens(jnp.int32(0), WHOLE, dtype)

    def last(params: dict[str, Array], x: Array) -> Array:
        if dtype != jnp.float64:
            return mixer(params, x)[0][:, -SOME:]
        _, state = mixer(params, x[:, :-SOME], state=mixer.init(1, WHOLE, dtype))
        positions = jnp.arange(WHOLE - SOME, WHOLE, dtype=jnp.int32)[None]
        return mixer(params, x[:, -SOME:], positions=positions, state=state, impl="recurrent")[0]

    return np.asarray(jax.jit(last)(params, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", GROWING)
def test_16_384_keys_leave_no_drift(name: str) -> None:
    with jax.enable_x64(True):
        want = whole_row(name, jnp.dtype(jnp.float64))
    for dtype, tolerance in ((jnp.float32, TOLERANCE["fp32_op"]), (jnp.bfloat16, TOLERANCE["bf16_long"])):
        assert_close(f"{dtype.__name__} last outputs", whole_row(name, jnp.dtype(dtype)), want, tolerance)
