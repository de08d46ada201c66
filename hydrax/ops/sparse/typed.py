"""Lifetimes by type (NAtS, arXiv 2502.13251): a key is global, local or sliding.

    global     for ever
    local      up to and with the next global key of its head, in its document
    sliding    for the `sliding` tokens after it

How much a type would be worth is asked of weights without types: with P̃_tj = e^{z_tj - lse_t}, lse over all j <= t, and
M_tj = P̃_tj (do_t·v_j - do_t·o_t), the derivative of a mask of its own at (t, j) times the share of what is visible,

    d global_j = Σ_{t > n_j} M_tj,     d local_j = Σ_{t <= n_j} M_tj,     d sliding_j = Σ_{t <= j + sliding} M_tj

where n_j is the next global key after j: up to there a global key is seen in either case. Such sums over the queries of
a range are derivatives by the values of keys that live as long: Σ_t P̃_tj do_t by v_j, and Σ_t P̃_tj do_t·o_t by a value
1 beside it. (By a bias of keys they would not be: a soft-cap bends that.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float, Int
from hydrax.ops.sparse.lifetimes import FOREVER

GLOBAL, LOCAL, SLIDING = range(3)

OPEN = FOREVER - 1
"""End of a local key that no global one has followed yet."""


def next_global(
    kinds: Int[Array, "B T G"], positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]
) -> tuple[Int[Array, "B T G"], Int[Array, "B T"]]:
    """n_j, the position of the next global key after each one, OPEN if its document has none; and of its last token."""
    T = kinds.shape[1]
    index = jnp.arange(T, dtype=jnp.int32)[None]
    real = segment_ids != 0

    def following(where: Array, shift: int) -> Array:
        """Index of the next place, from the own one or the one after it; T if there is none."""
        places = jnp.pad(jnp.where(where, index, T), ((0, 0), (0, shift)), constant_values=T)[:, shift:]
        return jax.lax.cummin(places, axis=1, reverse=True)

    def position(i: Array) -> Array:
        there = jnp.minimum(i, T - 1)
        document, place = (jnp.take_along_axis(x, there, axis=1) for x in (segment_ids, positions))
        return jnp.where((i < T) & (document == segment_ids), place, OPEN)

    after = jax.vmap(lambda k: position(following((k == GLOBAL) & real, 1)), 2, 2)(kinds)
    ends_here = jnp.concatenate([segment_ids[:, 1:] != segment_ids[:, :-1], jnp.ones_like(real[:, :1])], axis=1)
    return after, position(following(ends_here, 0))


def typed_ends(
    kinds: Int[Array, "B T G"], positions: Int[Array, "B T"], following: Int[Array, "B T G"], sliding: int
) -> Int[Array, "B T G"]:
    """Ends of keys of these types, for `lifetime_attention`; `following` are the n_j of `next_global`."""
    p = positions[..., None]
    return jnp.where(kinds == GLOBAL, FOREVER, jnp.where(kinds == LOCAL, following, p + sliding))


def worth(
    attend: Callable[..., tuple[Array, Array]],
    v: Float[Array, "B T G V"],
    o: Float[Array, "B T H V"],
    do: Float[Array, "B T H V"],
    following: Int[Array, "B T G"],
    sliding: int,
) -> Float[Array, "B T G 3"]:
    """The derivatives above.

    Args:
      attend: (values, ends=, window=) -> (o, lse) of the same queries and keys.
      v, o, do: values, the outputs under the types, and their cotangent.
    """
    o, do, v = fp32(o), fp32(do), jnp.pad(fp32(v), [(0, 0)] * 3 + [(0, 1)], constant_values=1)

    def shares(everything: Array, up_to_next: Array, near: Array) -> tuple[Array, Array, Array]:
        full, lse = attend(everything)
        # The same lse for all three: a row that sees nothing counts for nothing.
        norm = jnp.where(lse == -jnp.inf, 0, lse)

        def part(got: Array, lse: Array) -> Array:
            return jnp.exp(lse - norm)[..., None] * got

        next_part = part(*attend(up_to_next, ends=following))
        return part(full, lse), next_part, part(*attend(near, window=sliding + 1))

    pull = jnp.concatenate([do, -jnp.sum(do * o, axis=-1, keepdims=True)], axis=-1)
    everything, up_to_next, near = ((d * v).sum(-1) for d in jax.vjp(shares, v, v, v)[1]((pull, pull, pull)))
    return jnp.stack([everything - up_to_next, up_to_next, near], axis=-1)
