"""Token embedding and the projection to logits."""

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.numerics import einsum
from hydrax.core.typing import Array, Float, Int
from hydrax.nn.param import param

PADDED_LOGIT = -1e30
"""Logit of the rows that only round the vocabulary up."""


class Embedding(nnx.Module):
    """A table [rows, D], N(0, 0.02²) at first; rows = the vocabulary rounded up to a multiple of 128."""

    def __init__(self, vocabulary: int, d_model: int, *, rngs: nnx.Rngs):
        self.vocabulary = vocabulary
        rows = -(-vocabulary // 128) * 128
        init = jax.nn.initializers.normal(0.02)
        self.weight = param(rngs, init, (rows, d_model), ("vocab", "embed"), cast=True)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.weight[...][tokens]

    def logits(self, x: Array, softcap: float | None = None) -> Array:
        """fp32 logits x·Wᵀ [..., rows], soft-capped to c·tanh(z/c); those of rows beyond the vocabulary are masked."""
        z = einsum("...d,vd->...v", x, self.weight[...].astype(x.dtype))
        if softcap is not None:
            z = softcap * jnp.tanh(z / softcap)
        return jnp.where(jnp.arange(z.shape[-1]) < self.vocabulary, z, PADDED_LOGIT)
