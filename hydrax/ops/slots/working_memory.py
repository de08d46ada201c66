"""A memory that takes up a document chunk by chunk, each of them one chunk late (Gecko, arXiv 2601.06463).

    o_t = M_cᵀ q_t for t in chunk c,      M_c has absorbed the chunks 0 .. c - 2 of the document, one by one:

    l_f = log Σ_j e^{k_jf},   L ← log(e^L + e^l),   ρ = e^{l - L},   K̂ = softmax_j(k),   K̄ = softmax_f(k)
    M ← M + ρ ⊙ (K̂ᵀ (v - K̄ M) - M)                                          (j: tokens of a chunk, f: features)

Without K̄ M, M holds the averages of all values so far by the softmax of k, as `slot_softmax`. Chunks count from the
start of the document, so that in any C tokens in a row at most one ends.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import einsum, fp32, wide
from hydrax.core.typing import Array, Bool, Float, Int
from hydrax.ops.dispatch import select
from hydrax.ops.spans import join_chunks

State = tuple[Float[Array, "B H K V"], Float[Array, "B H K"]]


def working_memory(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    positions: Int[Array, "B T"],
    *,
    chunk: int,
    past: tuple[Float[Array, "B S H K"], Float[Array, "B S H V"]] | None = None,
    initial_state: State | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """What is read of the memory above, and the memory after the last token.

    Args:
      q: how much of each feature is read.
      k, v: what is absorbed.
      positions: index of each token in its document.
      chunk: C, tokens per chunk.
      past: k and v of the S = 2C tokens before token 0; what lies before its document is ignored.
      initial_state: (M, L) before token 0, belonging to its document; None, or anything if there are no two complete
        chunks before it: empty.
      segment_ids: documents; id 0 (right padding) leaves the memory alone.
      impl: "recurrent" (the definition), "chunked", or None to choose.

    Returns:
      o in the dtype of v, exactly zero in the first two chunks of a document, and (M, L) in fp32; zeros if the document
      is not longer than that.

    Raises:
      ValueError: shapes that do not fit, or an unknown `impl`.
    """
    (B, T, H, K), V = q.shape, v.shape[-1]
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: expected [B,T,H,K] twice and [B,T,H,V]")
    if past is None:
        old_k, old_v = (jnp.zeros_like(x, shape=(B, 2 * chunk, *x.shape[2:])) for x in (k, v))
    else:
        old_k, old_v = (old.astype(new.dtype) for old, new in zip(past, (k, v), strict=True))
    if old_k.shape != (B, 2 * chunk, H, K) or old_v.shape != (B, 2 * chunk, H, V):
        raise ValueError(f"past {old_k.shape}, {old_v.shape}: expected {2 * chunk} tokens as k and v")
    k, v = jnp.concatenate([old_k, k], axis=1), jnp.concatenate([old_v, v], axis=1)
    if initial_state is None:
        zero = jnp.zeros_like(k, wide(v.dtype), (B, H, K))
        initial_state = (zero[..., None] * jnp.zeros((V,), zero.dtype), zero)
    real = jnp.ones(positions.shape, bool) if segment_ids is None else segment_ids != 0
    form = select("working_memory", impl, FORMS, "recurrent" if T == 1 else "chunked", q.shape)
    o, (M, L) = form(q, k, v, positions, real, initial_state, chunk)
    count = jnp.max(jnp.where(real, jnp.arange(1, T + 1), 0), axis=1)
    after = jnp.take_along_axis(positions, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0] + 1
    kept = (count == 0) | (after >= 2 * chunk)
    return o.astype(v.dtype), tree.where(kept, (M, L), jax.tree.map(jnp.zeros_like, (M, L)))


def absorbed(
    state: State, k: Float[Array, "B C H K"], v: Float[Array, "B C H V"], first: Bool[Array, "B"]
) -> tuple[Array, Array]:
    """(M, L) after one more chunk, the `first` of its document or a later one."""
    M, L = state
    k, v = fp32(k), fp32(v)
    M = tree.where(first, jnp.zeros_like(M), M)
    own = jax.nn.logsumexp(k, axis=1)
    L = tree.where(first, own, jnp.logaddexp(L, own))
    news = v - einsum("bchk,bhkv->bchv", jax.nn.softmax(k, axis=-1), M)
    written = einsum("bchk,bchv->bhkv", jnp.exp(k - own[:, None]), news)
    return M + jnp.exp(own - L)[..., None] * (written - M), L


def _read(q: Array, M: Array) -> Array:
    return einsum("bthk,bhkv->bthv", fp32(q), M)


def _recurrent(
    q: Array, k: Array, v: Array, positions: Array, real: Array, state: State, chunk: int
) -> tuple[Array, State]:
    """The definition: every token reads; the last of a chunk absorbs the chunk before."""

    def token(state: State, x: tuple) -> tuple[State, Array]:
        i, q, position, real = x
        o = jnp.where((position >= 2 * chunk)[:, None, None], _read(q[:, None], state[0])[:, 0], 0)
        ends = real & (position % chunk == chunk - 1) & (position >= 2 * chunk - 1)

        def absorb(state: State) -> State:
            before_k, before_v = (jax.lax.dynamic_slice_in_dim(a, i + 1, chunk, axis=1) for a in (k, v))
            return tree.where(ends, absorbed(state, before_k, before_v, position < 2 * chunk), state)

        return jax.lax.cond(jnp.any(ends), absorb, lambda state: state, state), jnp.where(real[:, None, None], o, 0)

    xs = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (q, positions, real))
    state, o = jax.lax.scan(token, state, (jnp.arange(q.shape[1]), *xs))
    return jnp.moveaxis(o, 0, 1), state


def _chunked(
    q: Array, k: Array, v: Array, positions: Array, real: Array, state: State, chunk: int
) -> tuple[Array, State]:
    """C tokens of the row at a time: before the end of a chunk among them they read M, after it the next one."""
    T, C = q.shape[1], chunk
    N = -(-T // C)

    def blocks(x: Array, n: int = N) -> Array:
        x = jnp.pad(x, [(0, 0), (0, n * C - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], n, C, *x.shape[2:]), 1, 0)

    def with_next(x: Array) -> Array:
        """[N,B,2C,...]: the chunk before any end among the tokens of block i, which are in i + 2, is in i and i + 1."""
        x = blocks(x, N + 2)
        return jnp.concatenate([x[:N], x[1 : N + 1]], axis=2)

    @jax.checkpoint
    def block(state: State, x: tuple) -> tuple[State, Array]:
        q, k, v, p, real = x
        ends = real & (p % C == C - 1) & (p >= 2 * C - 1)
        some, end = ends.any(1), jnp.argmax(ends, axis=1)

        def absorb(state: State) -> State:
            cut = jax.vmap(functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=C))
            first = jnp.take_along_axis(p, end[:, None], axis=1)[:, 0] < 2 * C
            return tree.where(some, absorbed(state, cut(k, end + 1), cut(v, end + 1), first), state)

        new = jax.lax.cond(jnp.any(some), absorb, lambda state: state, state)
        late = some[:, None] & (jnp.arange(C) > end[:, None])
        o = jnp.where(late[..., None, None], _read(q, new[0]), _read(q, state[0]))
        return new, jnp.where((real & (p >= 2 * C))[..., None, None], o, 0)

    xs = (blocks(q), with_next(k), with_next(v), blocks(positions), blocks(real))
    state, o = jax.lax.scan(block, state, xs)
    return join_chunks(jnp.moveaxis(o, 0, 1), T), state


FORMS: dict[str, Callable] = {"recurrent": _recurrent, "chunked": _chunked}
