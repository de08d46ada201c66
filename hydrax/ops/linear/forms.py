"""The forms of `linear_attention`, in one layout: q, k [B,T,H,K]; v [B,T,H,R,V]; g [B,T,H,R|1,K|1]; S [B,H,R,K,V].

A decay over K has no R axis and a decay over R no K axis, so one broadcast serves both.
"""

import jax
import jax.numpy as jnp

from hydrax.core.numerics import clamp_decay, einsum, fp32
from hydrax.core.typing import Array
from hydrax.ops import documents
from hydrax.ops.layout import scan_tokens, split_chunks

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
    B, T = q.shape[:2]
    seg = jnp.zeros((B, T), jnp.int32) if seg is None else seg
    C = min(chunk_size, -(-T // SUB_BLOCK) * SUB_BLOCK)
    q, k, v, g, seg = (split_chunks(x, C) for x in (q, k, v, g, seg))
    same, enters, leaves, keep = documents.chunk_masks(seg)
    G = jnp.cumsum(clamp_decay(g), axis=2)  # [B,N,C,H,R|1,K|1], inclusive
    if g.shape[-1] == 1:
        scores, q_in, k_out, o_in, v_out = scalar_decay(q, k, G)
    else:
        scores, q_in, k_out, o_in, v_out = vector_decay(q, k, G)

    scores = jnp.where((same & jnp.tril(jnp.ones((C, C), bool)))[:, :, None, None], scores, 0)
    intra = einsum("bnhrij,bnjhrv->bnihrv", jnp.broadcast_to(scores, _wide(scores, v)).astype(v.dtype), v)
    writes = leaves[..., None, None, None] * v_out * v
    updates = einsum("bnchk,bnchrv->bnhrkv", k_out.astype(v.dtype), writes.astype(v.dtype))
    decays = keep[..., None, None, None] * jnp.exp(G[:, :, -1])

    def chunk(S: Array, x: tuple) -> tuple[Array, Array]:
        update, decay = x
        return decay[..., None] * S + update, S

    S, incoming = jax.lax.scan(chunk, S, (jnp.moveaxis(updates, 1, 0), jnp.moveaxis(decays, 1, 0)))
    inter = einsum("bnchk,nbhrkv->bnchrv", q_in.astype(v.dtype), incoming.astype(v.dtype))
    o = intra + enters[..., None, None, None] * o_in * inter
    return o.reshape(B, -1, *o.shape[3:])[:, :T], S


def scalar_decay(q: Array, k: Array, G: Array) -> tuple:
    """Scores q_i·k_j e^{G_i - G_j}; the decay to and from the state sits on values and outputs, once per value head."""
    rows = jnp.moveaxis(G[..., 0], 2, -1)  # [B,N,H,R,C]
    scores = einsum("bnihk,bnjhk->bnhij", q, k)[:, :, :, None] * past_decay(rows[..., :, None] - rows[..., None, :])
    return scores, q, k, jnp.exp(G), jnp.exp(G[:, :, -1:] - G)


def past_decay(exponent: Array) -> Array:
    """exp of [..., i, j] where j <= i, else 1. Future exponents are positive: masked by index before exp, since an
    inf would meet a zero gradient, and clamping them instead would halve the gradient wherever g = 0."""
    return jnp.exp(jnp.where(jnp.tril(jnp.ones(exponent.shape[-2:], bool)), exponent, 0))


def vector_decay(q: Array, k: Array, G: Array) -> tuple:
    """Scores Σ_d q_id k_jd e^{G_id - G_jd}; the decay to and from the state sits on queries and keys."""
    G = G[..., 0, :]
    one = jnp.ones((1,), G.dtype)
    return decayed_scores(q, k, G)[:, :, :, None], q * jnp.exp(G), k * jnp.exp(G[:, :, -1:] - G), one, one


def decayed_scores(q: Array, k: Array, G: Array) -> Array:
    """A[b,n,h,i,j] = Σ_d q_id k_jd exp(G_id - G_jd) for j <= i (other entries are arbitrary but finite).

    Factoring e^{G_i - G_j} over a whole chunk overflows. Here every exponent is <= 0: row block a refers to its own
    first row s_a, with j < s_a for the matmul part, and the diagonal blocks are summed directly. The reference
    depends on no later token, so the past stays bit-equal when the future changes.
    """
    blocks = []
    for s in range(0, q.shape[2], SUB_BLOCK):
        rows = slice(s, s + SUB_BLOCK)
        reference = G[:, :, s : s + 1]
        past = einsum(
            "bnihd,bnjhd->bnhij",
            (q[:, :, rows] * jnp.exp(G[:, :, rows] - reference)).astype(k.dtype),
            (k[:, :, :s] * jnp.exp(reference - G[:, :, :s])).astype(k.dtype),
        )
        own = _direct_scores(q[:, :, rows], k[:, :, rows], G[:, :, rows])
        row = jnp.concatenate([past, own], axis=-1)
        blocks.append(jnp.pad(row, ((0, 0),) * 4 + ((0, q.shape[2] - row.shape[-1]),)))
    return jnp.concatenate(blocks, axis=-2)


@jax.checkpoint  # its [C, 16, K] products would otherwise be stored for the backward pass
def _direct_scores(q: Array, k: Array, G: Array) -> Array:
    q, k, G = (jnp.moveaxis(fp32(x), 2, -1) for x in (q, k, G))  # [B,N,H,K,C]
    E = past_decay(G[..., :, None] - G[..., None, :])
    return (q[..., :, None] * k[..., None, :] * E).sum(3)


def _wide(scores: Array, v: Array) -> tuple:
    return (*scores.shape[:3], v.shape[4], *scores.shape[4:])
