"""Layouts: which tokens lie where, and that the causal work of zigzag shards is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hydrax.parallel import layout as layouts
from tests.parallel.devices import mesh_of


@pytest.mark.parametrize(
    ("layout", "expected"),
    [("contiguous", [0, 1, 2, 3, 4, 5, 6, 7]), ("zigzag", [0, 1, 6, 7, 2, 3, 4, 5])],
)
def test_order(layout: str, expected: list[int]) -> None:
    assert layouts.order(layout, 2, 8).tolist() == expected
    x = np.random.default_rng(0).normal(size=(2, 8, 3))
    for array in (x, jnp.asarray(x)):
        there = layouts.place(array, layout, 2)
        assert type(there) is type(array) and np.array_equal(there, array[:, np.asarray(expected)])
        assert np.array_equal(layouts.restore(there, layout, 2), array)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("shards", [1, 2, 8])
def test_positions_of_a_shard_are_its_part_of_the_order(layout: str, shards: int) -> None:
    mesh = mesh_of(shards)
    rows = PartitionSpec("context")
    f = jax.shard_map(lambda x: layouts.positions(layout, "context", len(x)), mesh=mesh, in_specs=rows, out_specs=rows)
    assert np.array_equal(f(jnp.zeros(48)), layouts.order(layout, shards, 48))


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_causal_pairs_per_shard(shards: int) -> None:
    """The last contiguous shard has nearly twice the mean (1.75 at P = 4, for long rows); zigzag shards all have it."""
    T = 96 * shards
    pairs = {name: (layouts.order(name, shards, T).reshape(shards, -1) + 1).sum(1) for name in layouts.LAYOUTS}
    assert len(set(pairs["zigzag"].tolist())) == 1
    assert abs(pairs["contiguous"].max() / pairs["contiguous"].mean() - (2 - 1 / shards)) < 0.01
    assert pairs["zigzag"].sum() == pairs["contiguous"].sum() == T * (T + 1) // 2


def test_refusals() -> None:
    with pytest.raises(ValueError, match="layout = 'spiral': expected one of contiguous, zigzag"):
        layouts.order("spiral", 2, 8)
    with pytest.raises(ValueError, match="10 tokens: expected a multiple of 4 for 2 shards, layout 'zigzag'"):
        layouts.order("zigzag", 2, 10)
    mesh = mesh_of(2)
    rows = PartitionSpec("context")
    f = jax.shard_map(lambda x: layouts.positions("zigzag", "context", 3), mesh=mesh, in_specs=rows, out_specs=rows)
    with pytest.raises(ValueError, match="3 tokens per shard: expected a multiple of 2 for layout 'zigzag'"):
        f(jnp.zeros(6))
