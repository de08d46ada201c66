"""What a short convolution or a token shift sees of the tokens before its shard, inside a `jax.shard_map` over them."""

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.typing import Array, Float, Int
from hydrax.parallel import layout as layouts


def halo_left(
    x: Float[Array, "B L *C"],
    n: int,
    segment_ids: Int[Array, "B L"] | None = None,
    *,
    axis: str,
    layout: str = "contiguous",
    first: Float[Array, "B n *C"] | None = None,
) -> Float[Array, "R n *C"]:
    """The last n tokens before each slot of this shard, slots as rows (see `layout.cut`); gradients go back there.

    Tokens of another document than the slot's token 0 are zeros. The first slot of the row gets `first`, or zeros.

    Raises:
      ValueError: a slot has fewer tokens than that.
    """
    rank, last, ways = jax.lax.axis_index(axis), jax.lax.axis_size(axis) - 1, layouts.passes(layout)
    L = x.shape[1] // len(ways)
    if n > L:
        raise ValueError(f"{L} tokens per shard along {axis!r}: expected at least the {n} that the next one sees")
    if n == 0:
        return layouts.cut(x, layout)[:, :0]

    def before(x: Array) -> Array:
        """Slot i passes its end on along its pass, from whose last shard the next pass begins."""
        ends = layouts.cut(x, layout)[:, L - n :].reshape(x.shape[0], len(ways), n, *x.shape[2:])
        tails = []
        for i, way in enumerate(ways):
            tail = jax.lax.ppermute(ends[:, i], axis, [(j, j + way) for j in range(last + 1) if 0 <= j + way <= last])
            begins = rank == (0 if way == 1 else last)
            tails.append(jnp.where(begins, ends[:, i - 1], tail) if i else tail)
        return jnp.stack(tails, axis=1).reshape(-1, n, *x.shape[2:])

    tail = before(x)
    if segment_ids is not None:
        same = before(segment_ids) == layouts.cut(segment_ids, layout)[:, :1]
        tail = tree.where(same, tail, jnp.zeros_like(tail))
    if first is None:
        return tail
    starts = (rank == 0) & (jnp.arange(tail.shape[0]) % len(ways) == 0)
    return tree.where(starts, jnp.repeat(first.astype(x.dtype), len(ways), axis=0), tail)
