"""States of recurrences over rows whose tokens are divided over a mesh axis, inside a `jax.shard_map` over it.

What the tokens of a shard do to a state is affine, S_out = M S_in + U. LASP-2 (arXiv 2502.07563): every shard gathers
(M, U) of all, which do not grow with its tokens, and composes those before its own,

    S_in(r) = M_{r-1} S_in(r-1) + U_{r-1},        dS_out(r) = M_{r+1}ᵀ dS_out(r+1) + R_{r+1},

and once more for the backward pass, where R is what a shard's own outputs ask of the state before it. M is a factor
per row of the state (none, scalar or vector decay) or a matrix (delta rules).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import einsum
from hydrax.core.typing import Array, Bool, PyTree


def _scaled(M: Array, S: Array) -> Array:
    return M.reshape(*M.shape, *[1] * (S.ndim - M.ndim)) * S


TRANSITIONS: dict[str, Callable[[Array, Array], Array]] = {
    "diag": _scaled,
    "full": lambda M, S: einsum("bhij,bhjv->bhiv", M, S),
    "diag transposed": _scaled,
    "full transposed": lambda M, S: einsum("bhji,bhjv->bhiv", M, S),
}
"""M S of a transition: M [B,...] scales the leading dimensions of S, or is [B,H,K,K] for S [B,H,K,V]; and Mᵀ S."""


def allgather_state(
    op: Callable,
    summarize: Callable,
    x: PyTree,
    state: PyTree | None,
    segment_ids: Array | None,
    joined: Bool[Array, "B"],
    *,
    transition: str,
    axis: str,
) -> tuple[Array, PyTree]:
    """`op` of this shard's tokens, from the state that the shards before it leave: (y, state after this shard).

    Args:
      op: (x, state, segment_ids) -> (y, state). What it reads of the state may be any function of it.
      summarize: (x, segment_ids) -> (M, U); M is 0 where a document ends inside. U has the structure of the state.
      x: this shard's inputs, all of them differentiated.
      state: before the row, the same on all shards; zeros if None.
      joined: whether token 0 continues the document of the shard before it; True on the first one.
      transition: "diag" or "full", see `TRANSITIONS`.
      axis: mesh axis over which tokens are divided.
    """
    x, state, segment_ids, joined = tree.alike((x, state, segment_ids, joined))
    return _affine(op, summarize, transition, axis, x, state, segment_ids, joined)


def last(state: PyTree, ends: Bool[Array, "B"], axis: str) -> PyTree:
    """The state of the one shard per row that `ends` it, on all shards."""
    return jax.lax.psum(tree.where(ends, state, jax.tree.map(jnp.zeros_like, state)), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _affine(op: Callable, summarize: Callable, transition: str, axis: str, *inputs: PyTree) -> tuple[Array, PyTree]:
    return _forward(op, summarize, transition, axis, *inputs)[0]


def _forward(
    op: Callable,
    summarize: Callable,
    transition: str,
    axis: str,
    x: PyTree,
    state: PyTree | None,
    segment_ids: Array | None,
    joined: Array,
) -> tuple[tuple[Array, PyTree], tuple]:
    """Kept are what `op` keeps, which includes the state before this shard, and M."""
    M, U = summarize(x, segment_ids)
    M = tree.where(joined, M, jnp.zeros_like(M))
    first = jax.tree.map(jnp.zeros_like, U) if state is None else jax.tree.map(lambda s, u: s.astype(u.dtype), state, U)
    before = _carried(M, U, first, transition, axis)
    before = tree.where(joined, before, jax.tree.map(jnp.zeros_like, before))
    results, pullback = jax.vjp(lambda x, S: op(x, S, segment_ids), x, before)
    return results, (pullback, M, joined, state)


def _backward(
    op: Callable, summarize: Callable, transition: str, axis: str, kept: tuple, cotangents: tuple
) -> tuple[PyTree, PyTree, None, None]:
    pullback, M, joined, state = kept
    dy, dafter = cotangents

    def of_joined(dS: PyTree) -> PyTree:
        return tree.where(joined, dS, jax.tree.map(jnp.zeros_like, dS))

    own = of_joined(pullback((dy, dafter))[1])
    nothing = jax.tree.map(jnp.zeros_like, own)
    asked = _carried(M, own, nothing, f"{transition} transposed", axis, reverse=True)
    dx, dS = pullback((dy, jax.tree.map(lambda a, b: a + b.astype(a.dtype), dafter, asked)))
    if state is None:
        return dx, None, None, None
    dS = tree.where(jax.lax.axis_index(axis) == 0, of_joined(dS), nothing)
    return dx, jax.tree.map(lambda d, s: d.astype(s.dtype), dS, state), None, None


_affine.defvjp(_forward, _backward)


def _carried(M: Array, U: PyTree, first: PyTree, transition: str, axis: str, *, reverse: bool = False) -> PyTree:
    """S after all shards before this one (reversed: after it), where S ← M S + U from `first`."""
    rank, times = jax.lax.axis_index(axis), TRANSITIONS[transition]

    def shard(S: PyTree, x: tuple) -> tuple[PyTree, None]:
        j, M, U = x
        new = jax.tree.map(lambda s, u: times(M, s) + u, S, U)
        return tree.where(j > rank if reverse else j < rank, new, S), None

    shards = jnp.arange(jax.lax.axis_size(axis))
    M, U, first = tree.alike((M, U, first), rank)
    return jax.lax.scan(shard, first, tree.alike((shards, *_gathered((M, U), axis)), rank, M), reverse=reverse)[0]


def _gathered(arrays: PyTree, axis: str) -> PyTree:
    """The arrays [B,...] of all shards, [P,B,...], by one all-gather."""
    leaves, structure = jax.tree.flatten(arrays)
    flat = jnp.concatenate([a.reshape(a.shape[0], -1) for a in leaves], axis=1)
    ends = [sum(a[0].size for a in leaves[: i + 1]) for i in range(len(leaves) - 1)]
    every = jnp.split(jax.lax.all_gather(flat, axis), ends, axis=2)
    parts = [e.reshape(-1, *a.shape).astype(a.dtype) for e, a in zip(every, leaves, strict=True)]
    return jax.tree.unflatten(structure, parts)
