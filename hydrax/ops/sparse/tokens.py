"""Softmax attention of each query to tokens of its own choice, and the lightning indexer that chooses (2512.02556).

    o_t = Σ_{s in S_t} p_ts v_s,     I_ts = Σ_i w_ti ReLU(d^-1/2 q_ti·k_s),     S_t = the n visible s of largest I_ts

All heads of a query share S_t. The choice has no gradient; the indexer learns from the attention itself, by

    L_t = KL(p̄_t ‖ softmax_S I_t),     p̄_t the mean of p_t over heads, without a gradient
"""

from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, Bool, Float, Int
from hydrax.ops.dispatch import select
from hydrax.ops.softmax import forms

FEW = 8
"""Keys are gathered where there are at least so many times more than are chosen."""


def token_topk_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S Hk K"],
    v: Float[Array, "B S Hk V"],
    idx: Int[Array, "B T n"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "#B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    kv_positions: Int[Array, "#B S"] | None = None,
    impl: str | None = None,
    chunk_size: int | None = None,
) -> Float[Array, "B T H V"]:
    """Attention of query t to the keys idx[t]; exactly zero where there is none.

    Args:
      idx: places of keys, no place twice; -1 is none. Keys of the future or of other documents stay invisible.
      segment_ids, positions, kv_segment_ids, kv_positions: as in `ops.softmax.attention`; the order of the row if None.
      impl: "recurrent" (the definition), "masked" (all scores of a block of queries), "gather" (only those of the
        chosen keys), "chunked" or None to choose between these two.
      chunk_size: queries per block; results do not depend on it.

    Raises:
      ValueError: shapes that do not fit, or an unknown `impl`.
    """
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    if H % G or v.shape[:3] != k.shape[:3] or idx.shape[:2] != (B, T):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}, idx {idx.shape}: expected [B,T,H,K], [B,S,Hk,K|V], "
                         "[B,T,n]")  # fmt: skip
    queries, keys = rows_and_keys(q, k, v, segment_ids, positions, kv_segment_ids, kv_positions)
    rules = forms.Rules(K**-0.5 if scale is None else scale, softcap, None, 0, aligned=False)
    usual = _gather if FEW * idx.shape[2] <= S else _masked
    named = {"recurrent": _recurrent, "masked": _masked, "gather": _gather, "chunked": usual}
    form = select("token_topk_attention", impl, named, "chunked", q.shape)
    o, _ = form(queries, keys, idx, rules, chunk_size or (64 if usual is _masked else 32))
    return o.reshape(B, T, H, -1).astype(v.dtype)


