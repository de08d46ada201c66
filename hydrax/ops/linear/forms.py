"""The forms of `linear_attention`, in the layout of `ops.layout`."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.core.numerics import clamp_decay, einsum, fp32
from hydrax.core.typing import Array
from hydrax.ops import documents, layout
from hydrax.ops.layout import scan_tokens
from hydrax.ops.spans import join_chunks, over_spans, split_chunks

Sums = tuple[Array, Array]
"""In-chunk cumulative log-decay [B,N,C,...] in two terms, see `decay_sums`."""
SUB_BLOCK = 16
"""Rows whose vector-decayed scores are formed directly; larger blocks go through a matmul."""


def step(q: Array, k: Array, v: Array, g: Array, S: Array) -> tuple[Array, Array]:
    """One token: q, k [B,H,K], v [B,H,R,V], g [B,H,R|1,K|1]; returns o [B,H,R,V] and the new S."""
    S = jnp.exp(g)[..., None] * S + k[:, :, None, :, None] * v[:, :, :, None, :]
    return einsum("bhk,bhrkv->bhrv", q, S), S


def recurrent(q: Array, k: Array, v: Array, g: Array, seg: Array | None, S: Array) -> tuple[Array, Array]:
    """The definition: `step` over the tokens, in fp32, restarting where the document changes."""
    return scan_tokens(step, (q, k, v, g), seg, S)


def chunked(
    q: Array, k: Array, v: Array, g: Array, seg: Array | None, S: Array, *, chunk_size: int = 64
) -> tuple[Array, Array]:
    """Attention inside chunks of C tokens, a recurrence over the chunk states (arXiv 2312.06635 §4)."""
    T = q.shape[1]
    C = min(chunk_size, -(-T // SUB_BLOCK) * SUB_BLOCK)
    x = tuple(split_chunks(a, C) for a in (q, k, v, clamp_decay(g)))
    o, S = over_spans(_forward, _backward, x, layout.in_chunks(seg, q, C), S)
    return join_chunks(o, T), S


def _forward(x: tuple, ids: tuple, S: Array) -> tuple[Array, Array, tuple]:
    """A span of chunks: outputs, and the state after it."""
    q, k, v, g = x
    same, enters, leaves, keep = documents.chunk_masks(*ids)
    scores, q_in, k_out, o_in, v_out = decayed(q, k, g, same)
    A = jnp.broadcast_to(layout.causal(scores, same), _wide(scores, v))
    updates = einsum("bnchk,bnchrv->bnhrkv", k_out.astype(v.dtype), (_each(leaves) * v_out * v).astype(v.dtype))
    found, S = layout.carry(updates, keep[..., None, None, None] * jnp.exp(g.sum(2)), S)
    o = einsum("bnhrij,bnjhrv->bnihrv", A.astype(v.dtype), v)
    o += _each(enters) * o_in * einsum("bnchk,bnhrkv->bnchrv", q_in.astype(v.dtype), found.astype(v.dtype))
    return o, S, ()


def _backward(x: tuple, ids: tuple, S: Array, saved: tuple, do: Array, dS: Array) -> tuple[tuple, Array]:
    """The vector-Jacobian product of `_forward`; the states are computed again, their cotangents run backwards."""
    q, k, v, g = x
    same, enters, leaves, keep = documents.chunk_masks(*ids)
    pieces, pullback = jax.vjp(functools.partial(decayed, same=same), q, k, g)
    scores, q_in, k_out, o_in, v_out = pieces
    A = jnp.broadcast_to(layout.causal(scores, same), _wide(scores, v)).astype(v.dtype)
    reads, writes = (_each(enters) * o_in * do).astype(v.dtype), (_each(leaves) * v_out * v).astype(v.dtype)
    decays = keep[..., None, None, None] * jnp.exp(g.sum(2))
    q_low, k_low, do_low = q_in.astype(v.dtype), k_out.astype(v.dtype), do.astype(v.dtype)

    found, _ = layout.carry(einsum("bnchk,bnchrv->bnhrkv", k_low, writes), decays, S)
    dafter, dS = layout.carry(einsum("bnchk,bnchrv->bnhrkv", q_low, reads), decays, dS, reverse=True)
    ddecays = (found * dafter).sum(-1) * decays
    found, dafter = found.astype(v.dtype), dafter.astype(v.dtype)
    dwrites = einsum("bnchk,bnhrkv->bnchrv", k_low, dafter)
    dv = einsum("bnhrij,bnihrv->bnjhrv", A, do_low) + _each(leaves) * v_out * dwrites
    dpieces = (
        layout.causal(einsum("bnihrv,bnjhrv->bnhrij", do_low, v), same),
        einsum("bnchrv,bnhrkv->bnchk", reads, found),
        einsum("bnchrv,bnhrkv->bnchk", writes, dafter),
        _each(enters) * do * einsum("bnchk,bnhrkv->bnchrv", q_low, found),
        _each(leaves) * v * dwrites,
    )
    dq, dk, dg = layout.pull(pullback, dpieces, pieces)
    return (dq, dk, dv.astype(v.dtype), dg + layout.summed(ddecays, g[:, :, 0])[:, :, None]), dS


def _each(mask: Array) -> Array:
    """[B,N,C] -> [B,N,C,1,1,1], beside heads and values."""
    return mask[..., None, None, None]


def decay_sums(g: Array, same: Array) -> Sums:
    """Inclusive sums of the log-decay [B,N,C,...] over each chunk as two terms, G = coarse + fine.

    What is used is the difference of two sums, which may be small although both are in the thousands: one fp32 sum
    would keep four digits of it. The coarse parts are multiples of 2^-8, whose sums and differences are exact. The fine
    ones are rounded: they start again at every document (`same` [B,N,C,C]), so that none feels the one before it.
    """
    coarse = jax.lax.stop_gradient(jnp.round(g * 256) / 256)
    own = (same & jnp.tril(jnp.ones(same.shape[-2:], bool))).astype(g.dtype)
    return jnp.cumsum(coarse, axis=2), einsum("bnij,bnj...->bni...", own, g - coarse)


def between(G: Sequence[Array], i: tuple, j: tuple) -> Array:
    """G[i] - G[j], the log-decay from token j to token i."""
    coarse, fine = G
    return (coarse[i] - coarse[j]) + (fine[i] - fine[j])


def past_decay(exponent: Array) -> Array:
    """exp of [..., i, j] where j < i, else 1. Future exponents are positive: masked by index before exp, since an
    inf would meet a zero gradient, and clamping them instead would halve the gradient wherever g = 0."""
    return jnp.exp(jnp.where(jnp.tril(jnp.ones(exponent.shape[-2:], bool), -1), exponent, 0))


def to_end(g: Array) -> Array:
    """Decay from each token to the end of its chunk, as a sum of its own: in G_C - G_j the gradients of the last tokens
    would cancel, and leave their rounding to the gradients of all gates."""
    later = jnp.pad(g[:, :, 1:], [(0, 1) if axis == 2 else (0, 0) for axis in range(g.ndim)])
    return jnp.exp(jax.lax.cumsum(later, axis=2, reverse=True))


def decayed(q: Array, k: Array, g: Array, same: Array) -> tuple:
    """Everything the decay of a chunk touches: scores [B,N,H,R|1,C,C] of q_i and k_j, valid for j <= i; then q and k,
    and factors for what is read from the incoming and written to the outgoing state."""
    return (_scalar_decay if g.shape[-1] == 1 else _vector_decay)(q, k, g, same)


def _scalar_decay(q: Array, k: Array, g: Array, same: Array) -> tuple:
    """Scores q_i·k_j e^{G_i - G_j}; the decay to and from the state sits on values and outputs, once per value head."""
    G = decay_sums(g, same)
    rows = tuple(jnp.moveaxis(x[..., 0], 2, -1) for x in G)  # [B,N,H,R,C]
    E = past_decay(between(rows, np.s_[..., :, None], np.s_[..., None, :]))
    return einsum("bnihk,bnjhk->bnhij", q, k)[:, :, :, None] * E, q, k, jnp.exp(sum(G)), to_end(g)


def _vector_decay(q: Array, k: Array, g: Array, same: Array) -> tuple:
    """Scores Σ_d q_id k_jd e^{G_id - G_jd}; the decay to and from the state sits on queries and keys."""
    g = g[..., 0, :]
    G = decay_sums(g, same)
    one = jnp.ones_like(g, shape=(1,))
    return decayed_scores(q, k, G)[:, :, :, None], q * jnp.exp(sum(G)), k * to_end(g), one, one


def decayed_scores(q: Array, k: Array, G: Sums) -> Array:
    """A[b,n,h,i,j] = Σ_d q_id k_jd exp(G_id - G_jd) for j <= i (other entries are arbitrary but finite).

    Factoring e^{G_i - G_j} over a whole chunk overflows. Here every exponent is <= 0: row block a refers to its own
    first row s_a, with j < s_a for the matmul part, and the diagonal blocks are summed directly. The reference
    depends on no later token, so the past stays bit-equal when the future changes.
    """
    own = _direct_scores(q, k, G)
    blocks = []
    for a, s in enumerate(range(0, q.shape[2], SUB_BLOCK)):
        first, rows, before = (np.s_[:, :, x:y] for x, y in ((s, s + 1), (s, s + SUB_BLOCK), (0, s)))
        past = einsum(
            "bnihd,bnjhd->bnhij",
            (q[rows] * jnp.exp(between(G, rows, first))).astype(k.dtype),
            (k[before] * jnp.exp(between(G, first, before))).astype(k.dtype),
        )
        row = jnp.concatenate([past, own[a]], axis=-1)
        blocks.append(jnp.pad(row, ((0, 0),) * 4 + ((0, q.shape[2] - row.shape[-1]),)))
    return jnp.concatenate(blocks, axis=-2)


def _direct_scores(q: Array, k: Array, G: Sums) -> Array:
    """The diagonal blocks [C/16,B,N,H,16,16], one after the other: their products [K,16,16] are the largest arrays."""

    @jax.checkpoint  # and are not kept for the backward pass
    def block(x: tuple) -> Array:
        q, k, *sums = (jnp.moveaxis(fp32(a), 2, -1) for a in x)  # [B,N,H,K,16]
        E = past_decay(between(sums, np.s_[..., :, None], np.s_[..., None, :]))
        return (q[..., :, None] * k[..., None, :] * E).sum(3)

    def cut(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, SUB_BLOCK, *x.shape[3:]), 2, 0)

    return jax.lax.map(block, jax.tree.map(cut, (q, k, *G)))


def _wide(scores: Array, v: Array) -> tuple:
    return (*scores.shape[:3], v.shape[4], *scores.shape[4:])
