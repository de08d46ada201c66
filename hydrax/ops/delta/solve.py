"""The inverse of the unit lower triangular systems of the delta rule."""

import jax
import jax.numpy as jnp

from hydrax.core.numerics import einsum
from hydrax.core.typing import Array, Float

BASE = 8
"""Width of the diagonal blocks that are inverted row by row; wider ones are merged by matmuls."""


@jax.custom_vjp
def unit_lower_inverse(L: Float[Array, "... C C"]) -> Float[Array, "... C C"]:
    """X = (I + strict_tril L)^-1; only the strictly lower part of L is read.

    Forward substitution in small diagonal blocks, then doubling: the inverse of [[A, 0], [M, B]] is
    [[A^-1, 0], [-B^-1 M A^-1, B^-1]]. About C³/3 multiply-adds, and no powers of L: the Neumann product cancels
    numbers that exceed the result by many orders of magnitude when keys are correlated.
    """
    C = L.shape[-1]
    size = BASE
    while size < C:
        size *= 2
    L = jnp.pad(L, [(0, 0)] * (L.ndim - 2) + [(0, size - C)] * 2)  # zeros extend I + L by the identity
    X = _substitute(_diagonal_blocks(L, BASE))
    for width in (BASE << level for level in range((size // BASE).bit_length() - 1)):
        A, B = X[..., 0::2, :, :], X[..., 1::2, :, :]
        M = _diagonal_blocks(L, 2 * width)[..., width:, :width]
        merged = -einsum("...ij,...jk->...ik", B, einsum("...ij,...jk->...ik", M, A))
        X = jnp.block([[A, jnp.zeros_like(A)], [merged, B]])
    return X[..., 0, :C, :C]


def _substitute(L: Array) -> Array:
    """Row i of the inverse is e_i - Σ_{j<i} L_ij (row j)."""
    n = L.shape[-1]
    identity = jnp.eye(n, dtype=L.dtype)
    rows = [jnp.broadcast_to(identity[0], L.shape[:-1])]
    for i in range(1, n):
        rows.append(identity[i] - sum(L[..., i, j, None] * rows[j] for j in range(i)))
    return jnp.stack(rows, axis=-2)


def _diagonal_blocks(L: Array, width: int) -> Array:
    """[..., C, C] -> [..., C/width, width, width]."""
    n = L.shape[-1] // width
    blocks = L.reshape(*L.shape[:-2], n, width, n, width)
    return jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)


def _forward(L: Array) -> tuple[Array, Array]:
    X = unit_lower_inverse(L)
    return X, X


def _backward(X: Array, dX: Array) -> tuple[Array]:
    """dL = -strict_tril(Xᵀ dX Xᵀ)."""
    return (-jnp.tril(einsum("...ji,...jk,...lk->...il", X, dX, X), -1),)


unit_lower_inverse.defvjp(_forward, _backward)
