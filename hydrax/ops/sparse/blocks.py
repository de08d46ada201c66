"""Softmax attention of every query to blocks of keys that were chosen for it.

    o_t = Σ_{s in S_t} softmax_{S_t}(scale · q_t·k_s) v_s,    S_t = {s <= t of the document of t, ⌊p_s / b⌋ in idx_t}

with p the position in the document: blocks count from its start, wherever it begins in the row. Three forms give that
beside the definition, with other costs for T queries that choose n blocks of b among S keys:

    masked   all scores of some queries at a time: T·S products, nothing is gathered
    gather   the n·b keys of some queries at a time: T·n·b products, and as many keys pass through memory
    inverse  the queries of each block (arXiv 2502.13189): T·n·b products of whole tiles; each query is read n times
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Bool, Int
from hydrax.ops import dispatch, documents
from hydrax.ops.softmax import forms
from hydrax.ops.sparse.inverse import by_tiles
from hydrax.ops.sparse.tokens import rows_and_keys

KERNELS = "hydrax.ops.sparse.gpu"


def block_topk_attention(
    q: Array,
    k: Array,
    v: Array,
    idx: Int[Array, "B T G n"],
    *,
    block_size: int,
    scale: float | None = None,
    softcap: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "#B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    kv_positions: Int[Array, "#B S"] | None = None,
    impl: str | None = None,
    return_lse: bool = False,
    chunk_size: int | None = None,
) -> Any:
    """Attention of query t to the blocks idx[t] of its document; exactly zero where it sees nothing.

    Args:
      q, k, v: [B,T,H,K], [B,S,Hk,K], [B,S,Hk,V]; kv head h serves the query heads h·R .. h·R + R - 1, R = H / Hk.
      idx: numbers of blocks, by head of keys (G = Hk) or by query head (G = H); -1 is none, and one named twice counts
        once. Keys of the future stay invisible.
      segment_ids, positions, kv_segment_ids, kv_positions: as in `ops.softmax.attention`. The keys of a document stand
        one after the other (`nn.kv_cache.in_order`).
      impl: "recurrent" (the definition), "masked", "gather", "inverse", "pallas_gpu" (a Hopper GPU, see `sparse.gpu`),
        "chunked" or None to choose.
      return_lse: also return the logarithm of the denominator, fp32 [B,T,H], -inf where nothing is seen.
      chunk_size: queries per block, or per tile of "inverse"; results do not depend on it.

    Raises:
      ValueError: shapes that do not fit, an unknown `impl`, or one that cannot serve.
    """
    (B, T, H, K), (S, Hk) = q.shape, k.shape[1:3]
    if H % Hk or v.shape[:3] != k.shape[:3] or idx.shape[:2] != (B, T) or idx.shape[2] not in (H, Hk):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}, idx {idx.shape}: expected [B,T,H,K], [B,S,Hk,K|V], "
                         "[B,T,H or Hk,n]")  # fmt: skip
    own = T == S and kv_segment_ids is None and kv_positions is None
    if own and positions is None and segment_ids is not None:
        positions = documents.document_positions(segment_ids)
    queries, keys = rows_and_keys(q, k, v, segment_ids, positions, kv_segment_ids, kv_positions)
    rules = forms.Rules(K**-0.5 if scale is None else scale, softcap, None, 0, aligned=own)
    refusal = _refusal(q, k, v, block_size, rules)
    if refusal and dispatch.named("block_topk_attention", impl) == "pallas_gpu":
        raise ValueError(f"block_topk_attention: impl = 'pallas_gpu' cannot serve: {refusal}")
    default = "chunked" if refusal or not dispatch.on_one_device() else "pallas_gpu"
    form = dispatch.select("block_topk_attention", impl, FORMS, default, q.shape)
    o, lse = form(queries, keys, idx, rules, block_size, chunk_size)
    o = o.reshape(B, T, H, -1).astype(v.dtype)
    return (o, lse.reshape(B, T, H)) if return_lse else o


def _refusal(q: Array, k: Array, v: Array, block_size: int, rules: forms.Rules) -> str | None:
    """Why the kernels cannot serve, or None."""
    if not rules.aligned or q.shape[1] == 1:
        return "it serves self-attention of more than one token, without a cache"
    return "it has no softcap" if rules.softcap else dispatch.hopper_refusal(KERNELS, q, k, v, block_size)


def _recurrent(queries: forms.Queries, keys: forms.Keys, idx: Array, rules: forms.Rules, b: int, _: Any) -> tuple:
    """The definition: one query at a time, in fp32."""
    queries, keys = queries._replace(q=fp32(queries.q)), keys._replace(k=fp32(keys.k), v=fp32(keys.v))
    return _masked(queries, keys, idx, rules, b, 1)


def _masked(
    queries: forms.Queries, keys: forms.Keys, idx: Array, rules: forms.Rules, b: int, chunk_size: int | None
) -> tuple[Array, Array]:
    Hk = queries.q.shape[2]

    def block(rows: tuple, keys: forms.Keys) -> tuple[Array, Array]:
        own, idx = rows
        kept = jax.vmap(lambda named, at: named[..., at])(named(idx, -(-keys.k.shape[1] // b)), keys.positions // b)
        kept = kept.reshape(*kept.shape[:2], Hk, kept.shape[2] // Hk, -1)
        return forms.attend(own._replace(kept=kept), keys, None, rules)

    return forms.in_chunks(block, (queries, idx), keys, rules, chunk_size or 128)


def _gather(
    queries: forms.Queries, keys: forms.Keys, idx: Array, rules: forms.Rules, b: int, chunk_size: int | None
) -> tuple[Array, Array]:
    """Every query is a row of its own, with the keys of the blocks that it chose."""
    (Hk, R), G = queries.q.shape[2:4], idx.shape[2]

    def block(rows: tuple, keys: forms.Keys) -> tuple[Array, Array]:
        own, idx, first = rows
        (B, C), S, idx = idx.shape[:2], keys.k.shape[1], once(idx)
        places = (first[..., None, None] + idx * b)[..., None] + jnp.arange(b)
        real = ((idx >= 0)[..., None] & (places < S)).reshape(B, C, G, -1)
        at = (jnp.arange(B)[:, None, None, None], jnp.clip(places, 0, S - 1).reshape(B, C, G, -1))

        def near(x: Array, *head: Array) -> Array:
            return jnp.moveaxis(x[*at, *head], 2, 3).reshape(B * C, -1, G, *x.shape[3:])

        head = (jnp.arange(G) // (G // Hk))[:, None]
        ids = None if keys.segment_ids is None else near(keys.segment_ids)
        there = jnp.moveaxis(real, 2, 3).reshape(B * C, -1, G)
        positions = jnp.where(there, near(keys.positions), forms.FUTURE)
        few = forms.Keys(near(keys.k, head), near(keys.v, head), positions, ids)
        q = own.q.reshape(B * C, 1, G, Hk * R // G, -1)
        facts = jax.tree.map(lambda x: x.reshape(B * C, 1), (own.positions, own.segment_ids))
        o, lse = forms.attend(forms.Queries(q, *facts), few, None, rules)
        return o.reshape(B, C, Hk, R, -1), lse.reshape(B, C, Hk, R)

    return forms.in_chunks(block, (queries, idx, starts(queries, keys, rules)), keys, rules, chunk_size or 64)


def _inverse(
    queries: forms.Queries, keys: forms.Keys, idx: Array, rules: forms.Rules, b: int, chunk_size: int | None
) -> tuple[Array, Array]:
    """The keys of the query's own block, and tiles of the queries of every block before it."""
    (B, T, Hk, R, _), G, idx = queries.q.shape, idx.shape[2], once(idx)
    own = (queries.positions // b)[..., None, None]
    chosen = idx == own
    if rules.aligned:
        ends = keys._replace(ends=(keys.positions // b * b + b - 1)[..., None])
        o, lse = forms.chunked(queries, ends, None, dataclasses.replace(rules, window=b))
        of_head = jnp.repeat(chosen.any(-1), Hk * R // G, axis=2).reshape(B, T, Hk, R)
        lse = jnp.where(of_head, lse, -jnp.inf)
    else:
        o, lse = _gather(queries, keys, jnp.where(chosen, idx, -1), rules, b, chunk_size)
    first = starts(queries, keys, rules)[..., None, None] + idx * b
    past = (idx >= 0) & (idx < own)
    if queries.segment_ids is not None:
        past &= (queries.segment_ids != 0)[..., None, None]
    first = jnp.where(past, first, keys.k.shape[1])
    return by_tiles(queries.q, keys.k, keys.v, first, (o, lse), rules, b, chunk_size or 64)


def _chunked(
    queries: forms.Queries, keys: forms.Keys, idx: Array, rules: forms.Rules, b: int, chunk_size: int | None
) -> tuple[Array, Array]:
    """The form with the least work: tiles want many queries."""
    most = 2 * idx.shape[3] * b > keys.k.shape[1]
    form = _masked if most else _inverse if idx.shape[1] > b else _gather
    return form(queries, keys, idx, rules, b, chunk_size)


def _pallas_gpu(
    queries: forms.Queries, keys: forms.Keys, idx: Array, rules: forms.Rules, b: int, chunk_size: int | None
) -> tuple[Array, Array]:
    """The kernels, where every document of the row begins at a multiple of b; else another form."""
    from hydrax.ops.sparse import gpu

    (B, T, Hk, R, K), seg, first = queries.q.shape, queries.segment_ids, starts(queries, keys, rules)

    def kernels() -> tuple[Array, Array]:
        in_row = jnp.where(idx < 0, -1, idx + (first // b)[..., None, None])
        q = queries.q.reshape(B, T, Hk * R, K)
        o, lse = gpu.block_topk_attention(q, keys.k, keys.v, in_row, block_size=b, scale=rules.scale, segment_ids=seg)
        return fp32(o).reshape(B, T, Hk, R, -1), lse.reshape(B, T, Hk, R)

    def others() -> tuple[Array, Array]:
        return _chunked(queries, keys, idx, rules, b, chunk_size)

    if seg is None:
        return kernels()
    return jax.lax.cond(jnp.all((first % b == 0) | (seg == 0)), kernels, others)


FORMS: dict[str, Callable] = {
    "recurrent": _recurrent,
    "masked": _masked,
    "gather": _gather,
    "inverse": _inverse,
    "chunked": _chunked,
    "pallas_gpu": _pallas_gpu,
}


def once(idx: Int[Array, "B T G n"]) -> Int[Array, "B T G n"]:
    """The same without what was named before."""
    n = idx.shape[-1]
    again = (idx[..., :, None] == idx[..., None, :]) & (jnp.arange(n)[:, None] > jnp.arange(n))
    return jnp.where(again.any(-1), -1, idx)


def named(idx: Int[Array, "B T G n"], blocks: int) -> Bool[Array, "B T G N"]:
    """Which of so many blocks these are."""
    at = jnp.where(idx < 0, blocks, idx)
    marks = jnp.zeros_like(at, bool, (*at.shape[:-1], blocks + 1))
    return jnp.put_along_axis(marks, at, True, axis=-1, inplace=False, mode="drop")[..., :blocks]


def starts(queries: forms.Queries, keys: forms.Keys, rules: forms.Rules) -> Int[Array, "B T"]:
    """Where among the keys the document of each query begins."""
    if rules.aligned:
        return jnp.arange(queries.q.shape[1]) - queries.positions
    if queries.segment_ids is None or keys.segment_ids is None:
        return jnp.broadcast_to(-keys.positions[:, :1], queries.positions.shape)
    at = jnp.argmax(queries.segment_ids[..., None] == keys.segment_ids[:, None], axis=-1)
    return at - jnp.take_along_axis(keys.positions, at, axis=1)
