"""What the kernels of matrix states share before and after they run: whole chunks, what decays and documents mean in
each of them, values no wider than a thread block, segments of long rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, PyTree
from hydrax.ops import documents
from hydrax.ops.pallas import tiles
from hydrax.ops.pallas.tiles import BLOCK, per_column, per_row
from hydrax.ops.pallas.tuning import Tuning

SUM, READS, WRITES, KEEP, READER, WRITER = range(6)
"""Rows of the facts of a chunk [6,C]: G, r, w, λ, and the document from which a token reads, to which it writes."""

WIDTHS, WIDEST = (64, 128), 128
"""Columns of q, k and v that one thread block can hold; wider values are values of more heads."""


def pad_tokens(x: Array | None) -> Array | None:
    """x [B,T,...] with zeros up to whole chunks; without effect where keys, values and log-decays are zero."""
    if x is None or x.ndim == 1 or not x.shape[1] % BLOCK:
        return x
    return jnp.pad(x, [(0, -x.shape[1] % BLOCK) if axis == 1 else (0, 0) for axis in range(x.ndim)])


def by_chunk(x: Array) -> Array:
    """[B,T,H] -> [B,N,H,C]."""
    B, T, H = x.shape
    return x.reshape(B, T // BLOCK, BLOCK, H).swapaxes(2, 3)


def by_token(x: Array) -> Array:
    """The inverse of `by_chunk`."""
    B, N, H, C = x.shape
    return x.swapaxes(2, 3).reshape(B, N * C, H)


def parts_of(v: Array) -> int:
    """Into how many heads of `WIDEST` columns a value head is cut."""
    return max(1, v.shape[-1] // WIDEST)


def by_whole_chunks(
    run: Callable, q: Array, k: Array, v: Array, *others: Array | None, S: Array | None
) -> tuple[Array, Array]:
    """o and the final state by `run` of whole chunks, with values no wider than a thread block holds.

    The others [B,T,...] or [Hv] have a value for each part of a value head.
    """
    (B, T, Hv, _), parts = v.shape, parts_of(v)
    x = (pad_tokens(x) for x in (q, k, v.reshape(B, T, Hv * parts, -1), *others))
    o, S = run(*x, apart(S, parts))
    return o[:, :T].reshape(v.shape), together(S, parts)


def apart(S: Array | None, parts: int) -> Array | None:
    """[B,H,K,V] as fp32 [B,H·parts,K,V/parts]."""
    if S is None:
        return None
    B, H, K, V = S.shape
    return fp32(S).reshape(B, H, K, parts, -1).swapaxes(2, 3).reshape(B, H * parts, K, V // parts)


def together(S: Array, parts: int) -> Array:
    """The inverse of `apart`."""
    B, H, K, V = S.shape
    return S.reshape(B, -1, parts, K, V).swapaxes(2, 3).reshape(B, H // parts, K, V * parts)


def flip(S: Array | None) -> Array | None:
    """Sᵀ."""
    return None if S is None else jnp.swapaxes(S, -1, -2)


def ungroup(dx: Array, x: Array) -> Array:
    """Gradients by value head [B,T,Hv,K], summed over the heads that share a query or key."""
    if dx.shape == x.shape:
        return dx.astype(x.dtype)
    return fp32(dx).reshape(*x.shape[:3], -1, x.shape[3]).sum(3).astype(x.dtype)


def chunk_facts(g: Array, seg: Array | None, scale: float) -> Array:
    """[B,N,Hv,4 or 6,C] fp32, see `SUM`; [1,1,Hv,4,C] if g [Hv] is constant and all chunks are alike."""
    if seg is None and g.ndim == 1:
        g = jnp.broadcast_to(g[None, None, :, None], (1, 1, *g.shape, BLOCK))
    else:
        B, T = g.shape[:2] if seg is None else seg.shape
        g = jnp.broadcast_to(g, (B, T, g.shape[-1])).reshape(B, T // BLOCK, BLOCK, -1).swapaxes(2, 3)
    if seg is None:
        return jnp.stack(_gates(g, scale), -2)
    seg, valid = documents.fill_padding(seg)
    document = jnp.cumsum(documents.changes(seg), 1)
    chunks, valid = (x.reshape(B, -1, 1, BLOCK) for x in (document, valid))
    last = chunks[..., -1:]
    before = jnp.concatenate([chunks[:, :1, :, :1], last[:, :-1]], 1)
    G, reads, writes, keep = _gates(jnp.where(valid, g, 0), scale)
    rows = (
        G,
        jnp.where((chunks == before) & valid, reads, 0),
        jnp.where((chunks == last) & valid, writes, 0),
        jnp.where(last == before, keep, 0),
        *(jnp.broadcast_to(jnp.where(valid, chunks, none), g.shape).astype(g.dtype) for none in (-1, -2)),
    )
    return jnp.stack(rows, -2)


def _gates(g: Array, scale: float) -> tuple[Array, ...]:
    G = jnp.cumsum(g, -1)
    total = G[..., -1:]
    return G, scale * jnp.exp(G), jnp.exp(total - G), jnp.broadcast_to(jnp.exp(total), G.shape)


def decay(facts: PyTree, *, packed: bool, transposed: bool = False, strict: bool = False) -> Array:
    """Inside a kernel: Γ, Γᵀ, or Γ without its diagonal, by the facts of a chunk; with documents if `packed`."""
    exponent = per_row(facts.at[SUM]) - per_column(facts.at[SUM])
    row, column = tiles.index(0), tiles.index(1)
    allowed = row <= column if transposed else row > column if strict else row >= column
    if packed:
        own, other = (WRITER, READER) if transposed else (READER, WRITER)
        allowed &= per_row(facts.at[own]) == per_column(facts.at[other])
    return jnp.exp(jnp.where(allowed, -exponent if transposed else exponent, -1e4))


def decay_gradient(moments: Array, anchors: Array, seg: Array | None) -> Array:
    """dg [B,T,Hv] from `moments` q·dq - k·dk [B,Hv,T] and `anchors` [B,Hv,T], of which every chunk sums to <S, dS>."""
    B, Hv, T = moments.shape
    moments, anchors = (x.reshape(B, Hv, -1, BLOCK) for x in (moments, anchors))
    before = jnp.cumsum(moments, -1) - moments
    anchor = anchors.sum(-1, keepdims=True)
    if seg is None:
        return (anchor - before).reshape(B, Hv, T).swapaxes(1, 2)
    seg, valid = documents.fill_padding(seg)
    inside = jnp.arange(BLOCK)
    changes, valid = (x.reshape(B, 1, -1, BLOCK) for x in (documents.changes(seg), valid))
    first = jax.lax.cummax(jnp.where(changes, inside, -1), axis=3)  # where the document begins; -1: before the chunk
    skipped = jnp.take_along_axis(before, jnp.broadcast_to(jnp.maximum(first, 0), before.shape), axis=3)
    dg = jnp.where(first < 0, anchor, 0) + skipped - before
    return jnp.where(valid, dg, 0).reshape(B, Hv, T).swapaxes(1, 2)


def segments(v: Array, tuning: Tuning) -> int:
    """Into how many parts, of 8 chunks at least, each row is cut so that few rows fill the device."""
    B, T, H, _ = v.shape
    n = 1
    while B * H * n * 2 <= tuning.blocks and T % (BLOCK * 8 * n * 2) == 0:
        n *= 2
    return n


def between_segments(updates: Array, keeps: Array, Z: Array | None, *, reverse: bool = False) -> tuple[Array, Array]:
    """Z ← keep · Z + update over the segments of every row: Z before each [B·n,Hv,K,V], and the last one.

    Args:
      updates: [B·n,Hv,K,V], what each segment adds.
      keeps: what each chunk keeps [B,N,Hv,K or 1].
      Z: before the first; zeros if None.
    """
    B = keeps.shape[0]
    updates = updates.reshape(B, -1, *updates.shape[1:])
    n = updates.shape[1]
    keep = keeps.reshape(B, n, -1, *keeps.shape[2:]).prod(2)[..., None]
    states = [jnp.zeros_like(updates[:, 0]) if Z is None else Z]
    for i in reversed(range(n)) if reverse else range(n):
        states.append(keep[:, i] * states[-1] + updates[:, i])
    before = states[-2::-1] if reverse else states[:-1]
    return jnp.stack(before, 1).reshape(-1, *updates.shape[2:]), states[-1]
