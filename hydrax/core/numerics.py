"""Numerical habits used everywhere: fp32 accumulation, bounded log-decays."""

import jax
import jax.numpy as jnp

from hydrax.core.typing import Array

MIN_LOG_DECAY = -50.0
"""Log-decays are clamped here before a cumulative sum: e^-50 is zero beside 1 in fp32, and sums keep their digits."""


def einsum(spec: str, *operands: Array) -> Array:
    """`jnp.einsum` with an fp32 result. fp32 operands are multiplied in full fp32 (never TF32), bf16 ones as is."""
    dtype = jnp.result_type(*operands)
    if dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        dtype = jnp.dtype(jnp.float32)  # the same products; XLA refuses some layouts of BF16 x BF16 = F32 on CPUs
    precision = jax.lax.Precision.HIGHEST if dtype in (jnp.float32, jnp.float64) else None
    operands = tuple(x.astype(dtype) for x in operands)
    return jnp.einsum(spec, *operands, precision=precision, preferred_element_type=wide(dtype))


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of sums and states beside values of `dtype`: fp32, or fp64 where that is used (`jax_enable_x64`)."""
    return jnp.promote_types(dtype, jnp.float32)


def fp32(x: Array) -> Array:
    """`x` in fp32, or in fp64 if it has that already."""
    return x.astype(wide(x.dtype))


def clamp_decay(g: Array) -> Array:
    """g, at least `MIN_LOG_DECAY`; exact gradient 1 above it and 0 below."""
    return jnp.where(g < MIN_LOG_DECAY, MIN_LOG_DECAY, g)
