"""Lifetimes by rank: of every query's past, its best keys; chunk by chunk, and continued from a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.sparse import ranked_ends
from tests.contract.cases import segments
from tests.tolerances import assert_equal

T, G = 40, 2
IDS = np.stack([segments((13, 1, 19), T), segments((T,), T)])
PLACES = np.arange(T) - np.array([[0] * 13 + [13] + [14] * 26, [0] * T])
SCORES = np.random.default_rng(0).integers(0, 15, (2, T, G)) / 4  # with ties, which the earlier key wins


def best(keep: int, keep_last: int = 0, granularity: int | None = None) -> np.ndarray:
    """[B,G,T,T] the keys that each query sees, by sorting its past."""
    seen = np.zeros((2, G, T, T), bool)
    for b, h, t in np.ndindex(2, G, T):
        past = [i for i in range(t + 1) if IDS[b, i] == IDS[b, t] != 0]
        block = PLACES[b, t] // granularity * granularity if granularity else PLACES[b, t] + 1
        near = [i for i in past if PLACES[b, i] >= block or PLACES[b, i] > PLACES[b, t] - keep_last]
        ranked = sorted((i for i in past if PLACES[b, i] < block), key=lambda i: (-SCORES[b, i, h], i))
        seen[b, h, t, near + ranked[:keep]] = True
    return seen


def seen(ends: np.ndarray) -> np.ndarray:
    """The same by lifetimes."""
    alive = np.moveaxis(ends, 1, 2)[:, :, None] >= PLACES[:, None, :, None]
    same = (IDS[:, :, None] == IDS[:, None]) & (IDS != 0)[:, None] & np.tri(T, dtype=bool)
    return alive & same[:, None]


run = jax.jit(ranked_ends, static_argnames=("keep", "keep_last", "granularity", "impl", "chunk_size", "old"))


@pytest.mark.parametrize("how", [{"impl": "recurrent"}, {"chunk_size": 1}, {"chunk_size": 7}, {}], ids=str)
@pytest.mark.parametrize(
    "rules",
    [{"keep": 1}, {"keep": 5}, {"keep": 5, "keep_last": 3}, {"keep": 3, "granularity": 4}, {"keep": T}],
    ids=str,
)
def test_queries_see_the_best_of_their_past(rules: dict, how: dict) -> None:
    ends = run(jnp.asarray(SCORES, jnp.float32), jnp.asarray(PLACES), jnp.asarray(IDS), **rules, **how)
    assert_equal("visible", seen(np.asarray(ends)), best(**rules))


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
@pytest.mark.parametrize("rules", [{"keep": 4}, {"keep": 4, "keep_last": 3}, {"keep": 4, "granularity": 3}], ids=str)
def test_a_cache_of_the_best_is_enough(rules: dict, impl: str) -> None:
    """From what is alive at token 22, in any order, and empty slots, follows what later queries see."""
    cut, rng = 22, np.random.default_rng(1)
    whole = best(**rules)[1]
    scores, positions, ids = (np.zeros((1, 12 + T - cut, G)) for _ in range(3))
    origin = np.zeros((12 + T - cut, G), int)
    for h in range(G):
        alive = np.flatnonzero(whole[h, cut:, :cut].any(0))
        origin[12:, h] = np.arange(cut, T)
        slots = rng.permutation(12)[: len(alive)]
        origin[slots, h], taken = alive, np.r_[slots, 12 : 12 + T - cut]
        scores[0, taken, h], positions[0, taken, h] = SCORES[1, origin[taken, h], h], origin[taken, h]
        ids[0, taken, h] = 1
    facts = (jnp.asarray(a, d) for a, d in ((scores, jnp.float32), (positions, jnp.int32), (ids, jnp.int32)))
    ends = np.asarray(run(*facts, old=12, impl=impl, **rules))[0]
    for h in range(G):
        for t in range(cut, T):
            found = (ends[:, h] >= t) & (ids[0, :, h] == 1) & (positions[0, :, h] <= t)
            assert set(origin[found, h]) == set(np.flatnonzero(whole[h, t]))


def test_scores_get_no_gradient() -> None:
    f = functools.partial(run, positions=jnp.asarray(PLACES), segment_ids=jnp.asarray(IDS), keep=3)
    _, slope = jax.jvp(lambda s: f(s).astype(jnp.float32), (jnp.asarray(SCORES, jnp.float32),), (jnp.ones((2, T, G)),))
    assert not np.any(slope)