def rows_and_keys(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    positions: Array | None,
    kv_segment_ids: Array | None,
    kv_positions: Array | None,
) -> tuple[forms.Queries, forms.Keys]:
    """The arguments of an attention in the layout of `ops.softmax.forms`."""
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    if T == S and kv_positions is None and kv_segment_ids is None:
        kv_positions, kv_segment_ids = positions, segment_ids
    at, kv_at = (jnp.arange(n)[None] if p is None else p for p, n in ((positions, T), (kv_positions, S)))
    at, kv_at = jnp.broadcast_to(at, (B, T)), jnp.broadcast_to(kv_at, (B, S))
    return forms.Queries(q.reshape(B, T, G, H // G, K), at, segment_ids), forms.Keys(k, v, kv_at, kv_segment_ids)


def _recurrent(queries: forms.Queries, keys: forms.Keys, idx: Array, rules: forms.Rules, _: int) -> tuple[Array, Array]:
    """The definition: one query at a time, in fp32."""
    queries, keys = queries._replace(q=fp32(queries.q)), keys._replace(k=fp32(keys.k), v=fp32(keys.v))
    return _masked(queries, keys, idx, rules, 1)


def _masked(queries: forms.Queries, keys: forms.Keys, idx: Array, rules: forms.Rules, C: int) -> tuple[Array, Array]:
    def block(rows: tuple, keys: forms.Keys) -> tuple[Array, Array]:
        kept = chosen(rows[1], keys.k.shape[1])[:, :, None, None]
        return forms.attend(rows[0]._replace(kept=kept), keys, None, rules)

    return forms.in_chunks(block, (queries, idx), keys, rules, C)


def _gather(queries: forms.Queries, keys: forms.Keys, idx: Array, rules: forms.Rules, C: int) -> tuple[Array, Array]:
    """Every query is a row of its own, with the keys that it chose."""

    def block(rows: tuple, keys: forms.Keys) -> tuple[Array, Array]:
        own, places = rows
        B, C = places.shape[:2]

        def near(x: Array) -> Array:
            x = jax.vmap(lambda x, i: x[i])(x, jnp.maximum(places, 0))
            return x.reshape(B * C, *x.shape[2:])

        few = jax.tree.map(near, keys)
        few = few._replace(positions=jnp.where(places.reshape(B * C, -1) < 0, forms.FUTURE, few.positions))
        alone = jax.tree.map(lambda x: x.reshape(B * C, 1, *x.shape[2:]), own)
        o, lse = forms.attend(alone, few, None, rules)
        return o.reshape(B, C, *o.shape[2:]), lse.reshape(B, C, *lse.shape[2:])

    return forms.in_chunks(block, (queries, idx), keys, rules, C)


def chosen(idx: Int[Array, "B T n"], S: int) -> Bool[Array, "B T S"]:
    """Which of S keys each query chose."""
    B, T, _ = idx.shape
    none = jnp.zeros((B, T, S + 1), bool)
    b, t = jnp.arange(B)[:, None, None], jnp.arange(T)[None, :, None]
    return none.at[b, t, jnp.where(idx < 0, S, idx)].set(True)[..., :S]


def index_scores(
    q: Float[Array, "B T I d"], k: Float[Array, "B S d"], w: Float[Array, "B T I"]
) -> Float[Array, "B T S"]:
    """I above, head after head: [B,I,T,S] never exists."""

    @jax.checkpoint
    def head(total: Array, x: tuple) -> tuple[Array, None]:
        q, w = x
        z = jax.nn.relu(einsum("btd,bsd->bts", q, k) * k.shape[-1] ** -0.5)
        return total + w[..., None] * z, None

    zeros = tree.alike(jnp.zeros((*q.shape[:2], k.shape[1]), jnp.result_type(q, k, w)), q)
    total, _ = jax.lax.scan(head, zeros, (jnp.moveaxis(q, 2, 0), jnp.moveaxis(w, 2, 0)))
    return jnp.where(total == 0, 0, total)  # -0 would lose ties


def select_tokens(
    index: tuple[Array, Array, Array], queries: forms.Queries, keys: forms.Keys, n: int, *, chunk_size: int = 128
) -> Int[Array, "B T n"]:
    """The n visible keys of largest `index_scores`, -1 where there are fewer; ties go to the lower place.

    Args:
      index: queries, keys and weights of the indexer.
      queries, keys: facts of the tokens; their vectors are not read.
    """
    q, k, w = jax.lax.stop_gradient(index)
    n, rules = min(n, k.shape[1]), forms.Rules(1.0, None, None, 0, aligned=False)

    def block(rows: tuple, keys: forms.Keys) -> tuple[Array, Array]:
        seen = forms.visible(rows[0], keys, rules)[:, 0]
        best, places = jax.lax.top_k(jnp.where(seen, index_scores(rows[1], k, rows[2]), -jnp.inf), n)
        return jnp.where(best == -jnp.inf, -1, places), best

    facts = (queries._replace(q=queries.q[:, :, :0, :0, :0]), q, w)
    bare = keys._replace(k=keys.k[..., :0, :0], v=keys.v[..., :0, :0])
    return jax.lax.stop_gradient(forms.in_chunks(block, facts, bare, rules, chunk_size)[0])


def index_loss(
    index: tuple[Array, Array, Array],
    queries: forms.Queries,
    keys: forms.Keys,
    idx: Int[Array, "B T n"] | None,
    rules: forms.Rules,
    *,
    chunk_size: int = 128,
) -> Float[Array, "B T"]:
    """L_t of every query over the keys `idx` that it chose, or over all that it sees if None; 0 where it sees none.

    The gradient is that of the indexer alone.
    """
    queries, keys = jax.lax.stop_gradient((queries, keys))
    q, k, w = (fp32(x) for x in index)
    rows: Any = (queries, q, w) if idx is None else (queries, q, w, idx)

    def block(rows: tuple, keys: forms.Keys) -> tuple[Array, Array]:
        own, q, w, *places = rows
        seen = forms.visible(own, keys, rules)[:, 0]
        if places:
            seen &= chosen(places[0], seen.shape[-1])
        z = forms.scores(own._replace(kept=seen[:, :, None, None]), keys, rules)
        some = seen.any(-1, keepdims=True)
        p = jax.nn.softmax(z, axis=-1).mean((1, 3))
        p = jnp.where(some, p, 0)
        logits = jnp.where(seen, index_scores(q, k, w), forms.MASKED)
        gap = jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1)) - jax.nn.log_softmax(logits, axis=-1), 0)
        return jnp.sum(p * gap, axis=-1), some[..., 0]

    # The keys of the indexer are closed over: their gradients of all blocks add up in fp32.
    return forms.in_chunks(block, rows, keys, rules, chunk_size)[0]
