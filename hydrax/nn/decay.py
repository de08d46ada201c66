"""The learned scalar decay of Mamba-2 and the gated delta rule."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array
from hydrax.nn.param import Init, param

DT_RANGE = (1e-3, 1e-1)
"""Step sizes at initialisation are log-uniform in this range."""


MAX_LOG_RATE = 20.0
"""Bound on A_log: e^20 forgets everything in one step of 1e-7, and larger rates would overflow in gradients."""


class StepDecay(nnx.Module):
    """Δ = softplus(a + b_dt) and the log-decay g = -A Δ per head, from a [...,H], in fp32; A = exp(A_log).

    A is initialised uniformly in `rates`, b_dt so that softplus(b_dt) is log-uniform in `DT_RANGE` (arXiv 2405.21060).
    """

    def __init__(self, heads: int, *, rates: tuple[float, float], rngs: nnx.Rngs):
        self.A_log = param(rngs, _log_uniform_rates(*rates), (heads,), ("heads",))
        self.dt_bias = param(rngs, _inverse_softplus_steps, (heads,), ("heads",))

    def __call__(self, a: Array) -> tuple[Array, Array]:
        dt = jax.nn.softplus(fp32(a) + self.dt_bias[...])
        A = jnp.exp(jnp.minimum(self.A_log[...], MAX_LOG_RATE))
        return -A * dt, dt


def _log_uniform_rates(low: float, high: float) -> Init:
    return lambda key, shape, dtype: jnp.log(jax.random.uniform(key, shape, dtype, low, high))


def _inverse_softplus_steps(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    low, high = map(math.log, DT_RANGE)
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return dt + jnp.log(-jnp.expm1(-dt))
