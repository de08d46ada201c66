"""Lifetimes by rank: a key lives while fewer than n keys of the past beat it (arXiv 2508.02124).

    key i beats key j   <=>   s_i > s_j,  or  s_i = s_j and p_i < p_j
    beaten_j = max(p_j, n-th smallest position among the keys that beat j)         the first query that does not see j

Of the keys i <= t those that are not beaten at t are the n best of them: a query sees the best of its past by a score
that belongs to the key alone, and a key that left never returns. One document is what this says; others beat nothing.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hydrax.core.typing import Array, Float, Int
from hydrax.ops.dispatch import select
from hydrax.ops.sparse.lifetimes import FOREVER


class _Keys(NamedTuple):
    """Keys of one head, in one row: scores, positions, documents (0: none), and places in the row, all [n]."""

    score: Any
    position: Any
    document: Any
    place: Any

    def first(self, n: int) -> "_Keys":
        return jax.tree.map(lambda x: x[:n], self)

    def joined(self, other: "_Keys") -> "_Keys":
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), self, other)


def ranked_ends(
    scores: Float[Array, "B S G"],
    positions: Int[Array, "B S *G"],
    segment_ids: Int[Array, "B S *G"],
    keep: int,
    *,
    old: int = 0,
    keep_last: int = 0,
    granularity: int | None = None,
    impl: str | None = None,
    chunk_size: int = 512,
) -> Int[Array, "B S G"]:
    """Ends of keys of which each query sees the `keep` best of its past, for `lifetime_attention`.

    Args:
      scores: of each head's keys. They get no gradient.
      segment_ids: documents of the keys; 0 = padding, an empty slot.
      old: how many of the keys, the first ones, lie in a cache: in any order, all before the others, and at least the
        best `keep` of the past.
      keep_last: keys at the last so many positions are visible whatever their score.
      granularity: g: a query sees the best keys of the past before its own block of g tokens, and all of that block.
      impl: "recurrent" (the definition), "chunked", or None to choose.
      chunk_size: keys that are ranked at once; results do not depend on it.

    Raises:
      ValueError: an unknown `impl`.
    """
    scores = jax.lax.stop_gradient(scores)
    positions, segment_ids = (_of_heads(x, scores) for x in (positions, segment_ids))
    form = select("ranked_ends", impl, FORMS, "chunked", scores.shape)
    over = functools.partial(form, keep=keep, old=old, chunk_size=chunk_size)
    over_heads = jax.vmap(jax.vmap(over, 1, 1))
    beaten = over_heads(scores, positions, segment_ids)
    last = beaten if granularity is None else (beaten // granularity + 1) * granularity
    ends = jnp.where(beaten == FOREVER, FOREVER, last - 1)
    return jnp.maximum(ends, positions + keep_last - 1) if keep_last else ends


def recurrent(
    score: Array, position: Array, document: Array, *, keep: int, old: int, chunk_size: int
) -> Int[Array, "S"]:
    """The definition: one key at a time, of one head in one row."""

    def beaten(key: tuple) -> Array:
        s, p, d = key
        beats = (score > s) | ((score == s) & (position < p))
        beats &= (document == d) & (d != 0)
        places = jnp.sort(jnp.where(beats, position, FOREVER))
        return jnp.maximum(p, places[keep - 1]) if keep <= places.size else jnp.full_like(p, FOREVER)

    return jax.lax.map(beaten, (score, position, document))


def chunked(score: Array, position: Array, document: Array, *, keep: int, old: int, chunk_size: int) -> Int[Array, "S"]:
    """C keys at a time, with the best `keep` of those before: whoever beats a key among all has as many among these."""
    S = score.size
    C = min(chunk_size, S - old)
    everything = _Keys(score, position, document, jnp.arange(S))
    beaten = jnp.full((S,), FOREVER, jnp.int32)
    best = _best(jax.tree.map(lambda x: x[:old], everything), document[old], max(keep, old))
    # All that is known of what fell out before is that it did so before the first new key.
    beaten = beaten.at[best.place[keep:]].set(position[old] - 1, mode="drop")
    new = jax.tree.map(lambda x: x[old:], everything)
    chunks = jax.tree.map(lambda x, fill: _split(x, C, fill), new, _Keys(0, 0, 0, S))

    def step(carry: tuple, chunk: _Keys) -> tuple[tuple, None]:
        best, beaten = carry
        keys = best.joined(chunk)
        beats = _beats(chunk, keys)  # [keep + C, C]
        before = jnp.concatenate([jnp.arange(keep), _beats(best, chunk).sum(1)])
        seen = (keys.document[:, None] == chunk.document) & (keys.position[:, None] <= chunk.position)
        over = seen & (chunk.document != 0) & (before[:, None] + jnp.cumsum(beats, 1) >= keep)
        when = jnp.min(jnp.where(over, chunk.position, FOREVER), axis=1)
        last = chunk.document[jnp.maximum(jnp.sum(chunk.document != 0) - 1, 0)]  # padding is on the right
        return (_best(keys, last, keep), beaten.at[keys.place].min(when, mode="drop")), None

    return jax.lax.scan(step, (best.first(keep), beaten), chunks)[0][1]


FORMS: dict[str, Callable] = {"recurrent": recurrent, "chunked": chunked}


def _beats(a: _Keys, b: _Keys) -> Array:
    """Whether key i of a beats key j of b, [j,i]."""
    s, p = b.score[:, None], b.position[:, None]
    better = (a.score > s) | ((a.score == s) & (a.position < p))
    return better & (a.document == b.document[:, None]) & (a.document != 0)


def _best(keys: _Keys, document: Array, n: int) -> _Keys:
    """The n best keys of a document, the best first; where there are fewer, keys of none."""
    lacking = n - keys.score.size
    if lacking > 0:
        keys = jax.tree.map(lambda x, fill: jnp.pad(x, (0, lacking), constant_values=fill), keys, _NONE)
    own = (keys.document == document) & (keys.document != 0)
    order = jnp.where(own, -keys.score, jnp.inf)
    found = _Keys(*jax.lax.sort((order, keys.position, *keys), num_keys=2)[2:]).first(n)
    return found._replace(document=jnp.where(found.document == document, found.document, 0))


_NONE = _Keys(0, FOREVER, 0, FOREVER)


def _split(x: Array, C: int, fill: int) -> Array:
    return jnp.pad(x, (0, -x.size % C), constant_values=fill).reshape(-1, C)


def _of_heads(x: Array, like: Array) -> Array:
    return jnp.broadcast_to(x.reshape(*x.shape[:2], -1), like.shape)
