"""Attention to chosen blocks and to spans of keys on Hopper GPUs, by the kernels of `ops.softmax`.

For blocks a thread block is for 128 query rows, in one of two orders:

    by tokens  the R query heads of 128 / R tokens; it loads the blocks that any of these tokens chose, and hides from
               each row those it did not choose by a bit per row and block. Work per tile: the union, from n blocks if
               all tokens agree to 128 / R · n.
    by blocks  the R query heads of pairs of a token and a block, sorted by block: n blocks per token, whatever others
               chose. Each query and its partial output pass through memory n times, forward and backward.

With 16 heads in a group a tile is 8 tokens, which choose much the same, and 65536 tokens of 16 heads with n = 16 and
K = 128 would pass 13 GB: by tokens. With a choice by query head a tile is 128 tokens that may choose everything.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from hydrax.core.typing import Array, Float, Int
from hydrax.ops import documents
from hydrax.ops.softmax import gpu, live, merge
from hydrax.ops.softmax.gpu import refusal as of_tensors
from hydrax.ops.sparse.blocks import once


def refusal(q: Array, k: Array, v: Array, block_size: int) -> str | None:
    """Why these kernels cannot serve, or None."""
    if block_size != gpu.BLOCK and block_size % gpu.ROWS:
        return f"blocks of {block_size}: expected {gpu.BLOCK} or a multiple of {gpu.ROWS}"
    if k.shape[1] != q.shape[1]:
        return "it serves self-attention only, without a cache"
    return of_tensors(q, k, v)


def block_topk_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hk V"],
    idx: Int[Array, "B T G S"],
    *,
    block_size: int,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    order: Literal["tokens", "blocks"] | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """o and lse over the visible keys s <= t, of the query's document, in the blocks `idx`.

    They are chosen by the head of keys (G = Hk) or by the query head (G = H). Blocks count from the row's start, -1
    is none, and one named twice counts once. A query that sees nothing has o = 0 and lse = -inf; so has padding (id 0).
    `order` is that of the rows, None to choose.
    """
    (B, T, H, K), G = q.shape, idx.shape[2]
    R = H // G
    k, v = (jnp.repeat(x, G // x.shape[2], axis=2) for x in (k, v))
    seg = segment_ids
    index = jnp.arange(T, dtype=jnp.int32)[None]
    first = jnp.zeros((B, T), jnp.int32) if seg is None else index - documents.document_positions(seg)
    idx = idx if seg is None else jnp.where((seg != 0)[..., None, None], idx, -1)
    scale = K**-0.5 if scale is None else scale
    order = order or ("blocks" if 2 * idx.shape[3] * R < gpu.ROWS else "tokens")
    o, lse = ORDERS[order](q.reshape(B, T, G, R, K), k, v, idx, first, block_size, scale)
    return o.reshape(B, T, H, -1), lse.reshape(B, T, H)


def _by_tokens(q: Array, k: Array, v: Array, idx: Array, first: Array, size: int, scale: float) -> tuple[Array, Array]:
    """o [B,T,G,R,V] and lse [B,T,G,R]."""
    R = q.shape[3]
    chosen = live.words(idx, -(-k.shape[1] // size))
    o, lse = gpu.attend(_rows(q), k, v, first, scale, chosen=chosen, choice=live.Choice(size, R))
    return _of_tokens(o, R), _of_tokens(lse, R)


def _by_blocks(q: Array, k: Array, v: Array, idx: Array, first: Array, size: int, scale: float) -> tuple[Array, Array]:
    """The same: the own blocks, then all pairs of a token and an earlier block, whose keys are all of its past."""
    (B, T, G, R, _), n, index = q.shape, idx.shape[3], jnp.arange(idx.shape[1])
    idx, own = once(idx), (index // size)[:, None, None]
    o, lse = gpu.attend(q.reshape(B, T, G * R, -1), k, v, jnp.maximum(first, index // size * size), scale)
    near = o, jnp.where(jnp.repeat((idx == own).any(-1), R, axis=2), lse, -jnp.inf)
    blocks = -(-T // size)
    block = jnp.where((idx >= 0) & (idx < own), idx, blocks)
    block = jnp.moveaxis(block, 1, 2).reshape(B, G, T * n)
    pair = jax.lax.broadcasted_iota(jnp.int32, block.shape, 2)
    block, places = jax.lax.sort((block, pair), num_keys=1)
    back = jnp.put_along_axis(pair, places, pair, axis=-1, inplace=False)
    begin, end = block * size, block * size + size  # neither ever decreases, nor what documents leave of them
    of_document = jnp.take_along_axis(jnp.broadcast_to(first[:, None], (B, G, T)), places // n, axis=2)
    begin = jnp.where(block < blocks, jnp.clip(of_document, begin, end), T)
    begin, end = (jnp.repeat(x, R, axis=-1) for x in (begin, jnp.minimum(end, T)))
    rows = gpu.moved(places, back, jnp.repeat(q.reshape(B, T, G, -1), n, axis=1))
    found = gpu.attend(_rows(rows.reshape(B, T * n, G, R, -1)), k, v, begin, scale, last=end - 1)
    o, lse = (gpu.moved(back, places, _of_tokens(x, R)) for x in found)
    o, lse = o.reshape(B, T, n, G * R, -1), lse.reshape(B, T, n, G * R)
    o, lse = merge(near, *((o[:, :, i], lse[:, :, i]) for i in range(n)))
    return o.reshape(B, T, G, R, -1), lse.reshape(B, T, G, R)


ORDERS = {"tokens": _by_tokens, "blocks": _by_blocks}


def _rows(q: Float[Array, "B T G R K"]) -> Float[Array, "B Q G K"]:
    """The R heads of a group as rows, those of a token one after the other."""
    B, T, G, R, K = q.shape
    return jnp.swapaxes(q, 2, 3).reshape(B, T * R, G, K)


def _of_tokens(x: Float[Array, "B Q G *V"], R: int) -> Float[Array, "B T G R *V"]:
    """Back from `_rows`."""
    return jnp.swapaxes(x.reshape(x.shape[0], -1, R, *x.shape[2:]), 2, 3)


def span_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B N G K"],
    v: Float[Array, "B N G V"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    length: int,
    stride: int,
    scale: float,
) -> Float[Array, "B T H V"]:
    """o over the spans of a token's document that end at or before it, zero if there are none.

    Span c is the `length` tokens from c · stride on; its entry is that of its last stride (`compress.spans`). The
    tokens are all those of the rows.
    """
    start = jnp.arange(q.shape[1], dtype=jnp.int32) - positions
    first = (start + length - 1) // stride
    last = first + jnp.maximum((positions + 1 - length) // stride, -1)
    o, _ = gpu.attend(q, k, v, first[:, None], scale, last=last[:, None])
    return jnp.where((segment_ids != 0)[..., None, None], o, 0)
