"""Small operations on pytrees."""

import jax
import jax.numpy as jnp

from hydrax.core.typing import PyTree


def count(tree: PyTree) -> int:
    """Number of elements in all leaves."""
    return sum(x.size for x in jax.tree.leaves(tree))


def nbytes(tree: PyTree) -> int:
    """Bytes of all leaves (arrays or `ShapeDtypeStruct`)."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def where(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where `condition` (scalar, or one per leading index) holds, else `old`, leaf by leaf."""

    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b)

    return jax.tree.map(choose, new, old)


def alike(arrays: PyTree, *others: PyTree) -> PyTree:
    """The arrays, of types that vary over all axes of a `jax.shard_map` over which one of them, or of the others, does.

    So do the zeros that are made like them. Scans and custom derivatives need equal types.
    """

    def axes(x: jax.Array) -> frozenset:
        return jax.typeof(x).manual_axis_type.varying

    union = frozenset().union(*map(axes, jax.tree.leaves((arrays, others))))
    return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(sorted(union - axes(x))), to="varying"), arrays)
