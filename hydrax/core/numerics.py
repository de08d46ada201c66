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


def bf16_factors(x: Array, y: Array) -> tuple[Array, Array]:
    """Factors in bf16, with longer last axes, whose products over these are those of fp32 x and y to about 2^-24.

    Three numbers of bf16 hold one of fp32; of their nine products the three smallest are left out. Tensor cores form
    six products of bf16 sooner than other units one of fp32. What is bf16 already is taken as it is.
    """
    pairs = [(a, b) for i, a in enumerate(_bf16_parts(x)) for j, b in enumerate(_bf16_parts(y)) if i + j < 3]
    left, right = zip(*pairs, strict=True)
    return jnp.concatenate(left, axis=-1), jnp.concatenate(right, axis=-1)


def _bf16_parts(x: Array) -> list[Array]:
    """x as a sum, the largest first."""
    parts: list[Array] = []
    for _ in range(1 if x.dtype == jnp.bfloat16 else 3):
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # XLA would drop a cast and its inverse
        parts, x = [*parts, part.astype(jnp.bfloat16)], x - part
    return parts


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of sums and states beside values of `dtype`: fp32, or fp64 where that is used (`jax_enable_x64`)."""
    return jnp.promote_types(dtype, jnp.float32)


def fp32(x: Array) -> Array:
    """`x` in fp32, or in fp64 if it has that already."""
    return x.astype(wide(x.dtype))


def clamp_decay(g: Array) -> Array:
    """g, at least `MIN_LOG_DECAY`; exact gradient 1 above it and 0 below."""
    return jnp.where(g < MIN_LOG_DECAY, MIN_LOG_DECAY, g)
