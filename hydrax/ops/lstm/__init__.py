"""The LSTM (Hochreiter and Schmidhuber 1997, with forget gates), the recurrence that no scan can run in parallel.

    i, f, g, o = x_t + h_{t-1} W,      c_t = σ(f) ⊙ c_{t-1} + σ(i) ⊙ tanh g,      h_t = σ(o) ⊙ tanh c_t

for each head by itself. All forms take as many steps as there are tokens.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, Float, Int
from hydrax.ops import documents, layout
from hydrax.ops.dispatch import select

State = tuple[Array, Array]


def lstm(
    x: Float[Array, "B T H 4 V"],
    w: Float[Array, "H V 4 V"],
    *,
    initial_state: State | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], State]:
    """All h_t of the recurrence above, and the last (h, c).

    Args:
      x: what the inputs add to the four gates i, f, g, o.
      w: W, from h to the gates.
      initial_state: (h, c) before token 0, [B,H,V] each, of the document of token 0; zeros if None.
      segment_ids: documents; both restart at each change of id, and id 0 (right padding) leaves them alone.
      impl: "recurrent" (the definition), "chunked" (the same in segments, of which the backward pass keeps the states
        between them alone: O(T / C + C) of them), or None to choose.
      chunk_size: C, tokens per segment (128).

    Returns:
      h in the dtype of x, zero at padding, and the final (h, c) in fp32.

    Raises:
      ValueError: shapes that do not fit, or an unknown `impl`.
    """
    B, T, H, _, V = x.shape
    if w.shape != (H, V, 4, V):
        raise ValueError(f"x {x.shape}, w {w.shape}: expected [B,T,H,4,V] and [H,V,4,V]")
    seg, valid, _ = layout.at_padding(segment_ids)
    zeros = jnp.zeros_like(x, fp32(x).dtype, (B, H, V))
    state = (zeros, zeros) if initial_state is None else tuple(fp32(a) for a in initial_state)
    starts = jnp.zeros((B, T), bool) if seg is None else documents.changes(seg)
    real = jnp.ones((B, T), bool) if valid is None else valid
    form = select("lstm", impl, FORMS, "recurrent" if T == 1 else "chunked", x.shape)
    how = {"chunk_size": chunk_size} if chunk_size is not None and form is chunked else {}
    h, state = form(fp32(x), fp32(w), starts, real, state, **how)
    h = h.astype(x.dtype)
    return h if valid is None else h * valid[..., None, None], state


def step(w: Array, state: State, inputs: tuple[Array, Array, Array]) -> tuple[State, Array]:
    """One token: x [B,H,4,V], whether it starts a document, and whether it is real; returns the new (h, c) and h."""
    x, starts, real = inputs
    h, c = tree.where(starts, jax.tree.map(jnp.zeros_like, state), state)
    i, f, g, o = jnp.moveaxis(x + einsum("bhv,hvgw->bhgw", h, w), 2, 0)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return tree.where(real, (h, c), state), h


def recurrent(x: Array, w: Array, starts: Array, real: Array, state: State) -> tuple[Array, State]:
    """The definition: `step` over the tokens."""
    state, h = jax.lax.scan(functools.partial(step, w), state, layout.chunks_first((x, starts, real)))
    return jnp.moveaxis(h, 0, 1), state


def chunked(
    x: Array, w: Array, starts: Array, real: Array, state: State, *, chunk_size: int = 128
) -> tuple[Array, State]:
    """The same in segments of C tokens, each computed again in the backward pass (arXiv 1604.06174)."""
    T, C = x.shape[1], min(chunk_size, x.shape[1])

    def cut(a: Array) -> Array:
        a = jnp.pad(a, [(0, 0), (0, -T % C)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(a.shape[0], -1, C, *a.shape[2:])

    @jax.checkpoint
    def segment(state: State, inputs: tuple) -> tuple[State, Array]:
        x, starts, real = inputs
        h, state = recurrent(x, w, starts, real, state)
        return state, h

    state, h = jax.lax.scan(segment, state, layout.chunks_first(tuple(map(cut, (x, starts, real)))))
    return jnp.moveaxis(h, 0, 1).reshape(x.shape[0], -1, *h.shape[3:])[:, :T], state


FORMS: dict[str, Callable] = {"recurrent": recurrent, "chunked": chunked}
