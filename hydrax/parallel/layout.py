"""Which tokens of a row each shard of a mesh axis holds.

A row of T tokens is cut into slots of equal length, in order. Shard r of P holds

    contiguous   slot r of P
    zigzag       slots r and 2P-1-r of 2P, which gives all shards the same number of causal pairs (arXiv 2407.21783)

Tokens, targets, positions and segment ids are laid out together, by `place`, before they are cut into shards.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.core.typing import Array, ArrayLike, Int

LAYOUTS: dict[str, Callable[[Any, int], tuple]] = {
    "contiguous": lambda rank, shards: (rank,),
    "zigzag": lambda rank, shards: (rank, 2 * shards - 1 - rank),
}
"""Layout -> (rank, shards) -> the slots of that shard, in the order of the row."""

T_ = TypeVar("T_", bound=ArrayLike)


def slots(layout: str, rank: Any, shards: int) -> tuple:
    """The numbers of the slots that shard `rank` holds; the rank may be traced.

    Raises:
      ValueError: there is no such layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout = {layout!r}: expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[layout](rank, shards)


def order(layout: str, shards: int, tokens: int) -> np.ndarray:
    """Index in the row of every token as the shards hold them, shard after shard: int32 [T].

    Raises:
      ValueError: there is no such layout, or the slots would not have equal length.
    """
    held = np.asarray([slots(layout, rank, shards) for rank in range(shards)]).reshape(-1)
    if tokens % held.size:
        raise ValueError(f"{tokens} tokens: expected a multiple of {held.size} for {shards} shards, layout {layout!r}")
    return np.arange(tokens, dtype=np.int32).reshape(held.size, -1)[held].reshape(-1)


def place(x: T_, layout: str, shards: int) -> T_:
    """x [B,T,...] in the order in which the shards hold it."""
    return x[:, order(layout, shards, x.shape[1])]  # type: ignore[return-value]


def restore(x: T_, layout: str, shards: int) -> T_:
    """The inverse of `place`."""
    return x[:, np.argsort(order(layout, shards, x.shape[1]))]  # type: ignore[return-value]


def positions(layout: str, axis: str, length: int) -> Int[Array, "L"]:
    """Index in the row of every token of this shard, inside a `jax.shard_map` over `axis`."""
    shards = jax.lax.axis_size(axis)
    held = slots(layout, jax.lax.axis_index(axis), shards)
    if length % len(held):
        raise ValueError(f"{length} tokens per shard: expected a multiple of {len(held)} for layout {layout!r}")
    n = length // len(held)
    return jnp.concatenate([slot * n + jnp.arange(n, dtype=jnp.int32) for slot in held])
