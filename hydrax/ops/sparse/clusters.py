"""Attention among the tokens of one cluster: of those that a query shares document and cluster with, the last few.

    o_t = Σ_s softmax_s(scale · q_t·k_s) v_s    over s of t's document and cluster with 0 <= rank_t - rank_s < window

rank: how many tokens of the same document and cluster come before. Every head of keys has clusters of its own, for all
its queries. In the order of (document, cluster, rank) this is a sliding window over packed documents, at its cost.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float, Int
from hydrax.ops import documents
from hydrax.ops.dispatch import select
from hydrax.ops.softmax import LONG, attention, forms
from hydrax.ops.sparse.inverse import by_tiles

BLOCK = 64
"""Queries in a tile, and at least as many keys."""

NOWHERE = 2**31 - 1
"""The set of tokens that are in none, in the order of sets."""


def ranks(
    clusters: Int[Array, "B T G N"], ids: Int[Array, "B T"], number: int, before: Int[Array, "B G C"] | None = None
) -> tuple[Int[Array, "B T G N"], Int[Array, "B G C"]]:
    """Ranks, and how many keys of the last document are in each of `number` clusters.

    Args:
      clusters: of a token's key, then of whatever else asks for the rank of the last key of a cluster up to its token;
        that is -1 where there is none.
      ids: documents.
      before: counts the keys that the document of token 0 has had in earlier calls.
    """
    filled, valid = documents.fill_padding(ids)
    (B, T, G, N), keys = clusters.shape, clusters[..., 0]
    before = jnp.zeros((B, G, number), jnp.int32) if before is None else before

    def head(sets: Array) -> Array:
        order, is_key = jnp.argsort(sets.reshape(-1), stable=True), jnp.arange(T * N) % N == 0
        seen = jnp.cumsum(is_key[order])
        begins = documents.changes(sets.reshape(-1)[order][None])[0]
        earlier = jax.lax.cummax(jnp.where(begins, seen - is_key[order], 0))
        return jnp.zeros_like(order).at[order].set(seen - earlier - 1).reshape(T, N)

    rank = jax.vmap(jax.vmap(head, 1, 1))(_sets(clusters, ids, number))
    earlier = jax.vmap(jax.vmap(lambda n, c: n[c], (0, 1), 1))(before, clusters)
    rank = rank + jnp.where((filled == filled[:, :1])[..., None, None], earlier, 0)
    last = (valid & (filled == filled[:, -1:]))[..., None, None]
    new = jnp.sum(last & (keys[..., None] == jnp.arange(number)), axis=1, dtype=jnp.int32)
    return rank, new + jnp.where((filled[:, :1] == filled[:, -1:])[..., None], before, 0)


def clustered_window(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    asked: Int[Array, "B T H"] | None = None,
    asked_ranks: Int[Array, "B T H"] | None = None,
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
      asked, asked_ranks: the cluster that each query looks at, and the rank of its last key there; None: its token's.
      number: clusters per head of keys; they are 0 .. number - 1.
      clusters, ranks, segment_ids: of the tokens, `kv_...` of the keys, if these are not the tokens' own. Documents
        may differ between heads of keys: id 0 is nowhere.
      cached: the tokens' own keys come behind so many of a cache; None: keys are any.
      scale, softcap: as of `ops.softmax.attention`.
      impl: "recurrent" (the definition), "xla" (in the order of the row), "chunked" (sorted), or None to choose. Where
        a sorted token lies depends on later ones: its output then does so by rounding.
    """
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    own = kv_clusters is None
    sets, kv_sets = _sets(clusters if asked is None else asked, ids, number), _sets(clusters, ids, number)
    if kv_clusters is not None:
        kv_sets = _sets(kv_clusters, kv_segment_ids, number)
    kv_ranks = ranks if kv_ranks is None else kv_ranks
    ranks = ranks if asked_ranks is None else asked_ranks

    def fold(x: Array) -> Array:
        """Rows of one head of keys each; [B,T,H] becomes rows of T · H / G queries."""
        x = jnp.moveaxis(x.reshape(B, x.shape[1], G, -1, *x.shape[3:]), 2, 1)
        return x.reshape(B * G, -1, *x.shape[4:])

    facts = [(fold(x), fold(y)) for x, y in ((sets, ranks), (kv_sets, kv_ranks))]
    least = LONG if asked is None else 8 * BLOCK
    form = select("clustered_window", impl, FORMS, "chunked" if T > 1 and least <= S else "xla", q.shape)
    if form is _sorted and not (asked is None and (own or cached is not None)):
        form = _tiled  # the queries are not those of the last keys
    how = {"window": window, "scale": K**-0.5 if scale is None else scale, "softcap": softcap}
    impl = "recurrent" if form is _recurrent else impl
    if asked is None:
        q = jnp.moveaxis(q.reshape(B, T, G, H // G, K), 2, 1).reshape(B * G, T, H // G, K)
    else:
        q = fold(q)[:, :, None]
    o = form(q, fold(k)[:, :, None], fold(v)[:, :, None], *facts, impl=impl, **how)
    return jnp.moveaxis(o.reshape(B, G, T, H // G, -1), 1, 2).reshape(B, T, H, -1)


def _in_the_row(
    q: Array,
    k: Array,
    v: Array,
    of_queries: tuple[Array, Array],
    of_keys: tuple[Array, Array],
    *,
    impl: str | None,
    **how: Any,
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
    q: Array,
    k: Array,
    v: Array,
    of_queries: tuple[Array, Array],
    of_keys: tuple[Array, Array],
    *,
    impl: str | None,
    **how: Any,
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


def _tiled(
    q: Array,
    k: Array,
    v: Array,
    of_queries: tuple[Array, Array],
    of_keys: tuple[Array, Array],
    *,
    window: int,
    scale: float,
    softcap: float | None,
    impl: str | None,
) -> Array:
    """Keys sorted as in `_sorted`, in blocks of at least a window, of which a query reaches two at most."""
    (sets, ranks), (kv_sets, kv_ranks), S = of_queries, of_keys, k.shape[1]
    b = max(window, BLOCK)
    order = jnp.lexsort((kv_ranks, kv_sets), axis=1)
    sort = jax.vmap(lambda x, at: x[at])
    k, v, kv_sets, kv_ranks = (sort(x, order) for x in (k, v, kv_sets, kv_ranks))
    start = jax.vmap(jnp.searchsorted)(kv_sets, sets)
    there = (sort(kv_sets, jnp.minimum(start, S - 1)) == sets) & (start < S) & (sets != NOWHERE)
    end = jnp.where(there, start + 1 + ranks - sort(kv_ranks, jnp.minimum(start, S - 1)), start)
    low = jnp.maximum(start, end - window)
    k, v = (jnp.pad(x, ((0, 0), (0, -S % b), (0, 0), (0, 0))) for x in (k, v))
    first = jnp.stack([low // b, jnp.where(end - 1 >= low // b * b + b, (end - 1) // b, -1)], axis=-1) * b
    first = jnp.where((end > low)[..., None] & (first >= 0), first, k.shape[1])[:, :, None]
    q, nothing = q[:, :, None], jnp.zeros((*q.shape[:2], 1, q.shape[2], v.shape[-1]), fp32(v).dtype)
    before = (nothing, jnp.full(nothing.shape[:-1], -jnp.inf, nothing.dtype))
    rules = forms.Rules(scale, softcap, None, 0, aligned=False)
    return by_tiles(q, k, v, first, before, rules, b, BLOCK, (low, end))[0].astype(v.dtype)


def _sets(clusters: Int[Array, "B S G *N"], ids: Int[Array, "B S *n"] | None, number: int) -> Int[Array, "B S G *N"]:
    """A number for each document and cluster, in their order; padding is nowhere, behind all."""
    assert ids is not None
    ids = ids.reshape(*ids.shape, *[1] * (clusters.ndim - ids.ndim))
    return jnp.where(ids == 0, NOWHERE, ids * number + clusters)


FORMS: dict[str, Callable] = {"recurrent": _recurrent, "xla": _in_the_row, "chunked": _sorted}
