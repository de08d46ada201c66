"""The forms of `linear_scan` and `selective_scan`.

Both are h_t = a_t ⊙ h_{t-1} + b_t for every channel by itself. In chunks, an associative scan runs over the tokens of a
chunk and a loop carries h from chunk to chunk. In both directions the h of a chunk are formed inside that loop: the
states [T,D,N] of a selective scan never exist at once.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, PyTree
from hydrax.ops import documents
from hydrax.ops.layout import chunks_first, scan_tokens
from hydrax.ops.spans import join_chunks, over_spans, split_chunks

# ------------------------------------------------------------------------------------------------------- the definition


def linear_step(a: Array, b: Array, h: Array) -> tuple[Array, Array]:
    """One token: a, b, h [B,*C]; returns the new h twice, as output and as state."""
    h = a * h + b
    return h, h


def selective_step(x: Array, dt: Array, b: Array, c: Array, h: Array, *, A: Array) -> tuple[Array, Array]:
    """One token: x, dt [B,D], b, c [B,N], A [D,N], h [B,D,N]; returns y [B,D] and the new h."""
    h = jnp.exp(dt[..., None] * A) * h + (dt * x)[..., None] * b[:, None]
    return einsum("bdn,bn->bd", h, c), h


def linear_recurrent(a: Array, b: Array, seg: Array | None, h: Array) -> tuple[Array, Array]:
    """The definition: `linear_step` over the tokens, restarting where the document changes."""
    return scan_tokens(linear_step, (a, b), seg, h)


def selective_recurrent(
    x: Array, dt: Array, A: Array, b: Array, c: Array, seg: Array | None, h: Array
) -> tuple[Array, Array]:
    """The definition: `selective_step` over the tokens, in fp32, restarting where the document changes."""
    return scan_tokens(functools.partial(selective_step, A=fp32(A)), (x, dt, b, c), seg, h)


# ------------------------------------------------------------------------------------------------------------ in chunks


def linear_chunked(a: Array, b: Array, seg: Array | None, h: Array, *, chunk_size: int = 256) -> tuple[Array, Array]:
    """Associative scans of C tokens (arXiv 1709.04057), h carried between them."""
    T = a.shape[1]
    C = min(chunk_size, T)
    a = restarting(a, seg)
    a, b, real = (split_chunks(v, C) for v in (a, b, jnp.ones(a.shape[:2], bool)))
    a = tree.where(real, a, jnp.ones_like(a))  # the tail is filled with zeros, which would clear h
    y, (_, h) = over_spans(_LINEAR_FORWARD, _LINEAR_BACKWARD, (a, b), (), ((), h))
    return join_chunks(y, T), h


def selective_chunked(
    x: Array, dt: Array, A: Array, b: Array, c: Array, seg: Array | None, h: Array, *, chunk_size: int = 64
) -> tuple[Array, Array]:
    """As `linear_chunked`; exp(dt A) and dt x b [B,C,D,N] exist for one chunk at a time (arXiv 2312.00752 §3.3)."""
    T = x.shape[1]
    C = min(chunk_size, T)
    inputs = tuple(split_chunks(v, C) for v in (x, dt, b, c))
    facts = (split_chunks(_starts(seg, x), C),)
    y, (_, h) = over_spans(_SELECTIVE_FORWARD, _SELECTIVE_BACKWARD, inputs, facts, (fp32(A), h))
    return join_chunks(y, T), h


def restarting(a: Array, seg: Array | None) -> Array:
    """a, and 0 where a document starts."""
    return a if seg is None else tree.where(_starts(seg, a), jnp.zeros_like(a), a)


def _starts(seg: Array | None, x: Array) -> Array:
    """Bool [B,T]: the token belongs to another document than the one before it."""
    if seg is None:
        return jnp.zeros(x.shape[:2], bool)
    return documents.changes(seg)


def _scan(a: Array, b: Array, h: Array, *, reverse: bool = False) -> Array:
    """h_t = a_t h_{t-1} + b_t over axis 1, from h before the first token (reversed: after the last)."""

    def then(first: tuple, second: tuple) -> tuple:
        return first[0] * second[0], second[0] * first[1] + second[1]

    decay, own = jax.lax.associative_scan(then, (a, b), axis=1, reverse=reverse)
    return own + decay * h[:, None]


def _scan_pullback(a: Array, h: Array, hs: Array, dhs: Array, dh: Array) -> tuple[Array, Array, Array]:
    """Cotangents of a, b and h, given those of hs = `_scan(a, b, h)` and of its last entry.

    db_t = dh_t + a_{t+1} db_{t+1},      da_t = h_{t-1} ⊙ db_t
    """
    later = jnp.concatenate([a[:, 1:], jnp.ones_like(a[:, :1])], axis=1)
    db = _scan(later, dhs, dh, reverse=True)
    before = jnp.concatenate([h[:, None], hs[:, :-1]], axis=1)
    return before * db, db, a[:, 0] * db[:, 0]


def _linear_chunk(_: tuple, x: tuple, facts: tuple, h: Array) -> tuple[Array, Array]:
    a, b = x
    hs = _scan(a, b, h)
    return hs, hs[:, -1]


def _linear_pullback(_: tuple, x: tuple, facts: tuple, h: Array, dy: Array, dh: Array) -> tuple[tuple, tuple, Array]:
    a, b = x
    da, db, dh = _scan_pullback(a, h, _scan(a, b, h), dy, dh)
    return (da, db), (), dh


def _selective_states(A: Array, inputs: tuple, facts: tuple, h: Array) -> tuple[Array, Array]:
    """The decay of every token of a chunk, and its state: [B,C,D,N]."""
    x, dt, b, _ = map(fp32, inputs)
    (starts,) = facts
    decay = jnp.exp(dt[..., None] * A)
    decay = tree.where(starts, jnp.zeros_like(decay), decay)
    return decay, _scan(decay, (dt * x)[..., None] * b[:, :, None], h)


def _selective_chunk(A: Array, inputs: tuple, facts: tuple, h: Array) -> tuple[Array, Array]:
    x, _, _, c = inputs
    _, hs = _selective_states(A, inputs, facts, h)
    return einsum("btdn,btn->btd", hs, c).astype(x.dtype), hs[:, -1]


def _selective_pullback(
    A: Array, inputs: tuple, facts: tuple, h: Array, dy: Array, dh: Array
) -> tuple[tuple, Array, Array]:
    decay, hs = _selective_states(A, inputs, facts, h)
    x, dt, b, c = map(fp32, inputs)
    dy = fp32(dy)
    ddecay, dwrite, dh = _scan_pullback(decay, h, hs, dy[..., None] * c[:, :, None], dh)
    dg = ddecay * decay  # of dt A; none where a document starts
    du = einsum("btdn,btn->btd", dwrite, b)  # of dt x
    ddt = einsum("btdn,dn->btd", dg, A) + x * du
    db = einsum("btdn,btd->btn", dwrite, dt * x)
    dc = einsum("btdn,btd->btn", hs, dy)
    dinputs = tuple(d.astype(v.dtype) for d, v in zip((dt * du, ddt, db, dc), inputs, strict=True))
    return dinputs, einsum("btdn,btd->dn", dg, dt), dh


# ---------------------------------------------------------------------------------------------- a span, chunk by chunk
# The state of a span is (parameters, h): what all tokens share is handed on unchanged, and its cotangents add up.


def _run(chunk: Callable, x: tuple, facts: tuple, state: tuple) -> tuple[PyTree, Array, Array]:
    """y of every chunk, the h that each finds, and the last h."""
    parameters, h = state

    def body(h: Array, inputs: tuple) -> tuple[Array, tuple]:
        y, new = chunk(parameters, *inputs, h)
        return new, (y, h)

    h, (y, found) = jax.lax.scan(body, h, chunks_first((x, facts)))
    return y, found, h


def _forward(chunk: Callable, x: tuple, facts: tuple, state: tuple) -> tuple[PyTree, tuple, tuple]:
    y, _, h = _run(chunk, x, facts, state)
    return jnp.moveaxis(y, 0, 1), (state[0], h), ()


def _backward(
    chunk: Callable, pullback: Callable, x: tuple, facts: tuple, state: tuple, saved: tuple, dy: Array, dstate: tuple
) -> tuple[tuple, tuple]:
    """The vector-Jacobian product of `_forward`; the h of each chunk are computed again, cotangents run backwards."""
    _, found, _ = _run(chunk, x, facts, state)

    def body(carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        (x, facts, dy), h = inputs
        dx, dparameters, dh = pullback(state[0], x, facts, h, dy, carry[1])
        return (jax.tree.map(jnp.add, carry[0], dparameters), dh), dx

    dstate, dx = jax.lax.scan(body, dstate, (chunks_first((x, facts, dy)), found), reverse=True)
    return jax.tree.map(lambda d: jnp.moveaxis(d, 0, 1), dx), dstate


_LINEAR_FORWARD = functools.partial(_forward, _linear_chunk)
_LINEAR_BACKWARD = functools.partial(_backward, _linear_chunk, _linear_pullback)
_SELECTIVE_FORWARD = functools.partial(_forward, _selective_chunk)
_SELECTIVE_BACKWARD = functools.partial(_backward, _selective_chunk, _selective_pullback)
