"""Means of blocks of keys, and the choice of blocks by what they score.

Blocks count from the start of a document, which may stand anywhere in a row. Whole ones end at places `size` and more
apart: the one that ends at place u of the row has entry ⌊u / size⌋, and the entries of a document are in its order.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, Bool, Float, Int
from hydrax.ops import documents
from hydrax.ops.dispatch import KERNEL
from hydrax.ops.softmax import forms


class Blocks(NamedTuple):
    """Facts of whole blocks, by entry.

    Attributes:
      x: fp32 [B,N,...], what the block has; zeros in empty entries.
      numbers: int32 [B,N], the block's index in its document.
      segment_ids: int32 [B,N], its document; 0 marks an empty entry.
    """

    x: Float[Array, "B N *n"]
    numbers: Int[Array, "B N"]
    segment_ids: Int[Array, "B N"]


def block_sums(
    x: Float[Array, "B T *n"],
    size: int,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    before: Float[Array, "B S *n"] | None = None,
) -> Blocks:
    """The sum over every whole block, in fp32.

    Args:
      before: sums over the blocks of the document that token 0 continues, as of `add_sums`. The row then begins with
        the start of that document.
    """
    B, T = positions.shape
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    old = 0 if before is None else before.shape[1]
    N, x = old + -(-T // size), fp32(x)
    begin = jnp.zeros((B, 1), jnp.int32) if before is None else positions[:, :1]
    index = jnp.arange(T, dtype=jnp.int32)[None]
    last = index + size - 1 - positions % size
    same = jnp.take_along_axis(ids, jnp.minimum(last, T - 1), axis=1) == ids
    entry = jnp.where((last < T) & same & (ids != 0), (begin + last) // size, N)
    sums = jnp.zeros_like(x, shape=(B, N, *x.shape[2:]))
    sums = sums if before is None else sums.at[:, :old].set(before.astype(sums.dtype))
    ends = jnp.where((positions % size == size - 1) & (ids != 0), (begin + index) // size, N)
    whole = jnp.arange(N)[None] < begin // size  # blocks of earlier calls
    sums = jax.vmap(lambda s, at, x: s.at[at].add(x, mode="drop"))(sums, entry, x)
    put = jax.vmap(lambda n, at, x: n.at[at].set(x.astype(n.dtype), mode="drop"))
    numbers = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32), (B, N))
    numbers, of = put(numbers, ends, positions // size), put(jnp.where(whole, ids[:, :1], 0), ends, ids)
    there = (of != 0).reshape(B, N, *[1] * (x.ndim - 2))
    return Blocks(jnp.where(there, sums, 0), numbers, of)


def add_sums(
    before: Float[Array, "B S *n"],
    x: Float[Array, "B T *n"],
    size: int,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B S *n"]:
    """Sums over the blocks of the last real document of each row, by number, after these tokens: also of an open one.

    `before` belongs to the document of token 0; zeros are the start of one.
    """
    ids = jnp.ones(positions.shape, jnp.int32) if segment_ids is None else segment_ids
    filled, valid = documents.fill_padding(ids)
    own = valid & (filled == filled[:, -1:])
    continues = (filled[:, 0] == filled[:, -1]).reshape(-1, *[1] * (x.ndim - 1))
    at = jnp.where(own, positions // size, before.shape[1])
    add = jax.vmap(lambda s, at, x: s.at[at].add(x.astype(s.dtype), mode="drop"))
    return add(jnp.where(continues, before, 0), at, x)


def pooled_keys(blocks: Blocks, stride: int, length: int | None = None) -> Blocks:
    """Means over `length` tokens that begin every `stride` tokens of a document, of its sums over blocks of `stride`.

    Window c of a document ends with its block c + length / stride - 1, and has the entry of that.

    Raises:
      ValueError: a length that is no multiple of the stride.
    """
    wide, left = divmod(stride if length is None else length, stride)
    if left or not wide:
        raise ValueError(f"length = {length}: expected a multiple of stride = {stride}")
    x, numbers, ids = blocks
    total = sum((jnp.pad(x, [(0, 0), (i, 0)] + [(0, 0)] * (x.ndim - 2))[:, : x.shape[1]] for i in range(wide)), 0 * x)
    ids = jnp.where(numbers >= wide - 1, ids, 0)
    there = (ids != 0).reshape(*ids.shape, *[1] * (x.ndim - 2))
    return Blocks(jnp.where(there, total / (wide * stride), 0), numbers - (wide - 1), ids)


def causal_block_topk(
    score: Float[Array, "B T G N"],
    count: int,
    *,
    own: Int[Array, "B T"],
    numbers: Int[Array, "B N"],
    seen: Bool[Array, "B T N"],
    forced: Bool[Array, "B #T N"] | None = None,
) -> Int[Array, "B T G n"]:
    """Numbers of `count` blocks for each query: its own, then the best others before it; -1 where there are none left.

    Args:
      score: of the blocks by entry; equal ones go to the lower entry. It gets no gradient.
      own, numbers: of the query's block, and of the block of each entry.
      seen: blocks of the query's document and past.
      forced: of these, the ones that come before all others.
    """
    score = jax.lax.stop_gradient(fp32(score))
    score = jnp.where(score == 0, 0, score)  # -0 would lose ties
    if forced is not None:
        score = jnp.where(forced[:, :, None], jnp.inf, score)
    score = jnp.where(seen[:, :, None], score, -jnp.inf)
    best, entry = jax.lax.top_k(score, min(count - 1, score.shape[-1]))
    chosen = jax.vmap(lambda n, at: n[at])(numbers, entry)
    chosen = jnp.where(best == -jnp.inf, -1, chosen)
    first = jnp.broadcast_to(own[..., None, None], (*chosen.shape[:3], 1))
    return jnp.concatenate([first, chosen], axis=-1).astype(jnp.int32)


def choose_blocks(
    queries: forms.Queries, means: Blocks, size: int, count: int, *, apart: bool, chunk_size: int = 512
) -> Int[Array, "B T G n"]:
    """`causal_block_topk` by q·k̄ in fp32, of every query head (`apart`), or of each head of keys by the mean of these.

    Args:
      means: k̄ [B,N,Hk,K] of blocks of `size` tokens.
    """
    queries, (x, numbers, ids) = jax.lax.stop_gradient((queries, means))
    bare = forms.Keys(x, x[..., :0], numbers, ids)

    def block(rows: tuple, keys: forms.Keys) -> tuple[Array]:
        (own,), number = rows, rows[0].positions // size
        score = einsum("btgrk,bngk->btgrn", fp32(own.q), keys.k)
        score = score.reshape(*score.shape[:2], -1, score.shape[-1]) if apart else score.mean(3)
        seen = seen_blocks(means, number, own.segment_ids)
        return (causal_block_topk(score, count, own=number, numbers=numbers, seen=seen),)

    rules = forms.Rules(1.0, None, None, 0, aligned=False)
    (chosen,) = forms.in_chunks(block, (queries,), bare, rules, chunk_size)
    return checkpoint_name(chosen, KERNEL)  # the backward pass must not choose again from scores it rounds otherwise


def seen_blocks(blocks: Blocks, own: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None) -> Bool[Array, "B T N"]:
    """Which blocks are of the query's document and before its own."""
    ids = jnp.ones_like(own) if segment_ids is None else segment_ids
    same = (blocks.segment_ids[:, None] == ids[..., None]) & (ids != 0)[..., None]
    return same & (blocks.numbers[:, None] < own[..., None])
