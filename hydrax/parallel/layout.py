"""Which tokens of a row each shard of a mesh axis holds.

A row of T tokens is cut into slots of equal length, in order, which are laid out in passes over the shards. Shard r of
P holds

    contiguous   slot r of P
    zigzag       slots r and 2P-1-r of 2P, which gives all shards the same number of causal pairs (arXiv 2407.21783)

Tokens, targets, positions and segment ids are laid out together, by `place`, before they are cut into shards. A shard
works on its slots as on rows of their own, by `cut`.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.core.typing import Array, ArrayLike, Int, PyTree

LAYOUTS: dict[str, tuple[int, ...]] = {"contiguous": (1,), "zigzag": (1, -1)}
"""Layout -> the directions of its passes, from the first shard to the last (1) or back (-1). A pass gives every shard
one slot, and the next begins on the shard where it ends."""

T_ = TypeVar("T_", bound=ArrayLike)


def passes(layout: str) -> tuple[int, ...]:
    """The directions of a layout's passes: as many as a shard has slots.

    Raises:
      ValueError: there is no such layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout = {layout!r}: expected one of {', '.join(LAYOUTS)}")
    return LAYOUTS[layout]


def slots(layout: str, rank: Any, shards: int) -> tuple:
    """The numbers of the slots that shard `rank` holds; the rank may be traced."""
    turns = (rank if way == 1 else shards - 1 - rank for way in passes(layout))
    return tuple(i * shards + turn for i, turn in enumerate(turns))


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
    if len(passes(layout)) == 1:
        return x
    return x[:, order(layout, shards, x.shape[1])]  # type: ignore[return-value]


def restore(x: T_, layout: str, shards: int) -> T_:
    """The inverse of `place`."""
    if len(passes(layout)) == 1:
        return x
    return x[:, np.argsort(order(layout, shards, x.shape[1]))]  # type: ignore[return-value]


def cut(x: PyTree, layout: str) -> PyTree:
    """A shard's arrays [B,L,...] with its N slots as rows: [B·N,L/N,...].

    Raises:
      ValueError: the slots would not have equal length.
    """
    N = len(passes(layout))
    return jax.tree.map(lambda a: a.reshape(a.shape[0] * N, _slot(layout, a.shape[1]), *a.shape[2:]), x)


def join(x: PyTree, layout: str) -> PyTree:
    """The inverse of `cut`."""
    N = len(passes(layout))
    return jax.tree.map(lambda a: a.reshape(a.shape[0] // N, N * a.shape[1], *a.shape[2:]), x)


def positions(layout: str, axis: str, length: int) -> Int[Array, "L"]:
    """Index in the row of every token of this shard, inside a `jax.shard_map` over `axis`."""
    held = slots(layout, jax.lax.axis_index(axis), jax.lax.axis_size(axis))
    n = _slot(layout, length)
    return jnp.concatenate([slot * n + jnp.arange(n, dtype=jnp.int32) for slot in held])


def _slot(layout: str, length: int) -> int:
    """Tokens of each slot of a shard that has so many."""
    N = len(passes(layout))
    if length % N:
        raise ValueError(f"{length} tokens per shard: expected a multiple of {N} for layout {layout!r}")
    return length // N
