"""The forms of `slot_attention`: decayed sums score the slots, a softmax weighs them, linear attention reads them.

And those of `slot_softmax`, whose slots keep each sum of exponentials as a number of fp32 and an integer exponent.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.core.numerics import clamp_decay, einsum
from hydrax.core.typing import Array
from hydrax.ops import documents, layout
from hydrax.ops.linear import linear_attention
from hydrax.ops.linear.forms import SUB_BLOCK, Sums, between, decay_sums, decayed_scores, past_decay, to_end
from hydrax.ops.scan import linear_scan
from hydrax.ops.spans import join_chunks, over_spans, split_chunks

State = tuple[Array, Array]
"""Keys [B,H,M,K] and values [B,H,M,V] of the slots."""

Average = tuple[Array, Array, Array]
"""Exponents int32 [B,H,M], numerators [B,H,M,V] and denominators [B,H,M] of the slots of `slot_softmax`."""

MAX_SCORE = 1e5
"""Bound on what is exponentiated: fp32 still resolves 0.01 there."""

NOTHING = -(10**6)
"""Exponent of a slot that holds nothing: below that of every score."""

EXPONENTS = 16
"""Exponents are multiples of this: as long as scores stay within ±8 they are 0, and rounding cannot change them."""


def step(q: Array, k: Array, v: Array, w: Array, g: Array, S: Array, *, scale: float) -> tuple[Array, Array]:
    """One token: q, k [B,H,K], v [B,H,V], w, g [B,H,M]; S [B,H,M,K+V] has keys and values side by side."""
    S = jnp.exp(g)[..., None] * S + w[..., None] * jnp.concatenate([k, v], axis=-1)[:, :, None]
    keys, values = jnp.split(S, [k.shape[-1]], axis=-1)
    p = _weights(scale * einsum("bhk,bhmk->bhm", q, keys))
    return einsum("bhm,bhmv->bhv", p, values), S


def _weights(scores: Array) -> Array:
    """The softmax over slots. Compilers may form its exponentials and its maximum from scores of their own, rounded
    apart: where they are bounded, neither difference nor result can overflow."""
    return jax.nn.softmax(jnp.clip(scores, -MAX_SCORE, MAX_SCORE), axis=-1)


def recurrent(
    q: Array, k: Array, v: Array, w: Array, g: Array, seg: Array | None, state: State, *, scale: float
) -> tuple[Array, State]:
    """The definition: `step` over the tokens, in fp32, restarting where the document changes."""
    one = functools.partial(step, scale=scale)
    o, S = layout.scan_tokens(one, (q, k, v, w, g), seg, jnp.concatenate(state, axis=-1))
    keys, values = jnp.split(S, [k.shape[-1]], axis=-1)
    return o, (keys, values)


def chunked(
    q: Array,
    k: Array,
    v: Array,
    w: Array,
    g: Array,
    seg: Array | None,
    state: State,
    *,
    scale: float,
    chunk_size: int = 64,
) -> tuple[Array, State]:
    """Both passes in chunks of C tokens (arXiv 2409.07146); the decay is on the outputs of the first, on the queries
    and keys of the second."""
    T = q.shape[1]
    C = min(chunk_size, -(-T // SUB_BLOCK) * SUB_BLOCK)
    x = tuple(split_chunks(a, C) for a in (q, k, w, clamp_decay(g)))
    y, keys = over_spans(_forward, _backward, x, layout.in_chunks(seg, q, C), state[0])
    p = _weights(scale * join_chunks(y, T))
    o, values = linear_attention(
        p.astype(v.dtype),
        w.astype(v.dtype),
        v,
        g,
        scale=1.0,
        initial_state=state[1],
        segment_ids=seg,
        impl="chunked",
        chunk_size=chunk_size,
    )
    return o, (keys, values)


def _forward(x: tuple, ids: tuple, S: Array) -> tuple[Array, Array, tuple]:
    """A span of chunks: y_im = Σ_{j<=i} (q_i·k_j) w_jm e^{G_im-G_jm} + e^{G_im} (S q_i)_m, and the keys after it."""
    q, k, w, g = x
    A, G, into, out, decays = _terms(q, k, g, ids)
    found, S = layout.carry(_outer(out * w, k), decays, S)
    return _decayed_sums(A, w, G, k.dtype) + into * _read(q, found), S, ()


def _backward(x: tuple, ids: tuple, S: Array, saved: tuple, dy: Array, dS: Array) -> tuple[tuple, Array]:
    """The vector-Jacobian product of `_forward`; the states are computed again, their cotangents run backwards.

    The gate of token t weighs what crosses it, from j < t to i >= t. So reads of the incoming state at i count for all
    gates up to i, writes of j to the outgoing state for all gates after j, what passes the chunk for all of them.
    """
    q, k, w, g = x
    A, G, into, out, decays = _terms(q, k, g, ids)
    found, _ = layout.carry(_outer(out * w, k), decays, S)
    dafter, dS = layout.carry(_outer(into * dy, q), decays, dS, reverse=True)
    dA = _past(decayed_scores(dy, w.astype(k.dtype), G), ids).astype(k.dtype)
    dw, dG = _decayed_sums_back(A, w, G, dy, k.dtype)
    dwritten = out * _read(k, dafter)
    dq = einsum("bnhij,bnjhk->bnihk", dA, k) + _spread(into * dy, found, k.dtype)
    dk = einsum("bnhij,bnihk->bnjhk", dA, q) + _spread(out * w, dafter, k.dtype)
    dg = jax.lax.cumsum(dG + into * dy * _read(q, found), axis=2, reverse=True)
    dg += _before(w * dwritten) + (decays * (found * dafter).sum(-1))[:, :, None]
    return (dq.astype(q.dtype), dk.astype(k.dtype), (dw + dwritten).astype(w.dtype), dg), dS


def _terms(q: Array, k: Array, g: Array, ids: tuple) -> tuple[Array, Sums, Array, Array, Array]:
    """Scores q_i·k_j [B,N,H,C,C] and G; what is left of the incoming state at each token and of each token in the
    outgoing state [B,N,C,H,M], and of the state over the chunk [B,N,H,M]."""
    same, enters, leaves, keep = documents.chunk_masks(*ids)
    G = decay_sums(g, same)
    into, out = enters[..., None, None] * jnp.exp(sum(G)), leaves[..., None, None] * to_end(g)
    return _past(einsum("bnihk,bnjhk->bnhij", q, k), ids), G, into, out, keep[..., None, None] * jnp.exp(g.sum(2))


def _past(scores: Array, ids: tuple) -> Array:
    return layout.causal(scores[:, :, :, None], documents.chunk_masks(*ids)[0])[:, :, :, 0]


def _decayed_sums(A: Array, w: Array, G: Sums, dtype: jnp.dtype) -> Array:
    """y_im = Σ_{j<=i} A_ij w_jm e^{G_im-G_jm}, as in `decayed_scores`: no exponent is positive, and row block a refers
    to its first row."""
    blocks = []
    for s in range(0, w.shape[2], SUB_BLOCK):
        first, rows, before = _block(s)
        far = (w[before] * jnp.exp(between(G, first, before))).astype(dtype)
        past = einsum("bnhij,bnjhm->bnihm", _off_diagonal(A, s).astype(dtype), far)
        own = (_diagonal(A, s) * _rows(w[rows])[..., None, :] * _own_decay(G, rows)).sum(-1)
        blocks.append(past * jnp.exp(between(G, rows, first)) + _tokens(own))
    return jnp.concatenate(blocks, axis=2)


def _decayed_sums_back(A: Array, w: Array, G: Sums, dy: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """The cotangents of w and G under `_decayed_sums`.

    With P_ijm = dy_im A_ij w_jm e^{G_im-G_jm}, that of G_t is Σ_j P_tj - Σ_i P_it. Sums of these over t cancel but for
    the pairs across a gate: so both are made of the same rounded factors, and without the pairs i = j.
    """
    dw, dG = jnp.zeros_like(dy), jnp.zeros_like(dy)
    for s in range(0, w.shape[2], SUB_BLOCK):
        first, rows, before = _block(s)
        decay = jnp.exp(between(G, first, before))
        near = (dy[rows] * jnp.exp(between(G, rows, first))).astype(dtype)
        far = (w[before] * decay).astype(dtype)
        scores = _off_diagonal(A, s).astype(dtype)
        gathered = near * einsum("bnhij,bnjhm->bnihm", scores, far)
        sent = einsum("bnhij,bnihm->bnjhm", scores, near)
        pairs = _diagonal(A, s) * _rows(dy[rows])[..., :, None] * _own_decay(G, rows)
        P = jnp.tril(pairs * _rows(w[rows])[..., None, :], -1)
        dw = dw.at[before].add(decay * sent).at[rows].set(_tokens(pairs.sum(-2)))
        dG = dG.at[before].add(-far * sent).at[rows].set(gathered + _tokens(P.sum(-1) - P.sum(-2)))
    return dw, dG


def _block(s: int) -> tuple[tuple, tuple, tuple]:
    """The first token of the row block at s, its tokens, and those before it, as indices of [B,N,C,...]."""
    return np.s_[:, :, s : s + 1], np.s_[:, :, s : s + SUB_BLOCK], np.s_[:, :, :s]


def _off_diagonal(A: Array, s: int) -> Array:
    return A[..., s : s + SUB_BLOCK, :s]


def _diagonal(A: Array, s: int) -> Array:
    """The diagonal block [B,N,H,1,16,16] at s, beside slots."""
    return A[:, :, :, None, s : s + SUB_BLOCK, s : s + SUB_BLOCK]


def _own_decay(G: Sums, rows: tuple) -> Array:
    """e^{G_im-G_jm} [B,N,H,M,16,16] for j <= i in one block, else 1."""
    own = [_rows(x[rows]) for x in G]
    return past_decay(between(own, np.s_[..., :, None], np.s_[..., None, :]))


def _outer(w: Array, k: Array) -> Array:
    """What a chunk adds to the slots, Σ_j w_j k_jᵀ [B,N,H,M,K]."""
    return einsum("bnchm,bnchk->bnhmk", w.astype(k.dtype), k)


def _read(q: Array, S: Array) -> Array:
    """S q for each token, [B,N,C,H,M]."""
    return einsum("bnchk,bnhmk->bnchm", q, S.astype(q.dtype))


def _spread(w: Array, S: Array, dtype: jnp.dtype) -> Array:
    """Sᵀ w for each token, [B,N,C,H,K]."""
    return einsum("bnhmk,bnchm->bnchk", S.astype(dtype), w.astype(dtype))


def _before(x: Array) -> Array:
    """Sums over the earlier tokens of the chunk."""
    return jnp.cumsum(jnp.pad(x[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0))), axis=2)


def _rows(x: Array) -> Array:
    """[B,N,C,H,M] -> [B,N,H,M,C]."""
    return jnp.moveaxis(x, 2, -1)


def _tokens(x: Array) -> Array:
    """[B,N,H,M,C] -> [B,N,C,H,M]."""
    return jnp.moveaxis(x, -1, 2)


# --------------------------------------------------------------------------------------------------------- slot_softmax


def softmax_step(q: Array, s: Array, v: Array, state: Average) -> tuple[Array, Average]:
    """One token: q, s [B,H,M], v [B,H,V]. The exponent p is the multiple of 16 next to the largest score so far.
    Outputs do not depend on it, and being an integer it has no gradient."""
    p, numerator, denominator = state
    past = _exponents(p, denominator)
    top = jnp.maximum(past, _exponent(s))
    keep, w = jnp.exp((past - top).astype(s.dtype)), jnp.exp(s - top)
    numerator = keep[..., None] * numerator + w[..., None] * v[:, :, None]
    denominator = keep * denominator + w
    o = einsum("bhm,bhmv->bhv", _shares(q, denominator), numerator)
    return o, (_kept(top, denominator), numerator, denominator)


def softmax_recurrent(q: Array, s: Array, v: Array, seg: Array | None, state: Average) -> tuple[Array, Average]:
    """The definition: `softmax_step` over the tokens, in fp32, restarting where the document changes."""
    return layout.scan_tokens(softmax_step, (q, s, v), seg, state)


def softmax_chunked(
    q: Array, s: Array, v: Array, seg: Array | None, state: Average, *, chunk_size: int = 128
) -> tuple[Array, Average]:
    """Linear attention in chunks: of the running exponents p_t, keys e^{s_t - p_t} and log-decays p_{t-1} - p_t."""
    p, numerator, denominator = state
    past, top = _running_exponents(_exponent(s), _exponents(p, denominator), seg)
    g, w = (past - top).astype(s.dtype), jnp.exp(s - top).astype(v.dtype)
    facts: dict[str, Any] = {"segment_ids": seg, "impl": "chunked", "chunk_size": chunk_size}
    sums, denominator = linear_scan(jnp.exp(g), w, initial_state=denominator, **facts)
    q = _shares(q, sums).astype(v.dtype)
    o, numerator = linear_attention(q, w, v, g, scale=1.0, initial_state=numerator, **facts)
    return o, (_kept(top[:, -1], denominator), numerator, denominator)


def _exponent(s: Array) -> Array:
    return EXPONENTS * jnp.round(s / EXPONENTS).astype(jnp.int32)


def _exponents(p: Array, denominator: Array) -> Array:
    """The exponents of a state, in which zeros stand for slots that hold nothing."""
    return jnp.where(denominator > 0, p, NOTHING)


def _kept(p: Array, denominator: Array) -> Array:
    """The inverse of `_exponents`."""
    return jnp.where(denominator > 0, p, 0)


def _shares(q: Array, denominator: Array) -> Array:
    """What a query reads from each numerator; nothing where nothing is."""
    return q / jnp.where(denominator > 0, denominator, 1)


def _running_exponents(p: Array, first: Array, seg: Array | None) -> tuple[Array, Array]:
    """The largest exponent of the document before each token (`first` before token 0), and with it: [B,T,H,M]."""
    starts = jnp.zeros(p.shape[:2], bool) if seg is None else documents.changes(seg)
    starts = starts[:, :, None, None]

    def then(a: tuple, b: tuple) -> tuple:
        return a[0] | b[0], jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))

    _, top = jax.lax.associative_scan(then, (starts, p.at[:, 0].max(first)), axis=1)
    past = jnp.concatenate([first[:, None], top[:, :-1]], axis=1)
    return jnp.where(starts, top, past), top
