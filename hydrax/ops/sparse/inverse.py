"""The queries of each block of keys: attention to chosen blocks as dense tiles of M queries and b keys.

The pairs of a query and a block that it chose are sorted by block, and the list of every block fills tiles of its own.
Tiles run twice: for the denominators of all queries, then, with these, for what they add to the outputs. So no output
of a pair is ever kept, and a gradient passes through both.
"""

from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float, Int
from hydrax.ops.softmax import forms

AT_ONCE = 8
"""Tiles per head and step."""


def by_tiles(
    q: Float[Array, "B T Hk R K"],
    k: Float[Array, "B S Hk K"],
    v: Float[Array, "B S Hk V"],
    first: Int[Array, "B T G n"],
    before: tuple[Array, Array],
    rules: forms.Rules,
    b: int,
    M: int,
    seen: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """Attention to the blocks of b keys that begin at `first` and to what `before` read: o and lse of both.

    Args:
      first: by head of keys or by query head; S is none. All keys of a block are visible to the queries that name it,
        and no two blocks overlap.
      before: o [B,T,Hk,R,V] and lse [B,T,Hk,R].
      seen: the places int32 [B,T] from which on and before which keys are visible after all.
    """
    (B, T, Hk, R, _), n = q.shape, first.shape[3]
    E = first.shape[2] // Hk
    M = min(M, T)

    def split(x: Array) -> Array:
        """By query heads with a choice of their own: [B,Hk,E,T,R/E,...]."""
        x = x.reshape(B, T, Hk, E, R // E, *x.shape[4:])
        return jnp.moveaxis(x, 1, 3)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 3, 1)
        return x.reshape(B, T, Hk, R, *x.shape[5:])

    def one(q: Array, k: Array, v: Array, first: Array, o: Array, lse: Array, seen: Any) -> tuple[Array, Array]:
        tokens, begins = tiles(first, k.shape[0], b, M)
        return _merged(q, k, v, tokens, begins, o, lse, rules, b, seen)

    by_choice = jax.vmap(one, in_axes=(0, None, None, 0, 0, 0, None))
    every = jax.vmap(jax.vmap(by_choice, in_axes=(0, 0, 0, 0, 0, 0, None)))
    places = jnp.moveaxis(first.reshape(B, T, Hk, E, n), 1, 3)
    k, v, (o, lse) = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), before
    o, lse = every(split(q), k, v, places, split(o), split(lse), seen)
    return join(o), join(lse)


def tiles(first: Int[Array, "T n"], S: int, b: int, M: int) -> tuple[Int[Array, "N M"], Int[Array, "N"]]:
    """The queries of each tile, T where there is none, and where its keys begin.

    Blocks that do not overlap end in different ranges of b places: so ⌊last place / b⌋ names them.
    """
    (T, n), blocks = first.shape, -(-S // b)
    N = -(-(-(-T * n // M) + blocks) // AT_ONCE) * AT_ONCE
    place = first.reshape(-1)
    block = jnp.where(place < S, (place + b - 1) // b, blocks)
    order = jnp.argsort(block, stable=True)
    count = jnp.zeros(blocks + 1, jnp.int32).at[block].add(1)
    number = -(-count // M)
    tile = (jnp.cumsum(number) - number)[block[order]]
    rank = jnp.arange(T * n) - (jnp.cumsum(count) - count)[block[order]]
    row = jnp.where(block[order] < blocks, tile * M + rank, N * M)
    tokens = jnp.full(N * M, T, jnp.int32).at[row].set((order // n).astype(jnp.int32), mode="drop")
    begins = jnp.zeros(N, jnp.int32).at[row // M].set(place[order].astype(jnp.int32), mode="drop")
    return tokens.reshape(N, M), begins


def _merged(
    q: Float[Array, "T R K"],
    k: Float[Array, "S K"],
    v: Float[Array, "S V"],
    tokens: Int[Array, "N M"],
    begins: Int[Array, "N"],
    o: Float[Array, "T R V"],
    lse: Float[Array, "T R"],
    rules: forms.Rules,
    b: int,
    seen: tuple[Array, Array] | None,
) -> tuple[Array, Array]:
    T, dtypes = q.shape[0], (q.dtype, k.dtype, v.dtype)
    q, k, v = fp32(q), fp32(k), fp32(v)  # the gradients of all tiles add up in fp32
    steps = (tokens.reshape(-1, AT_ONCE, tokens.shape[1]), begins.reshape(-1, AT_ONCE))

    def dense(tokens: Array, begins: Array) -> tuple[forms.Queries, forms.Keys]:
        at = begins[:, None] + jnp.arange(b)
        places = zip((q, k, v), (jnp.minimum(tokens, T - 1), at, at), dtypes, strict=True)
        rows, keys, values = (x[i][:, :, None].astype(dtype) for x, i, dtype in places)
        kept = (tokens < T)[:, :, None]
        if seen is not None:
            low, end = (x[jnp.minimum(tokens, T - 1)][:, :, None] for x in seen)
            kept &= (at[:, None] >= low) & (at[:, None] < end)
        queries = forms.Queries(rows, jnp.zeros_like(tokens), kept=kept[:, :, None, None])
        return queries, forms.Keys(keys, values, jnp.zeros_like(at))

    @jax.checkpoint
    def denominators(step: tuple) -> Array:
        return forms.attend(*dense(*step), None, rules)[1][:, :, 0]

    @jax.checkpoint
    def parts(step: tuple, lse: Array) -> Array:
        tokens, _ = step
        return forms.weigh(*dense(*step), lse[jnp.minimum(tokens, T - 1)][:, :, None], rules)[0][:, :, 0]

    each = jax.lax.map(denominators, steps).reshape(*tokens.shape, -1)
    given, found = jax.lax.stop_gradient((lse, each))
    top = jnp.maximum(given, forms.MASKED / 2).at[tokens].max(found, mode="drop")
    total = jnp.exp(lse - top).at[tokens].add(jnp.exp(each - top[jnp.minimum(tokens, T - 1)]), mode="drop")
    some = total > 0
    both = jnp.where(some, top + jnp.log(jnp.where(some, total, 1)), -jnp.inf)
    finite = jnp.where(some, both, 0)

    def add(o: Array, step: tuple) -> tuple[Array, None]:
        return o.at[step[0]].add(parts(step, finite), mode="drop"), None

    start = tree.alike(o * jnp.exp(lse - finite)[..., None], q)
    return jax.lax.scan(add, start, steps)[0], both
