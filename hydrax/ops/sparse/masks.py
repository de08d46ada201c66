"""Softmax attention under a mask that is given: of tokens, or of blocks of queries by blocks of keys.

    o_t = Σ_s p_ts v_s,      p_t = softmax over the s that t sees and that the mask keeps of scale · q_t·k_s

A query sees the past of its document, whatever the mask says. A row that keeps nothing gives 0 and lse = -inf.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.core.typing import Array, ArrayLike, Bool, Float, Int
from hydrax.ops.softmax import forms

SKIP, FULL, PARTIAL = 0, 1, 2
"""What a block map says of a block: no pair is kept; all are, and lie in the past; those of the causal triangle are."""

IMPLS = ("masked", "gather")


def masked_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S Hk K"],
    v: Float[Array, "B S Hk V"],
    kept: Bool[Array, "#B #H T S"],
    *,
    positions: Int[Array, "#B T"] | None = None,
    kv_positions: Int[Array, "#B S"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    chunk_size: int = 128,
) -> Any:
    """Attention over the keys that `kept` leaves of each query's past; as `ops.softmax.attention` otherwise.

    Raises:
      ValueError: a mask that does not fit.
    """
    (B, T, H, _), S = q.shape, k.shape[1]
    if kept.ndim != 4 or kept.shape[0] not in (1, B) or kept.shape[1] not in (1, H) or kept.shape[2:] != (T, S):
        raise ValueError(f"kept {kept.shape}: expected [{B} or 1, {H} or 1, {T}, {S}]")
    queries, keys, rules = _layout(q, k, v, positions, kv_positions, None, scale, softcap)
    rows = (queries, _by_rows(kept, queries.q.shape[2:4]))

    def block(rows: tuple, keys: forms.Keys) -> tuple[Array, Array]:
        return forms.attend(rows[0]._replace(kept=rows[1]), keys, None, rules)

    return _result(forms.in_chunks(block, rows, keys, rules, chunk_size), v, H, return_lse)


def block_mask_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S Hk K"],
    v: Float[Array, "B S Hk V"],
    bm: Int[ArrayLike, "#B #H NQ NK"],
    *,
    block: tuple[int, int],
    positions: Int[Array, "#B T"] | None = None,
    kv_positions: Int[Array, "#B S"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention over the blocks of keys that `bm` names for each block of queries.

    Args:
      bm: `SKIP`, `FULL` or `PARTIAL` for every block of block[0] queries by block[1] keys of the row. A numpy array is
        checked, and lets blocks be skipped; of a traced one FULL is PARTIAL.
      positions, kv_positions: what the past is; the order of the row if None.
      segment_ids: documents, where the keys are the queries' own.
      impl: "masked" forms all scores of a block of queries; "gather" reads only the blocks of keys that are kept, for
        which `bm` must be a numpy array. None: whichever forms fewer scores.

    Raises:
      ValueError: a map that does not fit, a full block that is not all in the past, a block of queries without any of
        keys, an unknown `impl` or one that cannot serve.
    """
    (B, T, H, _), S = q.shape, k.shape[1]
    count = (-(-T // block[0]), -(-S // block[1]))
    if bm.ndim != 4 or bm.shape[0] not in (1, B) or bm.shape[1] not in (1, H) or bm.shape[2:] != count:
        raise ValueError(f"bm {bm.shape}: expected [{B} or 1, {H} or 1, {count[0]}, {count[1]}]")
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"block_mask_attention: impl = {impl!r}: expected one of {', '.join(IMPLS)}")
    known = isinstance(bm, np.ndarray)
    if impl == "gather" and not known:
        raise ValueError("block_mask_attention: impl = 'gather' cannot serve: it needs the map as a numpy array")
    aligned = positions is None and kv_positions is None and T == S
    width = _check_map(np.asarray(bm), block, aligned) if known else count[1]
    impl = impl or ("gather" if 2 * width <= count[1] else "masked")
    queries, keys, rules = _layout(q, k, v, positions, kv_positions, segment_ids, scale, softcap)
    run = _gather if impl == "gather" else _masked
    return _result(run(queries, keys, rules, jnp.asarray(bm), block, width), v, H, return_lse)


def _check_map(bm: np.ndarray, block: tuple[int, int], aligned: bool) -> int:
    """The most blocks of keys that any block of queries keeps."""
    if not np.isin(bm, (SKIP, FULL, PARTIAL)).all():
        raise ValueError(f"bm: expected {SKIP} (skip), {FULL} (full) or {PARTIAL} (partial)")
    first = np.arange(bm.shape[2])[:, None] * block[0]
    last = np.arange(1, bm.shape[3] + 1) * block[1] - 1
    if aligned and ((bm == FULL) & (last > first)).any():
        raise ValueError("bm: expected full blocks of keys only where they end before the block of queries begins")
    if ((bm == SKIP).all(-1)).any():
        raise ValueError("bm: expected at least one block of keys for every block of queries")
    return int((bm != SKIP).sum(-1).max())


def _masked(
    queries: forms.Queries, keys: forms.Keys, rules: forms.Rules, bm: Array, block: tuple[int, int], width: int
) -> tuple[Array, Array]:
    """All scores of C queries at a time; the map is spread over keys inside of the block."""
    T, G, R = queries.q.shape[1:4]
    S = keys.k.shape[1]
    by_query = jnp.repeat(bm != SKIP, block[0], axis=2)[:, :, :T]

    def one(rows: tuple, keys: forms.Keys) -> tuple[Array, Array]:
        kept = jnp.repeat(rows[1], block[1], axis=-1)[..., :S]
        return forms.attend(rows[0]._replace(kept=kept), keys, None, rules)

    return forms.in_chunks(one, (queries, _by_rows(by_query, (G, R))), keys, rules, max(block[0], 64))


def _gather(
    queries: forms.Queries, keys: forms.Keys, rules: forms.Rules, bm: Array, block: tuple[int, int], width: int
) -> tuple[Array, Array]:
    """The `width` first kept blocks of keys of every block of queries, one block of queries at a time."""
    (B, T, G, R, _), S, (C, b) = queries.q.shape, keys.k.shape[1], block
    H = G * R
    index = jnp.argsort(bm == SKIP, axis=-1, stable=True)[..., :width]
    index = jnp.where(jnp.take_along_axis(bm, index, axis=-1) == SKIP, -1, index)
    index = jnp.broadcast_to(index, (B, H, *index.shape[2:]))
    by_query = jnp.moveaxis(jnp.repeat(index, C, axis=2)[:, :, :T], 2, 1)  # [B,T,H,width]
    facts = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, x.shape[1])), (keys.positions, keys.segment_ids))
    group = (jnp.arange(H) // R)[None, :, None]
    row = jnp.arange(B)[:, None, None]

    def one(rows: tuple, keys: forms.Keys) -> tuple[Array, Array]:
        own, blocks = rows[0], rows[1][:, 0]  # [B,H,width]
        at = (jnp.maximum(blocks, 0)[..., None] * b + jnp.arange(b)).reshape(B, H, width * b)
        real = jnp.repeat(blocks >= 0, b, axis=-1) & (at < S)
        at = jnp.minimum(at, S - 1)
        positions, documents = jax.tree.map(lambda x: x[row, at], facts)
        kept = real[:, None] & (positions[:, None] <= own.positions[:, :, None, None])
        if own.segment_ids is not None:
            seg = own.segment_ids[:, :, None, None]
            kept &= (documents[:, None] == seg) & (seg != 0)
        k, v = (jnp.moveaxis(x[row, at, group], 1, 2) for x in (keys.k, keys.v))
        q = own.q.reshape(B, -1, H, 1, own.q.shape[-1])
        near = forms.Keys(k, v, jnp.zeros((1, width * b), jnp.int32))
        zeros = jnp.zeros((1, q.shape[1]), jnp.int32)
        o, lse = forms.attend(forms.Queries(q, zeros, kept=kept[:, :, :, None]), near, None, rules)
        return o.reshape(B, -1, G, R, o.shape[-1]), lse.reshape(B, -1, G, R)

    return forms.in_chunks(one, (queries, by_query), keys, rules, C)


def _layout(
    q: Array,
    k: Array,
    v: Array,
    positions: Array | None,
    kv_positions: Array | None,
    segment_ids: Array | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[forms.Queries, forms.Keys, forms.Rules]:
    """The arguments in the layout of `ops.softmax.forms`; without positions causality is that of the row."""
    B, T, H, K = q.shape
    G, S = k.shape[2], k.shape[1]
    at = jnp.broadcast_to(jnp.arange(T)[None] if positions is None else positions, (B, T))
    kv_at = jnp.arange(S)[None] if kv_positions is None else kv_positions
    queries = forms.Queries(q.reshape(B, T, G, H // G, K), at, segment_ids)
    return (
        queries,
        forms.Keys(k, v, jnp.broadcast_to(kv_at, (B, S)), segment_ids),
        forms.Rules(K**-0.5 if scale is None else scale, softcap, None, 0, False),
    )


def _by_rows(x: Array, groups: tuple[int, ...]) -> Array:
    """[B,H|1,T,S] as [B,T,G,R,S], rows first."""
    heads = (1, 1) if x.shape[1] == 1 else groups
    return jnp.moveaxis(x.reshape(x.shape[0], *heads, *x.shape[2:]), 3, 1)


def _result(parts: tuple[Array, Array], v: Array, heads: int, return_lse: bool) -> Any:
    o, lse = parts
    o = o.reshape(*o.shape[:2], heads, -1).astype(v.dtype)
    return (o, lse.reshape(*o.shape[:2], heads)) if return_lse else o
