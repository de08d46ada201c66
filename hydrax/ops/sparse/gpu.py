"""Attention to chosen blocks of keys on Hopper GPUs: the kernels of `ops.softmax`, given the union of what rows chose.

A thread block is for 128 query rows, the R query heads of 128 / R tokens; it loads the blocks that any of these tokens
chose, and hides from each row those it did not choose by a bit per row and block.

Work, in products of 128 rows and a key: U per tile, where the union has U >= S·b keys of a token's own. Tokens in a row
choose much the same (that is what makes caches of blocks work), and the bound is U <= 128 / R · S·b: with 16 heads in a
group a tile is 8 tokens. The alternative gathers, for each block of keys, the queries that chose it: exactly S·b, but
each query and its partial output in fp32 pass through memory S times, forward and backward: with S = 16, K = 128 and
65536 tokens of 16 heads 13 GB or 4 ms forward at the speed of the memory, as much as 800 TFLOP/s do with U = 6·S·b for
b = 64. It would win only where neighbours disagree and groups are small; wgmma wants its rows in shared memory, and no
copy on Hopper gathers them.
"""

import functools

import jax.numpy as jnp

from hydrax.core.typing import Array, Float, Int
from hydrax.ops import documents
from hydrax.ops.softmax import gpu, live
from hydrax.ops.softmax.gpu import refusal as of_tensors


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
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """o and lse over the visible keys s <= t, of the query's document, in the blocks `idx`.

    They are chosen by the head of keys (G = Hk) or by the query head (G = H). Blocks count from the row's start, -1
    is none, and one named twice counts once. A query that sees nothing has o = 0 and lse = -inf; so has padding (id 0).
    """
    (B, T, H, K), G = q.shape, idx.shape[2]
    R = H // G
    k, v = (jnp.repeat(x, G // x.shape[2], axis=2) for x in (k, v))
    seg = segment_ids
    index = jnp.arange(T, dtype=jnp.int32)[None]
    first = jnp.zeros((B, T), jnp.int32) if seg is None else index - documents.document_positions(seg)
    idx = idx if seg is None else jnp.where((seg != 0)[..., None, None], idx, -1)
    rows = jnp.swapaxes(q.reshape(B, T, G, R, K), 2, 3).reshape(B, T * R, G, K)
    run = functools.partial(
        gpu.attend,
        chosen=live.words(idx, -(-T // block_size)),
        choice=live.Choice(block_size, R),
    )
    o, lse = run(rows, k, v, first, K**-0.5 if scale is None else scale)
    o = jnp.swapaxes(o.reshape(B, T, R, G, -1), 2, 3).reshape(B, T, H, -1)
    return o, jnp.swapaxes(lse.reshape(B, T, R, G), 2, 3).reshape(B, T, H)
