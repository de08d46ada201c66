"""Ulysses (arXiv 2309.14509): tokens divided over a mesh axis are exchanged for heads, and back.

    [B,T/P,H,...]  ->  [B,T,H/P,...]  ->  f  ->  [B,T,H/P,...]  ->  [B,T/P,H,...]

Exact for whatever works on each head by itself, also where states compose in no other way, since f sees whole rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax

from hydrax.core.typing import Array, PyTree


def exchange(f: Callable, *, axis: str, inputs: Sequence[str], outputs: Sequence[str]) -> Callable:
    """f of whole rows and some heads as a function of divided rows and all heads, inside a `jax.shard_map` over `axis`.

    Every input and output of f has a kind, a key of `KINDS`; each may be a pytree, or None. Rows are divided in the
    contiguous layout. f returns a tuple with as many entries as `outputs`.

        exchange(lambda q, k, v, ids: linear_attention(q, k, v, segment_ids=ids), axis="context",
                 inputs=("heads", "heads", "heads", "rows"), outputs=("heads", "state"))(q, k, v, ids)

    Raises:
      ValueError: a number of heads that the axis does not divide.
    """

    def entered(name: str, x: Array) -> Array:
        kind, shards = KINDS[name], jax.lax.axis_size(axis)
        if kind.heads is not None and x.shape[kind.heads] % shards:
            raise ValueError(f"{x.shape[kind.heads]} heads: expected a multiple of the {shards} devices along {axis!r}")
        return kind.enter(x, axis)

    def exchanged(*args: PyTree) -> tuple:
        args = tuple(jax.tree.map(lambda x, n=n: entered(n, x), tree) for n, tree in zip(inputs, args, strict=True))
        results = zip(outputs, f(*args), strict=True)
        return tuple(jax.tree.map(lambda x, n=n: KINDS[n].leave(x, axis), tree) for n, tree in results)

    return exchanged


def _part(x: Array, axis: str, dim: int) -> Array:
    """This device's part of what all have."""
    n = x.shape[dim] // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * n, n, dim)


def _all(x: Array, axis: str, dim: int, **to: str) -> Array:
    """The parts of all devices."""
    return jax.lax.all_gather(x, axis, axis=dim, tiled=True, **to)


def _swap(x: Array, axis: str, divide: int, join: int) -> Array:
    """Divided along another dimension."""
    return jax.lax.all_to_all(x, axis, divide, join, tiled=True)


@dataclasses.dataclass(frozen=True)
class Kind:
    """Arrays [B,L,H,...] of tokens and heads, or fewer of these dimensions.

    Attributes:
      heads: which dimension the heads are.
      enter, leave: how such an array gets to f, and comes back.
    """

    heads: int | None
    enter: Callable[[Array, str], Array]
    leave: Callable[[Array, str], Array]


def _whole(dim: int) -> Kind:
    """All of it is on all devices, with the heads along a dimension."""
    return Kind(dim, functools.partial(_part, dim=dim), functools.partial(_all, dim=dim, to="invarying"))


KINDS = {
    "heads": Kind(2, functools.partial(_swap, divide=2, join=1), functools.partial(_swap, divide=1, join=2)),
    "rows": Kind(None, functools.partial(_all, dim=1), functools.partial(_part, dim=1)),
    "state": _whole(1),
    "weights": _whole(0),
}
"""Values of every token and head [B,L,H,...]; of every token [B,L,...], such as segment ids; and, the same on all
devices, those of every row and head [B,H,...] and of every head [H,...]."""
