"""Attention among the tokens of one cluster: of those that a query shares document and cluster with, the last few.

    o_t = Σ_s softmax_s(scale · q_t·k_s) v_s    over s of t's document and cluster with 0 <= rank_t - rank_s < window

rank: how many tokens of the same document and cluster come before. Every head of keys has clusters of its own, for all
its queries. In the order of (document, cluster, rank) this is a sliding window over packed documents, at its cost.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core.typing import Array, Float, Int
from hydrax.ops import documents
from hydrax.ops.dispatch import select
from hydrax.ops.softmax import LONG, attention

NOWHERE = 2**31 - 1
"""The set of tokens that are in none, in the order of sets."""


def ranks(
    clusters: Int[Array, "B T G"], ids: Int[Array, "B T"], number: int, before: Int[Array, "B G C"] | None = None
) -> tuple[Int[Array, "B T G"], Int[Array, "B G C"]]:
    """The rank of every token, and how many tokens of the last document are in each of `number` clusters.

    `ids` are the documents; `before` counts the tokens that the document of token 0 has had in earlier calls.
    """
    filled, valid = documents.fill_padding(ids)
    if before is None:
        before = jnp.zeros((*clusters.shape[::2], number), jnp.int32)
    sets = _sets(clusters, ids, number)

    def head(sets: Array) -> Array:
        order, place = jnp.argsort(sets, stable=True), jnp.arange(sets.size)
        begins = documents.changes(sets[order][None])[0]
        return jnp.zeros_like(place).at[order].set(place - jax.lax.cummax(jnp.where(begins, place, 0)))

    rank = jax.vmap(jax.vmap(head, 1, 1))(sets)
    earlier = jax.vmap(jax.vmap(lambda n, c: n[c], (0, 1), 1))(before, clusters)
    rank = rank + jnp.where(filled == filled[:, :1], 1, 0)[..., None] * earlier
    last = (valid & (filled == filled[:, -1:]))[..., None, None]
    new = jnp.sum(last & (clusters[..., None] == jnp.arange(number)), axis=1, dtype=jnp.int32)
    return rank, new + jnp.where((filled[:, :1] == filled[:, -1:])[..., None], before, 0)


def clustered_window(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    window: int,
    number: int,
    clusters: Int[Array, "B T G"],
    ranks: Int[Array, "B T G"],
    segment_ids: Int[Array, "B T"] | None = None,
    kv_clusters: Int[Array, "B S G"] | None = None,
    kv_ranks: Int[Array, "B S G"] | None = None,
    kv_segment_ids: Int[Array, "B S *G"] | None = None,
    cached: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str | None = None,
) -> Float[Array, "B T H V"]:
    """The formula above.

    Args:
      q, k, v: kv head h serves the query heads h·R .. h·R + R - 1, R = H / G.
      number: clusters per head of keys; they are 0 .. number - 1.
      clusters, ranks, segment_ids: of the queries, `kv_...` of the keys, if these are not the queries' own. Documents
        may differ between heads of keys: id 0 is nowhere.
      cached: the queries' own keys come behind so many of a cache; None: keys are any.
      scale, softcap: as of `ops.softmax.attention`.
      impl: "recurrent" (the definition), "xla" (in the order of the row), "chunked" (sorted), or None to choose. Where
        a sorted token lies depends on later ones: its output then does so by rounding.
    """
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    sets = _sets(clusters, ids, number)
    own = kv_clusters is None
    kv_sets = sets if kv_clusters is None else _sets(kv_clusters, kv_segment_ids, number)
    kv_ranks = ranks if own else kv_ranks
    fold = lambda x: jnp.moveaxis(x.reshape(B, x.shape[1], G, -1), 2, 1).reshape(B * G, x.shape[1], -1)  # noqa: E731
    of_queries, of_keys = ([fold(x)[..., 0] for x in y] for y in ((sets, ranks), (kv_sets, kv_ranks)))
    q, k, v = fold(q).reshape(B * G, T, H // G, K), fold(k)[:, :, None], fold(v)[:, :, None]
    together = own or cached is not None  # the queries are the last keys
    form = select("clustered_window", impl, FORMS, "chunked" if together and T > 1 and S >= LONG else "xla", q.shape)
    form = form if together else _in_the_row
    how = {"window": window, "scale": K**-0.5 if scale is None else scale, "softcap": softcap}
    impl = "recurrent" if form is _recurrent else impl
    o = form(q, k, v, of_queries, of_keys, impl=impl, **how)
    return jnp.moveaxis(o.reshape(B, G, T, H // G, -1), 1, 2).reshape(B, T, H, -1)


def _in_the_row(
    q: Array, k: Array, v: Array, of_queries: list[Array], of_keys: list[Array], *, impl: str | None, **how: Any
) -> Array:
    """Every query looks at all keys, where they are."""
    sets, kv_sets = (jnp.where(x[0] == NOWHERE, 0, x[0]) for x in (of_queries, of_keys))
    facts: dict[str, Any] = {
        "segment_ids": sets,
        "positions": of_queries[1],
        "kv_segment_ids": kv_sets,
        "kv_positions": of_keys[1],
    }
    return attention(q, k, v, impl=impl, **facts, **how)


def _recurrent(*args: Any, **how: Any) -> Array:
    """The definition: one query at a time, in fp32."""
    return _in_the_row(*args, **how)


def _sorted(
    q: Array, k: Array, v: Array, of_queries: list[Array], of_keys: list[Array], *, impl: str | None, **how: Any
) -> Array:
    """Each set a packed document, without gaps; cached keys ask for nothing."""
    T, S = q.shape[1], k.shape[1]
    kv_sets, kv_ranks = of_keys
    order = jnp.lexsort((kv_ranks, kv_sets), axis=1)
    sort = jax.vmap(lambda x, at: x[at])
    q = jnp.pad(q, ((0, 0), (S - T, 0), (0, 0), (0, 0)))
    q, k, v, sets = (sort(x, order) for x in (q, k, v, kv_sets))
    o = attention(q, k, v, segment_ids=jnp.where(sets == NOWHERE, 0, sets), impl=impl, **how)
    return sort(o, jnp.argsort(order, axis=1)[:, S - T :])


def _sets(clusters: Int[Array, "B S G"], ids: Int[Array, "B S *G"] | None, number: int) -> Int[Array, "B S G"]:
    """A number for each document and cluster, in their order; padding is nowhere, behind all."""
    assert ids is not None
    ids = ids[..., None] if ids.ndim == 2 else ids
    return jnp.where(ids == 0, NOWHERE, ids * number + clusters)


FORMS: dict[str, Callable] = {"recurrent": _recurrent, "xla": _in_the_row, "chunked": _sorted}
