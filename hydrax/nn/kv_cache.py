"""The keys and values a softmax mixer keeps of the current document: all of them, or those that later tokens may see.

A cache is dict(k [B,S,Hk,K], v [B,S,Hk,V], positions, segment_ids int32 [B,S]); zeros are an empty one, since segment
id 0 marks an empty slot and 1 a taken one. A key at position p lives in slot p, or with a window in slot p if
p < sink_tokens, else in sink_tokens + (p - sink_tokens) mod window. Keys are stored after RoPE.

Where keys leave in another order, and each head of keys lets go of its own, a new one takes any slot that is free
(`evict`): positions and documents are [B,S,n], for all heads (n = 1) or for each, beside other facts of keys [B,S,n].

Keys that are the values as well are kept once: a cache without v.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hydrax.core.typing import Array, Bool, Float, Int
from hydrax.ops import documents
from hydrax.ops.softmax import attention
from hydrax.parallel.sequence import self_attention
from hydrax.parallel.shards import Shards

Cache = dict[str, Array]


def empty(
    batch: int,
    slots: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int | None,
    dtype: jnp.dtype,
    by_head: tuple[int, ...] = (),
    **facts: Any,
) -> Cache:
    """The cache before the first token; `by_head` = (n,) for `evict`, with the dtypes of other facts of keys.

    It has no values with `value_dim` = None.
    """
    widths = {"k": key_dim, "v": value_dim}
    facts = {"positions": jnp.int32, "segment_ids": jnp.int32, **facts}
    return {
        **{name: jnp.zeros((batch, slots, kv_heads, n), dtype) for name, n in widths.items() if n is not None},
        **{name: jnp.zeros((batch, slots, *by_head), dtype) for name, dtype in facts.items()},
    }


class Keys(NamedTuple):
    """All that a query may see: what the cache holds and the new tokens. A layer may lend it to layers without.

    Attributes:
      k, v: keys after RoPE, and values.
      positions, segment_ids: index in the document and document of each; None: those of the queries, which have no
        cache before them.
    """

    k: Float[Array, "B S Hk K"]
    v: Float[Array, "B S Hk V"]
    positions: Int[Array, "B S *n"] | None = None
    segment_ids: Int[Array, "B S *n"] | None = None


def collect(
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hk V"] | None,
    cache: Cache | None,
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
) -> Keys:
    """The cache, which belongs to the document of token 0, and the new tokens; these alone without a cache.

    With v = None the keys are the values, too.
    """
    if cache is None:
        return Keys(k, k if v is None else v)
    taken = cache["segment_ids"]
    positions, segment_ids = (_of_heads(x, taken) for x in (positions, _ids(positions, segment_ids)))
    seen = jnp.where(taken != 0, segment_ids[:, :1], 0)
    joined = jnp.concatenate([cache["k"], k.astype(cache["k"].dtype)], axis=1)
    return Keys(
        k=joined,
        v=joined if v is None else jnp.concatenate([cache["v"], v.astype(cache["v"].dtype)], axis=1),
        positions=jnp.concatenate([cache["positions"], positions], axis=1),
        segment_ids=jnp.concatenate([seen, segment_ids], axis=1),
    )


def in_order(
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hk V"],
    cache: Cache | None,
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
) -> Keys:
    """What `collect` gives, with the new tokens right behind the cached ones, so that no document has gaps.

    For caches without a window. What is left of the row has segment id 0.
    """
    if cache is None:
        return Keys(k, v)
    ids, taken = _ids(positions, segment_ids), (cache["segment_ids"] != 0).sum(1)
    old = {name: cache[name] for name in ("k", "v", "positions")}
    old["segment_ids"] = jnp.where(cache["segment_ids"] != 0, ids[:, :1], 0)

    def put(old: Array, new: Array) -> Array:
        room = jnp.pad(old, [(0, 0), (0, new.shape[1])] + [(0, 0)] * (old.ndim - 2))
        place = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=0))
        return place(room, new.astype(old.dtype), taken)

    return Keys(**jax.tree.map(put, old, {"k": k, "v": v, "positions": positions, "segment_ids": ids}))


def shared(keys: Keys | None) -> Keys:
    """The keys that another layer lends.

    Raises:
      ValueError: there are none.
    """
    if keys is None:
        raise ValueError("kv = 'shared': expected the keys of another layer in ctx.keys, and there are none")
    return keys


def attend(
    q: Float[Array, "B T H K"],
    keys: Keys,
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    shards: Shards | None = None,
    tap_lse: Callable[[Array], Array] | None = None,
    **options: Any,
) -> Any:
    """`attention` of the queries over `collect`ed keys; plain self-attention where these are the queries' own.

    `tap_lse` is told the logarithm of the denominator.
    """
    if tap_lse is not None:
        facts: dict[str, Any] = {"positions": positions, "segment_ids": segment_ids, "shards": shards}
        o, lse = attend(q, keys, return_lse=True, **facts, **options)
        tap_lse(lse)
        return o
    if keys.segment_ids is None:
        options |= {"segment_ids": segment_ids, "positions": positions}
        return self_attention(q, keys.k, keys.v, shards=shards, **options)
    return attention(
        q,
        keys.k,
        keys.v,
        segment_ids=_ids(positions, segment_ids),
        positions=positions,
        kv_segment_ids=keys.segment_ids,
        kv_positions=keys.positions,
        **options,
    )


def sides(
    keys: Keys, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None, shards: Shards | None
) -> dict[str, Any]:
    """Positions and documents of the queries and of `collect`ed keys, as ops that look for groups of keys take them.

    The first `cached` keys are those of a cache. Only rows without one are divided over devices.
    """
    own = {"positions": positions, "segment_ids": segment_ids}
    if keys.segment_ids is None:
        return {**own, "shards": shards}
    own["segment_ids"] = _ids(positions, segment_ids)
    of_keys = {"kv_positions": keys.positions, "kv_segment_ids": keys.segment_ids}
    return {**own, **of_keys, "cached": keys.k.shape[1] - positions.shape[1]}


def write(
    cache: Cache | None,
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hk V"] | None,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    window: int | None = None,
    sink_tokens: int = 0,
    **facts: Array,
) -> Cache | None:
    """The cache after these tokens: it holds the last real document of each row. None stays None.

    `facts` [B,T,...] are what it keeps beside keys and values; it has no values with v = None.
    Positions that fit no slot are dropped (a full cache has a maximal length).
    """
    if cache is None:
        return None
    segment_ids = _ids(positions, segment_ids)
    filled, valid = documents.fill_padding(segment_ids)
    kept = valid & (filled == filled[:, -1:])
    slots = positions
    if window is not None:
        last = jnp.max(jnp.where(kept, positions, -1), axis=1, keepdims=True)
        kept &= (positions > last - window) | (positions < sink_tokens)
        slots = jnp.where(positions < sink_tokens, positions, sink_tokens + (positions - sink_tokens) % window)
    slots = jnp.where(kept, slots, cache["k"].shape[1])
    continues = filled[:, 0] == filled[:, -1]

    def put(old: Array, new: Array) -> Array:
        if new.shape[1] > 1:  # one token never ends a document that it continues: spare the pass over the cache
            old = jnp.where(continues.reshape(-1, *[1] * (old.ndim - 1)), old, 0)
        return jax.vmap(lambda o, i, n: o.at[i].set(n.astype(o.dtype), mode="drop"))(old, slots, new)

    facts |= {"k": k, "positions": positions, "segment_ids": jnp.ones_like(segment_ids)}
    return jax.tree.map(put, cache, facts if v is None else {**facts, "v": v})


def evict(
    cache: Cache | None,
    new: dict[str, Array],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    ends: Int[Array, "B T n"],
    old_ends: Int[Array, "B S n"],
) -> Cache | None:
    """The cache after these tokens: of the last real document of each row, the keys that are alive. None stays None.

    Args:
      new: k [B,T,Hk,K], v [B,T,Hk,V] and other facts [B,T,n] of the new tokens.
      ends, old_ends: of the new keys and of those in the cache, as these tokens leave them.

    Keys for which no slot is free are dropped.
    """
    if cache is None:
        return None
    filled, valid = documents.fill_padding(_ids(positions, segment_ids))
    own, continues = valid & (filled == filled[:, -1:]), filled[:, 0] == filled[:, -1]
    last = jnp.max(jnp.where(own, positions, -1), axis=1)[:, None, None]
    seen = (old_ends > last) | (last < 0)  # a row of padding alone keeps all keys, whatever its positions say
    stays = (cache["segment_ids"] != 0) & seen & continues[:, None, None]
    slots = jax.vmap(jax.vmap(_free, 1, 1))(stays, own[..., None] & (ends > last))

    def put(old: Array, new: Array) -> Array:
        """Head by head, or for groups of heads with common slots."""
        n = slots.shape[2]
        old, new = (x.reshape(*x.shape[:2], n, -1) for x in (old, new))
        return jax.vmap(jax.vmap(lambda o, i, x: o.at[i].set(x.astype(o.dtype), mode="drop"), 1, 1))(old, slots, new)

    new = {**new, "positions": _of_heads(positions, stays), "segment_ids": jnp.ones_like(slots)}
    cache = {**cache, "segment_ids": jnp.where(stays, cache["segment_ids"], 0)}
    return {name: put(x, new[name]).reshape(x.shape) for name, x in cache.items()}


def _free(stays: Bool[Array, "S"], enters: Bool[Array, "T"]) -> Int[Array, "T"]:
    """A free slot for each key that enters, in order; S where there is none."""
    S = stays.size
    free = jnp.nonzero(~stays, size=enters.size, fill_value=S)[0]
    return jnp.where(enters, free[jnp.cumsum(enters) - 1], S)


def _of_heads(x: Array, like: Array) -> Array:
    """Facts of tokens [B,T] as those of a cache are: [B,T], or [B,T,n]."""
    return x if like.ndim == 2 else jnp.broadcast_to(x[..., None], (*x.shape, like.shape[2]))


def _ids(positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """The documents of new tokens; one per row if none are given."""
    return jnp.ones(positions.shape, jnp.int32) if segment_ids is None else segment_ids
