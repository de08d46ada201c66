"""Small operations on pytrees of parameters."""

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
