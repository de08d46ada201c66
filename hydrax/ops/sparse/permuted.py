"""Attention to the keys that are near in another order of the tokens (arXiv 2604.00754).

    o_t = Σ_s softmax_s(scale · q_t·k_s) v_s    over s <= t of the document with |rank_t - rank_s| <= width / 2

Ranks belong to positions, so that what a document reads does not depend on what is packed beside it. In the order of
ranks the keys of a query lie within width / 2 places of it: blocks of queries cost what they see.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float, Int
from hydrax.ops import documents
from hydrax.ops.dispatch import select
from hydrax.ops.softmax import forms
from hydrax.ops.softmax.forms import FUTURE, MASKED

BLOCK = 128
"""Queries per block."""


def permuted_window(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S Hk K"],
    v: Float[Array, "B S Hk V"],
    *,
    width: int,
    ranks: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_ranks: Int[Array, "B S"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    scale: float | None = None,
    cached: int = 0,
    impl: str | None = None,
) -> Float[Array, "B T H V"]:
    """The formula above.

    Args:
      q, k, v: kv head h serves the query heads h·R .. h·R + R - 1, R = H / Hk.
      ranks: of the queries, different ones in a document; `kv_ranks` of the keys, if these are not the queries' own.
      positions, segment_ids, kv_positions, kv_segment_ids, scale: as of `ops.softmax.attention`.
      cached: how many keys are of a cache, wherever they are.
      impl: "recurrent" (the definition), "chunked", or None to choose.
    """
    del cached
    (B, T, H, K), G = q.shape, k.shape[2]
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    positions = documents.document_positions(ids) if positions is None else positions
    own = kv_ranks is None
    of_keys: Any = (positions, ids, ranks) if own else (kv_positions, kv_segment_ids, kv_ranks)
    rules = forms.Rules(K**-0.5 if scale is None else scale, None, None, 0, aligned=False)
    queries = forms.Queries(q.reshape(B, T, G, H // G, K), positions, ids)
    keys = forms.Keys(k, v, *of_keys[:2])
    form = select("permuted_window", impl, FORMS, "chunked", q.shape)
    o = form(queries, ranks, keys, of_keys[2], width // 2, rules, own)
    return o.astype(v.dtype).reshape(B, T, H, -1)


def _near(ranks: Int[Array, "B T"], of_keys: Int[Array, "B S"], half: int) -> Float[Array, "B T 1 1 S"]:
    """What to add to scores so that far keys are masked."""
    far = jnp.abs(ranks[:, :, None] - of_keys[:, None]) > half
    return jnp.where(far, MASKED, 0.0)[:, :, None, None]


def _all_keys(
    queries: forms.Queries, ranks: Array, keys: forms.Keys, of_keys: Array, half: int, rules: forms.Rules, block: int
) -> Array:
    """Every block of queries looks at all keys."""

    def attend(rows: tuple, keys: forms.Keys) -> tuple[Array, Array]:
        return forms.attend(rows[0]._replace(bias=_near(rows[1], of_keys, half)), keys, None, rules)

    return forms.in_chunks(attend, (queries, ranks), keys, rules, block)[0]


def _recurrent(
    queries: forms.Queries, ranks: Array, keys: forms.Keys, of_keys: Array, half: int, rules: forms.Rules, own: bool
) -> Array:
    """The definition: one query at a time, in fp32."""
    queries, keys = queries._replace(q=fp32(queries.q)), keys._replace(k=fp32(keys.k), v=fp32(keys.v))
    return _all_keys(queries, ranks, keys, of_keys, half, rules, 1)


def _chunked(
    queries: forms.Queries, ranks: Array, keys: forms.Keys, of_keys: Array, half: int, rules: forms.Rules, own: bool
) -> Array:
    """In the order of ranks, document by document: a block of C queries and the C + 2·half keys around it."""
    (B, T), C = ranks.shape, min(BLOCK, ranks.shape[1])
    if not own or C + 2 * half >= T:
        return _all_keys(queries, ranks, keys, of_keys, half, rules, C)
    start = jnp.arange(T) - queries.positions  # of each token's document
    order = jnp.lexsort((ranks, start))
    sort = jax.vmap(lambda x, at: x[at])
    queries, keys, ranks = jax.tree.map(lambda x: sort(x, order), (queries, keys, ranks))
    k_dtype, v_dtype = keys.k.dtype, keys.v.dtype
    keys = keys._replace(k=fp32(keys.k), v=fp32(keys.v))  # the gradients of all blocks add up in fp32
    margins = (half, half + -T % C)
    around, near = (jax.tree.map(lambda x: _padded(x, *margins), x) for x in (keys, ranks))
    seen = jnp.arange(T + sum(margins)) - half
    around = around._replace(positions=jnp.where((seen >= 0) & (seen < T), around.positions, FUTURE))
    rows = jax.tree.map(lambda x: _padded(x, 0, -T % C), (queries, ranks))

    @jax.checkpoint
    def block(i: Array) -> Array:
        def cut(x: Array, n: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, i * C, n, axis=1)

        queries, ranks = jax.tree.map(lambda x: cut(x, C), rows)
        keys, of_keys = jax.tree.map(lambda x: cut(x, C + 2 * half), (around, near))
        keys = keys._replace(k=keys.k.astype(k_dtype), v=keys.v.astype(v_dtype))
        return forms.attend(queries._replace(bias=_near(ranks, of_keys, half)), keys, None, rules)[0]

    o = jnp.moveaxis(jax.lax.map(block, tree.alike(jnp.arange(-(-T // C)), order)), 0, 1)
    return sort(o.reshape(B, -1, *o.shape[3:]), jnp.argsort(order, axis=1))


FORMS: dict[str, Callable] = {"recurrent": _recurrent, "chunked": _chunked}


def _padded(x: Array, before: int, after: int) -> Array:
    return jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))
