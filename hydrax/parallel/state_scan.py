"""States of recurrences over rows whose tokens are divided over a mesh axis, inside a `jax.shard_map` over it.

What the tokens of a slot do to a state is affine, S_out = M S_in + U, where a slot is all that a shard has of a row, or
a part of it (see `layout`). Slots of the row in their order, s,

    S_in(s) = M_{s-1} S_in(s-1) + U_{s-1},        dS_out(s) = M_{s+1}ᵀ dS_out(s+1) + R_{s+1},

the second for the backward pass, where R is what a slot's own outputs ask of the state before it. M is a factor per
row of the state (none, scalar or vector decay) or a matrix (delta rules). Two ways to the sums, see `CARRIERS`: every
shard gathers (M, U) of all, which do not grow with its tokens, or the state alone goes from shard to shard.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.core import tree
from hydrax.core.numerics import einsum
from hydrax.core.typing import Array, Bool, PyTree
from hydrax.parallel import layout as layouts


def _scaled(M: Array, S: Array) -> Array:
    return M.reshape(*M.shape, *[1] * (S.ndim - M.ndim)) * S


TRANSITIONS: dict[str, Callable[[Array, Array], Array]] = {
    "diag": _scaled,
    "full": lambda M, S: einsum("bhij,bhjv->bhiv", M, S),
    "diag transposed": _scaled,
    "full transposed": lambda M, S: einsum("bhji,bhjv->bhiv", M, S),
}
"""M S of a transition: M [B,...] scales the leading dimensions of S, or is [B,H,K,K] for S [B,H,K,V]; and Mᵀ S."""


@dataclasses.dataclass(frozen=True)
class Chain:
    """How states go from slot to slot.

    Attributes:
      axis: mesh axis over which tokens are divided.
      transition: "diag" or "full", see `TRANSITIONS`.
      layout: which slots a shard has.
      carrier: a key of `CARRIERS`.
    """

    axis: str
    transition: str
    layout: str = "contiguous"
    carrier: str = "allgather_state"


def run(
    chain: Chain,
    op: Callable,
    summarize: Callable,
    x: PyTree,
    state: PyTree | None,
    segment_ids: Array | None,
    joined: Bool[Array, "R"],
) -> tuple[Array, PyTree]:
    """`op` of this shard's slots, each from the state that the slots before it leave: (y, state after each slot).

    Args:
      op: (x, state, segment_ids) -> (y, state). What it reads of the state may be any function of it.
      summarize: (x, segment_ids) -> (M, U); M is 0 where a document ends inside. U has the structure of the state.
      x: this shard's inputs, slots as rows (R = B·N, see `layout.cut`), all of them differentiated.
      state: before the row, B of them, the same on all shards; zeros if None.
      joined: whether token 0 continues the document of the slot before it; True on the first one.
    """
    x, state, segment_ids, joined = tree.alike((x, state, segment_ids, joined))
    return _affine(chain, op, summarize, x, state, segment_ids, joined)


def last(state: PyTree, ends: Bool[Array, "B N"], axis: str) -> PyTree:
    """The state [B·N,...] of the one slot per row that `ends` it, on all shards: [B,...]."""
    kept = tree.where(ends.reshape(-1), state, jax.tree.map(jnp.zeros_like, state))
    return jax.lax.psum(jax.tree.map(lambda a: a.reshape(*ends.shape, *a.shape[1:]).sum(1), kept), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _affine(chain: Chain, op: Callable, summarize: Callable, *inputs: PyTree) -> tuple[Array, PyTree]:
    return _forward(chain, op, summarize, *inputs)[0]


def _forward(
    chain: Chain,
    op: Callable,
    summarize: Callable,
    x: PyTree,
    state: PyTree | None,
    segment_ids: Array | None,
    joined: Array,
) -> tuple[tuple[Array, PyTree], tuple]:
    """Kept are what `op` keeps, which includes the state before each slot, and M."""
    M, U = summarize(x, segment_ids)
    M = tree.where(joined, M, jnp.zeros_like(M))
    N = len(layouts.passes(chain.layout))
    first = jax.tree.map(lambda u: jnp.zeros_like(u[::N]), U)
    if state is not None:
        first = jax.tree.map(lambda s, u: s.astype(u.dtype), state, U)
    before = _carried(chain, M, U, first)
    before = tree.where(joined, before, jax.tree.map(jnp.zeros_like, before))
    results, pullback = jax.vjp(lambda x, S: op(x, S, segment_ids), x, before)
    return results, (pullback, M, joined, state)


def _backward(
    chain: Chain, op: Callable, summarize: Callable, kept: tuple, cotangents: tuple
) -> tuple[PyTree, PyTree, None, None]:
    pullback, M, joined, state = kept
    dy, dafter = cotangents
    N = len(layouts.passes(chain.layout))

    def of_joined(dS: PyTree) -> PyTree:
        return tree.where(joined, dS, jax.tree.map(jnp.zeros_like, dS))

    # Of this first pullback only what leads to the state is computed: no one reads the rest, and the compiler drops it.
    own = of_joined(pullback((dy, dafter))[1])
    nothing = jax.tree.map(lambda a: jnp.zeros_like(a[::N]), own)
    asked = _carried(chain, M, own, nothing, reverse=True)
    dx, dS = pullback((dy, jax.tree.map(lambda a, b: a + b.astype(a.dtype), dafter, asked)))
    if state is None:
        return dx, None, None, None
    dS = tree.where(jax.lax.axis_index(chain.axis) == 0, jax.tree.map(lambda a: a[::N], of_joined(dS)), nothing)
    return dx, jax.tree.map(lambda d, s: d.astype(s.dtype), dS, state), None, None


_affine.defvjp(_forward, _backward)


def _carried(chain: Chain, M: Array, U: PyTree, first: PyTree, *, reverse: bool = False) -> PyTree:
    """S after all slots before each of this shard's (reversed: after it), where S ← M S + U from `first`, Mᵀ reversed.

    M and U are [B·N,...] and `first` is [B,...].
    """
    N = len(layouts.passes(chain.layout))
    times = TRANSITIONS[f"{chain.transition} transposed" if reverse else chain.transition]
    slots_first = lambda a: jnp.moveaxis(a.reshape(-1, N, *a.shape[1:]), 1, 0)  # noqa: E731
    M, U, first = tree.alike((M, U, first), jax.lax.axis_index(chain.axis))
    S = CARRIERS[chain.carrier](chain, times, *jax.tree.map(slots_first, (M, U)), first, reverse)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(-1, *a.shape[2:]), S)


def _after(times: Callable, M: Array, S: PyTree, U: PyTree) -> PyTree:
    """M S + U."""
    return jax.tree.map(lambda s, u: times(M, s) + u, S, U)


def _gather(chain: Chain, times: Callable, M: Array, U: PyTree, first: PyTree, reverse: bool) -> PyTree:
    """One all-gather of the (M, U) of all slots; every shard goes through them in the order of the row."""
    P, rank = jax.lax.axis_size(chain.axis), jax.lax.axis_index(chain.axis)
    own = jnp.stack(layouts.slots(chain.layout, rank, P))
    held = np.asarray([layouts.slots(chain.layout, r, P) for r in range(P)]).reshape(-1)
    in_order = lambda a: a.reshape(-1, *a.shape[2:])[np.argsort(held)]  # noqa: E731

    def slot(carry: tuple, x: tuple) -> tuple[tuple, None]:
        S, found = carry
        j, M, U = x
        found = tree.where(own == j, jax.tree.map(lambda s, f: jnp.broadcast_to(s, f.shape), S, found), found)
        return (_after(times, M, S, U), found), None

    every = jax.tree.map(in_order, _gathered((M, U), chain.axis))
    found = jax.tree.map(jnp.zeros_like, U)
    carry, xs = tree.alike(((first, found), (jnp.arange(len(held)), *every)), rank, M)
    return jax.lax.scan(slot, carry, xs, reverse=reverse)[0][1]


def _gathered(arrays: PyTree, axis: str) -> PyTree:
    """The arrays [N,B,...] of all shards, [P,N,B,...], by one all-gather."""
    leaves, structure = jax.tree.flatten(arrays)
    flat = jnp.concatenate([a.reshape(*a.shape[:2], -1) for a in leaves], axis=2)
    ends = [sum(a[0, 0].size for a in leaves[: i + 1]) for i in range(len(leaves) - 1)]
    every = jnp.split(jax.lax.all_gather(flat, axis), ends, axis=3)
    parts = [e.reshape(-1, *a.shape).astype(a.dtype) for e, a in zip(every, leaves, strict=True)]
    return jax.tree.unflatten(structure, parts)


def _pass_on(chain: Chain, times: Callable, M: Array, U: PyTree, first: PyTree, reverse: bool) -> PyTree:
    """From shard to shard, pass after pass; the next one begins where the last ended."""
    found, S = [], first
    passes = list(enumerate(layouts.passes(chain.layout)))
    for i, way in reversed(passes) if reverse else passes:
        m, u = M[i], jax.tree.map(lambda a, i=i: a[i], U)
        found.append(_along(chain.axis, times, m, u, S, -way if reverse else way))
        S = _after(times, m, found[-1], u)
    return jax.tree.map(lambda *slots: jnp.stack(slots), *(reversed(found) if reverse else found))


def _along(axis: str, times: Callable, M: Array, U: PyTree, S: PyTree, way: int) -> PyTree:
    """The state before every shard's slot, where S is that before the first in this direction."""
    P, rank = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    turn = rank if way == 1 else P - 1 - rank
    links = [(i, i + way) for i in range(P) if 0 <= i + way < P]

    def hop(S: PyTree, n: Array) -> tuple[PyTree, None]:
        new = jax.lax.ppermute(_after(times, M, S, U), axis, links)
        return tree.where(turn == n, new, S), None

    return jax.lax.scan(hop, tree.alike(S, rank, M), jnp.arange(1, P))[0]


CARRIERS: dict[str, Callable] = {"allgather_state": _gather, "ring_state": _pass_on}
"""LASP-2 (arXiv 2502.07563): P-1 summaries (M, U) reach every shard at once. LASP (2404.02882): P-1 hops, one after
another, of a state alone. (chain, M·, M [N,B,...], U, first [B,...], reverse) -> S before each slot [N,B,...]."""
