"""Long rows span by span: what lives from the forward to the backward pass of an op is its inputs and a few states.

An op in chunks needs, for every chunk, its score matrix and the state before it: more than its inputs. Here a
`lax.scan` forms them for one span of chunks at a time, in both directions, and keeps the state before each span. So
peak memory grows with the inputs alone, by far less than a [T,K,V] tensor, and time per token does not grow with T.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core.typing import Array, PyTree

SPAN = 8192
"""Tokens of a row that a form handles at once: enough to fill a GPU from one row."""
SPANS = {"cpu": 2048}
"""The same for backends that want another number; CPUs keep that much in their caches."""

Arrays = tuple[Array | None, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def over_spans(forward: Callable, backward: Callable, x: Arrays, facts: Arrays, state: PyTree) -> tuple[PyTree, PyTree]:
    """(y, final state) of `forward` over the chunks of `x` and `facts`, with `backward` as its derivative.

    Args:
      forward: (x, facts, state) -> (y, state, saved) of one span; `saved` is kept for the backward pass.
      backward: (x, facts, state, saved, dy, dstate) -> (dx, dstate), the vector-Jacobian product of that span;
        `state` is the one before it.
      x: arrays [B,N,C,...] that are differentiated, from `split_chunks`.
      facts: arrays [B,N,...] that are not (documents).
      state: what one span hands to the next.
    """
    return _forward(forward, backward, x, facts, state)[0]


def split_chunks(x: Array, C: int) -> Array:
    """[B,T,...] -> [B,N,C,...], the tail filled with zeros (ids with their last value): both leave the state alone."""
    N = -(-x.shape[1] // C)
    N += -N % _spans(N, C)
    pad = [(0, 0), (0, N * C - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad, mode="edge" if jnp.issubdtype(x.dtype, jnp.integer) else "constant")
    return x.reshape(x.shape[0], N, C, *x.shape[2:])


def join_chunks(x: Array, T: int) -> Array:
    """[B,N,C,...] -> [B,T,...], the inverse of `split_chunks`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


def _spans(N: int, C: int) -> int:
    """Into how many spans N chunks of C tokens are cut."""
    return -(-N * C // SPANS.get(jax.default_backend(), SPAN))


def _forward(
    forward: Callable, backward: Callable, x: Arrays, facts: Arrays, state: PyTree
) -> tuple[tuple[PyTree, PyTree], tuple]:
    def body(state: PyTree, inputs: tuple) -> tuple[PyTree, tuple]:
        y, new, saved = forward(*inputs, state)
        return new, (y, state, saved)

    n = _spans(*jax.tree.leaves(x)[0].shape[1:3])
    final, (y, before, saved) = _scan(body, state, _cut((x, facts), n))
    return (_join(y), final), (x, facts, before, saved)


def _backward(forward: Callable, backward: Callable, kept: tuple, cotangents: tuple) -> tuple:
    x, facts, before, saved = kept
    dy, dstate = cotangents

    def body(dstate: PyTree, inputs: tuple) -> tuple[PyTree, PyTree]:
        (x, facts, dy), before, saved = inputs
        dx, dstate = backward(x, facts, before, saved, dy, dstate)
        return dstate, dx

    # Without a loop around them, both passes would share what they compute, and keep all of it in between.
    x, facts, before, saved, dy, dstate = jax.lax.optimization_barrier((x, facts, before, saved, dy, dstate))
    n = _spans(*jax.tree.leaves(x)[0].shape[1:3])
    dstate, dx = _scan(body, dstate, (_cut((x, facts, dy), n), before, saved), reverse=True)
    return _join(dx), None, dstate


over_spans.defvjp(_forward, _backward)


def _scan(body: Callable, carry: PyTree, xs: Any, *, reverse: bool = False) -> tuple[PyTree, PyTree]:
    """`lax.scan`, without a loop where there is one span."""
    return jax.lax.scan(body, carry, xs, reverse=reverse, unroll=jax.tree.leaves(xs)[0].shape[0] == 1)


def _cut(tree: PyTree, n: int) -> PyTree:
    """[B,N,...] -> [n,B,N/n,...]."""
    return jax.tree.map(lambda a: jnp.moveaxis(a.reshape(a.shape[0], n, -1, *a.shape[2:]), 1, 0), tree)


def _join(tree: PyTree) -> PyTree:
    """The inverse of `_cut`."""
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:]), tree)
