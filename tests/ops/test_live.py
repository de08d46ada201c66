"""Lists of blocks of keys: none that a query sees is missing, and few others are there."""

import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.softmax import live
from hydrax.ops.sparse.lifetimes import LogBands, Strided

T, B = 1024, live.BLOCK


def seen(first: np.ndarray, at: np.ndarray, end: np.ndarray) -> np.ndarray:
    """[T,S] by the definition."""
    t = np.arange(T)[:, None]
    return (first[:, None] <= at) & (at <= t) & (t <= end)


def by_blocks(mask: np.ndarray) -> np.ndarray:
    return mask.reshape(T // B, B, -1, B).swapaxes(1, 2).reshape(T // B, -1, B * B)


@pytest.mark.parametrize("sorted_", [False, True])
def test_tables_against_every_pair(sorted_: bool) -> None:
    rng = np.random.default_rng(0)
    first = np.maximum.accumulate(rng.integers(0, np.arange(T) // 2 + 1)).astype(np.int32)
    end = (np.arange(T) + rng.integers(-50, 300, T)).astype(np.int32)
    end = np.where(end < np.arange(T), -1, end)
    at = np.arange(T)
    if sorted_:
        at, back = (np.asarray(x)[0, 0] for x in live.order(jnp.asarray(end)[None, None]))
        np.testing.assert_array_equal(at[back], np.arange(T))
        end = end[at]
    facts = (jnp.asarray(at)[None, None] if sorted_ else None, jnp.asarray(end)[None, None], None)
    some, all_ = live.tables(live.EVERYTHING, jnp.asarray(first)[None, None], None, T, *facts)
    pairs = by_blocks(seen(first, at, end))
    assert not (pairs.any(-1) & ~np.asarray(some)[0, 0]).any()
    assert not (~pairs.all(-1) & np.asarray(all_)[0, 0]).any()
    codes, counts = live.listed(some, all_)
    for i, (row, count) in enumerate(zip(codes[0, 0], counts[0, 0], strict=True)):
        np.testing.assert_array_equal(row[:count] // 2, np.flatnonzero(some[0, 0, i]))


@pytest.mark.parametrize(("pattern", "most"), [(LogBands(32), 0.6), (Strided(64, 1, 8, 2), 0.6)])
def test_keys_that_live_equally_long_lie_together(pattern: LogBands | Strided, most: float) -> None:
    """In the order of the row most blocks would stay for one long-lived key."""
    end = jnp.moveaxis(pattern.ends(jnp.arange(32 * T)[None]), 1, 2)
    first = jnp.zeros((1, 1, 32 * T), jnp.int32)
    places, _ = live.order(jnp.where(end >= 32 * T - 1, live.FOREVER, end))
    moved = jnp.take_along_axis(end, places, axis=-1)
    plain = live.tables(live.EVERYTHING, first, None, 32 * T, None, end, None)[0].sum()
    assert live.tables(live.EVERYTHING, first, None, 32 * T, places, moved, None)[0].sum() < most * plain
