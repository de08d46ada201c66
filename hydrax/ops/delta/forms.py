"""The forms of `delta_rule`, in the layout of `ops.layout`."""

import jax
import jax.numpy as jnp

from hydrax.core.numerics import clamp_decay, einsum
from hydrax.core.typing import Array
from hydrax.ops import documents
from hydrax.ops.delta.solve import unit_lower_inverse
from hydrax.ops.layout import scan_tokens, split_chunks
from hydrax.ops.linear.forms import SUB_BLOCK, decayed


def step(q: Array, k: Array, v: Array, beta: Array, g: Array, S: Array) -> tuple[Array, Array]:
    """One token: q, k [B,H,K], v [B,H,R,V], beta [B,H,R], g [B,H,R|1,K|1]; returns o [B,H,R,V] and the new S."""
    S = jnp.exp(g)[..., None] * S
    u = beta[..., None] * (v - einsum("bhk,bhrkv->bhrv", k, S))
    S = S + k[:, :, None, :, None] * u[:, :, :, None, :]
    return einsum("bhk,bhrkv->bhrv", q, S), S


def recurrent(q: Array, k: Array, v: Array, beta: Array, g: Array, seg: Array | None, S: Array) -> tuple[Array, Array]:
    """The definition: `step` over the tokens, in fp32, restarting where the document changes."""
    return scan_tokens(step, (q, k, v, beta, g), seg, S)


def chunked(
    q: Array, k: Array, v: Array, beta: Array, g: Array, seg: Array | None, S: Array, *, chunk_size: int = 64
) -> tuple[Array, Array]:
    """WY form of C tokens at a time, a recurrence over the chunk states (arXiv 2406.06484 §3, 2412.06464 §3)."""
    B, T = q.shape[:2]
    seg = jnp.zeros((B, T), jnp.int32) if seg is None else seg
    C = min(chunk_size, -(-T // SUB_BLOCK) * SUB_BLOCK)
    q, k, v, beta, g, seg = (split_chunks(x, C) for x in (q, k, v, beta, g, seg))
    same, enters, leaves, keep = documents.chunk_masks(seg)
    g = clamp_decay(g)

    scores, q_in, k_out, o_in, v_out = decayed(q, k, g)
    scores = jnp.where((same & jnp.tril(jnp.ones((C, C), bool)))[:, :, None, None], scores, 0)
    overlaps, k_in, _, u_in, _ = decayed(k, k, g)
    overlaps = jnp.where((same & jnp.tril(jnp.ones((C, C), bool), -1))[:, :, None, None], overlaps, 0)
    solve = _solve(overlaps, _rows(beta))
    U = einsum("bnhrij,bnjhrv->bnhriv", solve.astype(v.dtype), v)
    reads = solve * _rows(enters[..., None, None] * u_in[..., 0])[..., None, :]
    W = einsum("bnhrij,bnjhk->bnhrik", reads.astype(v.dtype), k_in.astype(v.dtype))
    writes = _rows(leaves[..., None, None] * v_out[..., 0])[..., None]
    decays = keep[..., None, None, None] * jnp.exp(g.sum(2))

    def chunk(S: Array, x: tuple) -> tuple[Array, tuple]:
        k_out, U, W, write, decay = x
        u = U - einsum("bhrck,bhrkv->bhrcv", W, S.astype(W.dtype))
        update = einsum("bchk,bhrcv->bhrkv", k_out, (write * u).astype(k_out.dtype))
        return decay[..., None] * S + update, (u.astype(k_out.dtype), S.astype(k_out.dtype))

    inputs = (k_out.astype(v.dtype), U, W.astype(v.dtype), writes, decays)
    S, (u, incoming) = jax.lax.scan(chunk, S, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs))
    intra = einsum("bnhrij,nbhrjv->bnihrv", jnp.broadcast_to(scores, solve.shape).astype(v.dtype), u)
    inter = einsum("bnchk,nbhrkv->bnchrv", q_in.astype(v.dtype), incoming)
    o = intra + enters[..., None, None, None] * o_in * inter
    return o.reshape(B, -1, *o.shape[3:])[:, :T], S


def _solve(overlaps: Array, beta: Array) -> Array:
    """(I + diag(beta) A)^-1 diag(beta): from values to what is written, each free of what earlier writes hold."""
    return unit_lower_inverse(beta[..., :, None] * overlaps) * beta[..., None, :]


def _rows(x: Array) -> Array:
    """[B,N,C,H,R] -> [B,N,H,R,C]."""
    return jnp.moveaxis(x, 2, -1)
