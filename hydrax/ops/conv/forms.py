"""The forms of `short_conv`: x [B,T,*C]; w [W,*C]; seg, valid [B,T]; tail [B,(W-1)d,*C], the inputs before token 0."""

import functools

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array
from hydrax.ops.layout import scan_tokens


def step(x: Array, valid: Array, w: Array, tail: Array, dilation: int = 1) -> tuple[Array, Array]:
    """One token: x [B,*C], valid [B]; returns y [B,*C] and the new tail, which padding leaves alone."""
    window = jnp.concatenate([tail, x[:, None]], axis=1)
    return (window[:, ::dilation] * w).sum(1), tree.where(valid != 0, window[:, 1:], tail)


def recurrent(x: Array, w: Array, seg: Array, valid: Array, tail: Array, dilation: int = 1) -> tuple[Array, Array]:
    """The definition: `step` over the tokens, in fp32, restarting where the document changes."""
    one = functools.partial(step, dilation=dilation)
    y, end = scan_tokens(lambda x, valid, tail: one(x, valid, fp32(w), tail), (x, valid), seg, fp32(tail))
    return y, end.astype(x.dtype)


def chunked(x: Array, w: Array, seg: Array, valid: Array, tail: Array, dilation: int = 1) -> tuple[Array, Array]:
    """W shifted multiply-adds; a tap that would reach into another document counts as zero."""
    T = x.shape[1]
    inputs, ids = _with_tail(x, seg, tail)
    starts = range(0, w.shape[0] * dilation, dilation)
    terms = [fp32(_masked(inputs[:, i : i + T], ids[:, i : i + T], seg)) * fp32(w[i // dilation]) for i in starts]
    return sum(terms[1:], terms[0]), final_state(x, seg, valid, tail)


def final_state(x: Array, seg: Array, valid: Array, tail: Array) -> Array:
    """As many inputs as the tail has, of which the last is that of the last real token; zeros before its document."""
    inputs, ids = _with_tail(x, seg, tail)
    last = valid.sum(1).astype(jnp.int32)

    def window(row: Array, start: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(row, start, tail.shape[1])

    return _masked(jax.vmap(window)(inputs, last), jax.vmap(window)(ids, last), seg[:, -1:])


def _with_tail(x: Array, seg: Array, tail: Array) -> tuple[Array, Array]:
    """Inputs and ids from the tail on, whose tokens belong to the document of token 0."""
    before = jnp.broadcast_to(seg[:, :1], tail.shape[:2])
    return jnp.concatenate([tail.astype(x.dtype), x], axis=1), jnp.concatenate([before, seg], axis=1)


def _masked(taken: Array, ids_taken: Array, ids_here: Array) -> Array:
    return tree.where(ids_taken == ids_here, taken, jnp.zeros_like(taken))
