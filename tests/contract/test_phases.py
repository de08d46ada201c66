"""Mixers that count chunks from the start of a document: every phase of a chunk is one to stop and to go on at.

`test_mixers.py` cuts a row of 21 tokens everywhere, and goes on with as many. Here rows are cut at each phase of their
third chunk, with two whole chunks behind them (what attention sees no more, and what memories hold), and go on with
little more than a chunk.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax import mixers
from hydrax.core.typing import PyTree
from tests.contract.cases import Case, D, case, normal
from tests.tolerances import TOLERANCE, assert_close, assert_equal

pytestmark = pytest.mark.thorough

CHUNKED = ("gecko", "mega", "megalodon", "rat")
MIXERS = pytest.mark.parametrize("name", CHUNKED)
ALL = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in CHUNKED else pytest.mark.slow) for n in mixers.names()]
)


def splits(mixer: Case) -> np.ndarray:
    """Tokens before the cut, one number for each row of the batch: from two chunks to three, both edges."""
    return np.arange(2 * mixer.cfg.chunk, 3 * mixer.cfg.chunk + 1)


def rows(mixer: Case, seed: int, count: int) -> np.ndarray:
    """The same tokens for each row of the batch."""
    return np.broadcast_to(normal(seed, count, D), (len(splits(mixer)), count, D))


@functools.cache
def prefilled(name: str) -> tuple[PyTree, np.ndarray, np.ndarray]:
    """The states after the cuts, the tokens after them, and what one pass over the row gives for these."""
    mixer = case(name)
    before, after = splits(mixer), mixer.cfg.chunk + 2
    T = before[-1] + after
    x = normal(50, T, D)
    real = (np.arange(before[-1]) < before[:, None]).astype(np.int32)
    run = jax.jit(lambda p, x: mixer(p, x, real, state=mixer.init(len(before), T)))
    _, state = run(mixer.params, np.broadcast_to(x[: before[-1]], (len(before), before[-1], D)))
    full = np.asarray(jax.jit(lambda p, x: mixer(p, x, impl="recurrent")[0])(mixer.params, x[None])[0])
    index = before[:, None] + np.arange(after)
    return state, x[index], full[index]


@MIXERS
def test_steps_go_on_at_every_phase(name: str) -> None:
    mixer = case(name)
    state, x, want = prefilled(name)
    positions = splits(mixer)[:, None] + np.arange(x.shape[1], dtype=np.int32)

    @jax.jit
    def steps(params, state, x, positions):
        def step(state, now):
            y, state = mixer(params, now[0][:, None], positions=now[1][:, None], state=state)
            return state, y[:, 0]

        _, y = jax.lax.scan(step, state, (jnp.moveaxis(x, 1, 0), positions.T))
        return jnp.moveaxis(y, 0, 1)

    got = steps(mixer.params, state, x, positions.astype(np.int32))
    for s, a, b in zip(splits(mixer), got, want, strict=True):
        assert_close(f"steps after {s}", a, b, TOLERANCE["fp32_op"])


@MIXERS
def test_a_call_goes_on_at_every_phase(name: str) -> None:
    """More tokens than a chunk, in one call."""
    mixer = case(name)
    state, x, want = prefilled(name)
    positions = (splits(mixer)[:, None] + np.arange(x.shape[1])).astype(np.int32)
    got, _ = jax.jit(lambda p, s, x: mixer(p, x, positions=positions, state=s))(mixer.params, state, x)
    for s, a, b in zip(splits(mixer), got, want, strict=True):
        assert_close(f"tokens after {s}", a, b, TOLERANCE["fp32_op"])


@ALL
def test_a_call_of_few_tokens_goes_on_everywhere(name: str) -> None:
    """As speculative decoding makes them: fewer tokens than a chunk or block, which end within it or in the next."""
    mixer, T, few = case(name), 21, 5
    before = np.arange(T + 1 - few)
    index = before[:, None] + np.arange(few)
    x = normal(52, T, D)

    @jax.jit
    def two_calls(params, x):
        real = (np.arange(T) < before[:, None]).astype(np.int32)
        _, state = mixer(params, jnp.broadcast_to(x, (len(before), T, D)), real, state=mixer.init(len(before), T))
        return mixer(params, x[index], positions=index.astype(np.int32), state=state)[0]

    full = np.asarray(jax.jit(lambda p, x: mixer(p, x[None], impl="recurrent")[0][0])(mixer.params, x))
    for s, y in zip(before, two_calls(mixer.params, x), strict=True):
        assert_close(f"tokens after {s}", y, full[s : s + few], TOLERANCE["fp32_op"])


@MIXERS
def test_a_document_starts_at_every_phase(name: str) -> None:
    """Of what came before nothing is left, whatever the phase it stopped at: every row reads what a fresh one reads."""
    mixer = case(name)
    state, x, _ = prefilled(name)
    x = rows(mixer, 51, x.shape[1])
    starts = np.ones(len(x), bool)
    run = jax.jit(lambda p, s, x: mixer(p, x, state=s, starts=starts)[0])
    assert_equal("y", run(mixer.params, state, x), run(mixer.params, jax.tree.map(jnp.zeros_like, state), x))
