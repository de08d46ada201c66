"""Token embedding and the projection to logits."""

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.numerics import einsum
from hydrax.core.typing import Array, Float, Int
from hydrax.nn.param import param
from hydrax.parallel.rules import constrain

PADDED_LOGIT = -1e30
"""Logit of the rows that only round the vocabulary up."""

FEW_ROWS = 1024
"""Up to so many rows of a table the gradient is a product with one-hot tokens, where devices add rows by atomics."""


class Embedding(nnx.Module):
    """A table [rows, D], N(0, 0.02²) at first; rows = the vocabulary rounded up to a multiple of 128."""

    def __init__(self, vocabulary: int, d_model: int, *, rngs: nnx.Rngs):
        self.vocabulary = vocabulary
        rows = -(-vocabulary // 128) * 128
        init = jax.nn.initializers.normal(0.02)
        self.weight = param(rngs, init, (rows, d_model), ("vocab", "embed"), cast=True)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        # Devices gather whole columns of the table before they look up their tokens: the compiler would gather these.
        return _rows(constrain(self.weight[...], ("vocab", "act_embed")), constrain(tokens, ("batch", "seq")))

    def logits(self, x: Array, softcap: float | None = None) -> Array:
        """fp32 logits x·Wᵀ [..., rows], soft-capped to c·tanh(z/c); those of rows beyond the vocabulary are masked."""
        z = _products(x, self.weight[...].astype(x.dtype))
        if softcap is not None:
            z = softcap * jnp.tanh(z / softcap)
        if z.shape[-1] == self.vocabulary:
            return z
        return jnp.where(jnp.arange(z.shape[-1]) < self.vocabulary, z, PADDED_LOGIT)


@jax.custom_vjp
def _rows(table: Float[Array, "V D"], tokens: Int[Array, "..."]) -> Float[Array, "... D"]:
    """table[tokens]; accelerators would add the gradients of colliding tokens slowly, and in no fixed order."""
    return table[tokens]


def _rows_forward(table: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    return table[tokens], (table, tokens)


def _rows_backward(inputs: tuple[Array, Array], dx: Array) -> tuple[Array, None]:
    table, tokens = inputs
    if table.shape[0] > FEW_ROWS or jax.default_backend() == "cpu":
        return jnp.zeros_like(table).at[tokens].add(dx), None
    one_hot = jax.nn.one_hot(tokens, table.shape[0], dtype=dx.dtype)
    return einsum("...v,...d->vd", one_hot, dx).astype(table.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


@jax.custom_vjp
def _products(x: Float[Array, "... D"], table: Float[Array, "V D"]) -> Float[Array, "... V"]:
    """x·tableᵀ in fp32. Its cotangent is rounded to the dtype of x: matrix products of fp32 take twice the time."""
    return einsum("...d,vd->...v", x, table)


def _forward(x: Array, table: Array) -> tuple[Array, tuple[Array, Array]]:
    return _products(x, table), (x, table)


def _backward(inputs: tuple[Array, Array], dz: Array) -> tuple[Array, Array]:
    x, table = inputs
    dz = dz.astype(x.dtype)
    dx, dtable = einsum("...v,vd->...d", dz, table), einsum("...v,...d->vd", dz, x)
    return dx.astype(x.dtype), dtable.astype(table.dtype)


_products.defvjp(_forward, _backward)
