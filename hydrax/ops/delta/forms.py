"""The forms of `delta_rule`, in the layout of `ops.layout`."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hydrax.core.numerics import clamp_decay, einsum
from hydrax.core.typing import Array
from hydrax.ops import documents, layout
from hydrax.ops.delta.solve import unit_lower_inverse
from hydrax.ops.layout import scan_tokens
from hydrax.ops.linear.forms import SUB_BLOCK, decayed
from hydrax.ops.spans import join_chunks, over_spans, split_chunks

UNROLL = 4
"""Chunks per iteration of the loops over chunk states, see `layout.UNROLL`; here an iteration holds matmuls."""


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
    T = q.shape[1]
    C = min(chunk_size, -(-T // SUB_BLOCK) * SUB_BLOCK)
    x = tuple(split_chunks(a, C) for a in (q, k, v, beta, clamp_decay(g)))
    o, S = over_spans(_forward, _backward, x, layout.in_chunks(seg, q, C), S)
    return join_chunks(o, T), S


class _Pieces(NamedTuple):
    """What the decay touches, see `linear.forms.decayed`; `overlaps` are the scores of keys among themselves."""

    scores: Array
    q_in: Array
    k_out: Array
    o_in: Array
    v_out: Array
    overlaps: Array
    k_in: Array
    u_in: Array


def _pieces(q: Array, k: Array, g: Array, same: Array) -> _Pieces:
    overlaps, k_in, _, u_in, _ = decayed(k, k, g, same)
    scores, q_in, k_out, o_in, v_out = decayed(q, k, g, same)
    return _Pieces(scores, q_in, k_out, o_in, v_out, overlaps, k_in, u_in)


class _Chunks(NamedTuple):
    """A span of chunks as matrices: the tokens of a chunk write u = solve · v - W · S and read A · u."""

    A: Array  # [B,N,H,R,C,C]
    inverse: Array  # X = (I + β overlaps)^-1: each write freed of what earlier ones hold
    solve: Array  # X β
    reads: Array  # solve, of keys in the document of the incoming state and decayed from it
    W: Array  # reads · k  [B,N,H,R,C,K]
    writes: Array  # [B,N,H,R,C,1], decay of what is written up to the outgoing state
    decays: Array  # [B,N,H,R|1,K|1], of the state over the chunk


def _chunks(p: _Pieces, v: Array, beta: Array, g: Array, ids: tuple, inverse: Array | None = None) -> _Chunks:
    same, enters, leaves, keep = documents.chunk_masks(*ids)
    if inverse is None:
        inverse = unit_lower_inverse(_rows(beta)[..., :, None] * layout.causal(p.overlaps, same, own=False))
    solve = inverse * _rows(beta)[..., None, :]
    reads = (solve * _rows(enters[..., None, None] * p.u_in[..., 0])[..., None, :]).astype(v.dtype)
    return _Chunks(
        A=jnp.broadcast_to(layout.causal(p.scores, same), solve.shape).astype(v.dtype),
        inverse=inverse,
        solve=solve.astype(v.dtype),
        reads=reads,
        W=einsum("bnhrij,bnjhk->bnhrik", reads, p.k_in.astype(v.dtype)).astype(v.dtype),
        writes=_rows(leaves[..., None, None] * p.v_out[..., 0])[..., None],
        decays=keep[..., None, None, None] * jnp.exp(g.sum(2)),
    )


def _run(c: _Chunks, k_out: Array, v: Array, S: Array) -> tuple[Array, Array, Array]:
    """From chunk to chunk: what each writes, u [B,N,H,R,C,V], the state it finds, and the last state."""

    def chunk(S: Array, x: tuple) -> tuple[Array, tuple]:
        k_out, U, W, write, decay = x
        u = (U - einsum("bhrck,bhrkv->bhrcv", W, S.astype(W.dtype))).astype(W.dtype)
        update = einsum("bchk,bhrcv->bhrkv", k_out, (write * u).astype(W.dtype))
        return decay[..., None] * S + update, (u, S)

    U = einsum("bnhrij,bnjhrv->bnhriv", c.solve, v)
    x = layout.chunks_first((k_out, U, c.W, c.writes, c.decays))
    S, written = jax.lax.scan(chunk, S, x, unroll=UNROLL)
    return *layout.chunks_first(written), S


def _run_back(c: _Chunks, k_out: Array, q_in: Array, do_in: Array, du: Array, dS: Array) -> tuple[Array, Array, Array]:
    """The cotangents of `_run`: of u, of the state after each chunk, and of the first state."""

    def chunk(dS: Array, x: tuple) -> tuple[Array, tuple]:
        k_out, q_in, do_in, du, W, write, decay = x
        du = (du + write * einsum("bchk,bhrkv->bhrcv", k_out, dS.astype(W.dtype))).astype(W.dtype)
        read = einsum("bchk,bchrv->bhrkv", q_in, do_in) - einsum("bhrck,bhrcv->bhrkv", W, du)
        return decay[..., None] * dS + read, (du, dS)

    x = layout.chunks_first((k_out, q_in, do_in, du, c.W, c.writes, c.decays))
    dS, found = jax.lax.scan(chunk, dS, x, reverse=True, unroll=UNROLL)
    return *layout.chunks_first(found), dS


def _forward(x: tuple, ids: tuple, S: Array) -> tuple[Array, Array, Array]:
    """A span of chunks: outputs, the state after it, and the inverses, which are dear to compute."""
    q, k, v, beta, g = x
    p = _pieces(q, k, g, documents.chunk_masks(*ids)[0])
    c = _chunks(p, v, beta, g, ids)
    u, found, S = _run(c, p.k_out.astype(v.dtype), v, S)
    inter = einsum("bnchk,bnhrkv->bnchrv", p.q_in.astype(v.dtype), found.astype(v.dtype))
    return einsum("bnhrij,bnhrjv->bnihrv", c.A, u) + _enters(ids) * p.o_in * inter, S, c.inverse.astype(v.dtype)


def _backward(x: tuple, ids: tuple, S: Array, inverse: Array, do: Array, dS: Array) -> tuple[tuple, Array]:
    """The vector-Jacobian product of `_forward`; the states are computed again, their cotangents run backwards."""
    q, k, v, beta, g = x
    same, enters, leaves, _ = documents.chunk_masks(*ids)
    p, pullback = jax.vjp(functools.partial(_pieces, same=same), q, k, g)
    c = _chunks(p, v, beta, g, ids, inverse.astype(g.dtype))
    q_in, k_in, k_out, do_low = (a.astype(v.dtype) for a in (p.q_in, p.k_in, p.k_out, do))
    do_in = (_enters(ids) * p.o_in * do).astype(v.dtype)
    u, found, _ = _run(c, k_out, v, S)
    du, dafter, dS = _run_back(c, k_out, q_in, do_in, einsum("bnhrij,bnihrv->bnhrjv", c.A, do_low), dS)
    ddecays = layout.summed((found * dafter).sum(-1) * c.decays, g[:, :, 0])
    found, dafter = found.astype(v.dtype), dafter.astype(v.dtype)

    dW = -einsum("bnhrcv,bnhrkv->bnhrck", du, found).astype(v.dtype)
    dreads = einsum("bnhrik,bnjhk->bnhrij", dW, k_in)
    dsolve = einsum("bnhriv,bnjhrv->bnhrij", du, v)
    dsolve += dreads * _rows(enters[..., None, None] * p.u_in[..., 0])[..., None, :]
    doverlaps, dbeta = _solve_back(c.inverse, p.overlaps, _rows(beta), dsolve, same)
    dpieces = _Pieces(
        scores=layout.causal(einsum("bnihrv,bnhrjv->bnhrij", do_low, u), same),
        q_in=einsum("bnchrv,bnhrkv->bnchk", do_in, found),
        k_out=einsum("bnhrcv,bnhrkv->bnchk", (c.writes * u).astype(v.dtype), dafter),
        o_in=_enters(ids) * do * einsum("bnchk,bnhrkv->bnchrv", q_in, found),
        v_out=leaves[..., None, None, None] * _tokens(u * einsum("bnchk,bnhrkv->bnhrcv", k_out, dafter)),
        overlaps=doverlaps,
        k_in=einsum("bnhrij,bnhrik->bnjhk", c.reads, dW),
        u_in=_enters(ids) * _tokens((dreads * c.solve).sum(-2)[..., None]),
    )
    dq, dk, dg = layout.pull(pullback, dpieces, p)
    dv = einsum("bnhrij,bnhriv->bnjhrv", c.solve, du).astype(v.dtype)
    return (dq, dk, dv, _tokens(dbeta), dg + ddecays[:, :, None]), dS


def _solve_back(X: Array, overlaps: Array, beta: Array, dsolve: Array, same: Array) -> tuple[Array, Array]:
    """The cotangents of overlaps and beta, of solve = X diag(beta) with X = (I + diag(beta) overlaps)^-1."""
    dL = -einsum("bnhrji,bnhrjk,bnhrlk->bnhril", X, dsolve * beta[..., None, :], X)
    dL = layout.causal(dL, same, own=False)
    return beta[..., :, None] * dL, (dsolve * X).sum(-2) + (dL * overlaps).sum(-1)


def _enters(ids: tuple) -> Array:
    """Which tokens see the incoming state, [B,N,C,1,1,1]."""
    return documents.chunk_masks(*ids)[1][..., None, None, None]


def _rows(x: Array) -> Array:
    """[B,N,C,H,R] -> [B,N,H,R,C]."""
    return jnp.moveaxis(x, 2, -1)


def _tokens(x: Array) -> Array:
    """[B,N,H,R,C,...] -> [B,N,C,H,R,...]."""
    return jnp.moveaxis(x, 4, 2)
