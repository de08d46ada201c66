"""Windows inside clusters: sorted and in tiles, as in the order of the row; ranks by counting."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.ops.sparse import clustered_window, clusters
from tests.contract.cases import normal, segments
from tests.tolerances import TOLERANCE, assert_equal, assert_trees_close

B, T, H, G, K, C, CACHED = 2, 41, 4, 2, 4, 3, 13
SEG = np.stack([segments((20, 1, 20), T), segments((35,), T)])
OF_KEYS, OF_QUERIES = (np.random.default_rng(i).integers(0, C, (B, T, n)) ** 2 % C for i, n in enumerate((G, H)))
"""Cluster 1 has twice as many as cluster 0, and cluster 2 has none."""


def facts() -> tuple[np.ndarray, np.ndarray]:
    """Ranks of keys, and of the last key that a query's cluster has."""
    groups = OF_QUERIES.reshape(B, T, G, H // G)
    both = jnp.asarray(np.concatenate([OF_KEYS[..., None], groups], axis=3), jnp.int32)
    rank = np.asarray(clusters.ranks(both, jnp.asarray(SEG), C)[0])
    return rank[..., 0], rank[..., 1:].reshape(B, T, H)


def test_ranks_count_the_keys_before() -> None:
    of_keys, of_queries = facts()
    for b, t in np.argwhere(SEG):
        past = np.flatnonzero(SEG[b, : t + 1] == SEG[b, t])
        for h in range(H):
            g = h // (H // G)
            assert of_keys[b, t, g] == np.sum(OF_KEYS[b, past, g] == OF_KEYS[b, t, g]) - 1
            assert of_queries[b, t, h] == np.sum(OF_KEYS[b, past, g] == OF_QUERIES[b, t, h]) - 1
    assert of_queries.min() == -1


def run(impl: str, window: int, asked: bool, cached: bool) -> Any:
    """Outputs and gradients; with `cached` of the last tokens alone, the others being a cache in another order."""
    of_keys, of_queries = facts()
    shapes = {"q": (H, K), "k": (G, K), "v": (G, 5)}
    x = {name: normal(i, B, T, *shape) for i, (name, shape) in enumerate(shapes.items())}
    dy, seg, rest = normal(9, B, T, H, 5) * (SEG != 0)[..., None, None], SEG, slice(CACHED if cached else 0, None)
    how: dict[str, Any] = {"clusters": OF_KEYS[:, rest], "ranks": of_keys[:, rest], "segment_ids": seg[:, rest]}
    if asked:
        how |= {"asked": OF_QUERIES[:, rest], "asked_ranks": of_queries[:, rest]}
    order = np.arange(T)
    if cached:
        order[:CACHED] = np.random.default_rng(0).permutation(CACHED)
        how |= {"kv_clusters": OF_KEYS[:, order], "kv_ranks": of_keys[:, order], "kv_segment_ids": seg[:, order]}
    how = {name: jnp.asarray(a, jnp.int32) for name, a in how.items()}

    def loss(x: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, k, v = x["q"][:, rest], x["k"][:, order], x["v"][:, order]
        fixed: dict[str, Any] = {"window": window, "number": C, "impl": impl, "cached": CACHED if cached else None}
        o = clustered_window(q, k, v, **how, **fixed)
        return jnp.sum(o * dy[:, rest]), o * (seg[:, rest] != 0)[..., None, None]

    return jax.jit(jax.grad(loss, has_aux=True))(x)


@pytest.mark.parametrize(
    ("window", "asked", "cached"),
    [(3, True, False), (7, True, True), pytest.param(3, False, True, marks=pytest.mark.slow), (7, False, False)],
)
def test_sorted_forms_are_the_definition(
    window: int, asked: bool, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of 5 keys, and of 7; outputs and all gradients."""
    monkeypatch.setattr(clusters, "BLOCK", 5)
    got, want = (run(impl, window, asked, cached) for impl in ("chunked", "recurrent"))
    assert_trees_close("gradients and outputs", got, want, TOLERANCE["fp32_op"])
    assert_equal("padding", np.asarray(got[1])[1, -6:], np.zeros((6, H, 5)))
