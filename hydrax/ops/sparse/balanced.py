"""Attention inside clusters of equal size: each takes the queries and the keys that are nearest to it. NOT CAUSAL.

    o_t = mean over the clusters c that took q_t of Σ_s softmax_s(scale · q_t·k_s) v_s    over s <= t, k_s taken by c

A cluster takes the `size` queries and `size` keys of each document that are nearest (arXiv 2003.05997).
"""

from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float, Int
from hydrax.ops.sparse import sets


def balanced_clusters(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G V"],
    near: Float[Array, "B T G N C"],
    *,
    size: int,
    segment_ids: Int[Array, "B T"] | None = None,
    **options: Any,
) -> Float[Array, "B T H V"]:
    """The formula above, cluster by cluster; 0 where no cluster took the query.

    Args:
      near: how near keys are to each cluster, and behind them their queries, N = 1 + H / G. With N = 1 a cluster takes
        the queries of the keys' tokens.
      options: scale, softcap and impl of `ops.softmax.attention`.
    """
    (B, T, H, _), R = q.shape, q.shape[2] // k.shape[2]
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    taken = sets.largest(near.reshape(B, T, -1), ids, lambda n: size).reshape(near.shape)
    both = taken[..., :1, :], taken if near.shape[3] == 1 else taken[..., 1:, :]
    keys, queries = (jnp.broadcast_to(x, (*x.shape[:3], R, x.shape[4])).reshape(B, T, H, -1) for x in both)
    n = min(T, size) if segment_ids is None else T  # there may be many documents
    find = jax.vmap(jax.vmap(lambda row: jnp.nonzero(row, size=n, fill_value=-1)[0], in_axes=1))
    k, v = (jnp.repeat(a, R, axis=2) for a in (k, v))

    @jax.checkpoint
    def add(total: Array, own: tuple[Array, Array]) -> tuple[Array, None]:
        I, J = map(find, own)  # noqa: E741
        qs, ks, vs = (sets.take_heads(*x) for x in ((q, I), (k, J), (v, J)))
        o = sets.token_set_attention(qs, ks, vs, I, J, segment_ids=segment_ids, **options)
        return total + sets.put_heads(fp32(o), I, T), None

    by_cluster = tuple(jnp.moveaxis(x, 3, 0) for x in (queries, keys))
    total, _ = jax.lax.scan(add, jnp.zeros_like(fp32(v)), by_cluster)
    return (total / jnp.maximum(queries.sum(-1), 1)[..., None]).astype(v.dtype)
