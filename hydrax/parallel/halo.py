"""What a short convolution or a token shift sees of the tokens before its shard, inside a `jax.shard_map` over them."""

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.typing import Array, Float, Int


def halo_left(
    x: Float[Array, "B L *C"],
    n: int,
    segment_ids: Int[Array, "B L"] | None = None,
    *,
    axis: str,
    first: Float[Array, "B n *C"] | None = None,
) -> Float[Array, "B n *C"]:
    """The last n tokens of the shard before this one; their gradients go back there.

    Tokens of another document than this shard's token 0 are zeros. The first shard gets `first`, or zeros.

    Raises:
      ValueError: a shard has fewer tokens than that.
    """
    L, shards = x.shape[1], jax.lax.axis_size(axis)
    if n > L:
        raise ValueError(f"{L} tokens per shard along {axis!r}: expected at least the {n} that the next one sees")
    if n == 0:
        return x[:, :0]

    def passed(x: Array) -> Array:
        return jax.lax.ppermute(x[:, L - n :], axis, [(i, i + 1) for i in range(shards - 1)])

    tail = passed(x)
    if segment_ids is not None:
        tail = tree.where(passed(segment_ids) == segment_ids[:, :1], tail, jnp.zeros_like(tail))
    return tail if first is None else tree.where(jax.lax.axis_index(axis) == 0, first.astype(x.dtype), tail)
