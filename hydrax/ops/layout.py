"""What the matrix-state ops share: their layout, by key head, and the scan over tokens that defines them.

    q, k [B,T,H,K];  v [B,T,H,R,V];  beta [B,T,H,R];  g [B,T,H,R|1,K|1];  S [B,H,R,K,V]

A decay over K has no R axis and a decay over R no K axis, so one broadcast serves both.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.ops import documents
from hydrax.ops.spans import split_chunks

UNROLL = 16
"""Chunks per iteration of the loop over chunk states: on a GPU an iteration costs more than what it computes."""


def canonical_decay(q: Array, k: Array, v: Array, g: Array | None) -> Array:
    """Log-decay as fp32 [B,T,H,R or 1,K or 1], after checking every shape."""
    B, T, H, K = q.shape
    Hv = v.shape[2]
    if k.shape != q.shape or v.shape[:2] != (B, T) or Hv % H:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: expected [B,T,H,K] twice and [B,T,Hv,V], Hv = R·H")
    if g is None:
        # behind a barrier: compilers would spend seconds on evaluating all that follows from zeros
        return jax.lax.optimization_barrier(jnp.zeros_like(q, wide(q.dtype), (B, T, H, 1, 1)))
    g = g.astype(wide(jnp.result_type(g, q)))
    if g.shape == (Hv,):
        g = jnp.broadcast_to(g, (B, T, Hv))
    if g.shape == (B, T, Hv):
        return g.reshape(B, T, H, Hv // H, 1)
    if g.shape == (B, T, H, K):
        return g[:, :, :, None]
    raise ValueError(f"log_decay {g.shape}: expected {(Hv,)}, {(B, T, Hv)} or {(B, T, H, K)}")


def grouped_state(initial: Array | None, k: Array, v: Array) -> Array:
    """The state before token 0 as fp32 [B,H,R,K,V] for grouped values, zeros if None."""
    B, _, H, R, V = v.shape
    K = k.shape[-1]
    dtype = wide(v.dtype)
    if initial is None:
        return jnp.zeros_like(v, dtype, (B, H, R, K, V))
    if initial.shape != (B, H * R, K, V):
        raise ValueError(f"initial_state {initial.shape}: expected {(B, H * R, K, V)}")
    return initial.astype(dtype).reshape(B, H, R, K, V)


def at_padding(segment_ids: Array | None, *inputs: Array) -> tuple[Array | None, Array | None, tuple[Array, ...]]:
    """Ids with padding filled, the mask of real tokens, and the inputs [B,T,...] with zeros at padding.

    k = v = beta = g = 0 leaves the state alone.
    """
    if segment_ids is None:
        return None, None, inputs
    seg, valid = documents.fill_padding(segment_ids)
    return seg, valid, tuple(tree.where(valid, x, jnp.zeros_like(x)) for x in inputs)


def scan_tokens(step: Callable, inputs: tuple[Array, ...], seg: Array | None, S: PyTree) -> tuple[Array, PyTree]:
    """`o_t, S_t = step(*inputs_t, S_{t-1})` over the tokens, in fp32, from zeros wherever the document changes."""
    inputs = tuple(fp32(x) for x in inputs)
    seg = jnp.zeros(inputs[0].shape[:2], jnp.int32) if seg is None else seg

    def token(S: PyTree, x: tuple) -> tuple[PyTree, Array]:
        changes, *inputs_t = x
        o, S = step(*inputs_t, tree.where(changes, jax.tree.map(jnp.zeros_like, S), S))
        return S, o

    S, o = jax.lax.scan(token, S, chunks_first((documents.changes(seg), *inputs)))
    return jnp.moveaxis(o, 0, 1), S


def in_chunks(seg: Array | None, q: Array, C: int) -> tuple[Array, Array]:
    """What `documents.chunk_masks` needs of q [B,T,...] cut into chunks: ids [B,N,C], and those before each chunk."""
    seg = split_chunks(jnp.zeros(q.shape[:2], jnp.int32) if seg is None else seg, C)
    return seg, documents.ids_before(seg)


def causal(scores: Array, same: Array, *, own: bool = True) -> Array:
    """scores [B,N,H,R,C,C] of pairs j <= i (j < i without `own`) of one document, zero elsewhere."""
    pairs = jnp.tril(jnp.ones(scores.shape[-2:], bool), 0 if own else -1)
    return jnp.where((same & pairs)[:, :, None, None], scores, 0)


def carry(updates: Array, decays: Array, S: Array, *, reverse: bool = False) -> tuple[Array, Array]:
    """S ← decay · S + update from chunk to chunk: the S that each chunk finds [B,N,H,R,K,V], and the last one.

    Reversed, the same recurrence carries the cotangent of S.
    """

    def chunk(S: Array, x: tuple) -> tuple[Array, Array]:
        update, decay = x
        return decay[..., None] * S + update, S

    S, found = jax.lax.scan(chunk, S, chunks_first((updates, decays)), reverse=reverse, unroll=UNROLL)
    return jnp.moveaxis(found, 0, 1), S


def chunks_first(x: tuple) -> tuple:
    """[B,N,...] -> [N,B,...], for a scan over chunks or tokens."""
    return jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), x)


def pull(pullback: Callable, cotangents: tuple, outputs: tuple) -> tuple:
    """`pullback` of cotangents that are summed over the axes along which its outputs were broadcast."""

    return pullback(jax.tree.map(lambda x, like: summed(x, like).astype(like.dtype), cotangents, outputs))


def summed(x: Array, like: Array) -> Array:
    """x summed over the axes that `like` lacks on the left, or has with length 1."""
    x = x.sum(tuple(range(x.ndim - like.ndim)))
    return x.sum(tuple(i for i, n in enumerate(like.shape) if n == 1), keepdims=True)
