"""The learned decays of Mamba-2 and the gated delta rule: per head, or per head and key channel."""

import math
from typing import Literal

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
    """Δ = max(softplus(a + b_dt), dt_min) and the log-decay g = -A Δ, in fp32; A = exp(A_log) per head.

    Δ and g have a value per head for a [...,H], or with `key_dim` per key channel for a [...,H,K]. A is initialised
    uniformly in `rates`, b_dt so that softplus(b_dt) is log-uniform in `DT_RANGE` (arXiv 2405.21060), or as ones.
    """

    def __init__(
        self,
        heads: int,
        key_dim: int | None = None,
        *,
        rates: tuple[float, float],
        dt_init: Literal["steps", "ones"] = "steps",
        dt_min: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.dt_min = dt_min
        bias = {"steps": inverse_softplus_steps, "ones": jax.nn.initializers.ones}[dt_init]
        self.A_log = param(rngs, _log_uniform_rates(*rates), (heads,), ("heads",))
        self.dt_bias = param(rngs, bias, *_shape(heads, key_dim))

    def __call__(self, a: Array) -> tuple[Array, Array]:
        dt = jnp.maximum(jax.nn.softplus(fp32(a) + self.dt_bias[...]), self.dt_min)
        return -_rates(self.A_log, self.dt_bias) * dt, dt


class BoundedDecay(nnx.Module):
    """Δ = σ(A (a + b_dt)) and the log-decay g = ℓ Δ in (ℓ, 0), in fp32 (arXiv 2510.26692); A = exp(A_log), initially 1.

    b_dt is initialised as that of `StepDecay`, and what σ(b_dt) then is differs little from softplus(b_dt).
    """

    def __init__(self, heads: int, key_dim: int | None = None, *, lower_limit: float, rngs: nnx.Rngs):
        self.lower_limit = lower_limit
        self.A_log = param(rngs, jax.nn.initializers.zeros, (heads,), ("heads",))
        self.dt_bias = param(rngs, inverse_softplus_steps, *_shape(heads, key_dim))

    def __call__(self, a: Array) -> tuple[Array, Array]:
        dt = jax.nn.sigmoid(_rates(self.A_log, self.dt_bias) * (fp32(a) + self.dt_bias[...]))
        return self.lower_limit * dt, dt


def _shape(heads: int, key_dim: int | None) -> tuple[tuple[int, ...], tuple[str, ...]]:
    return ((heads,), ("heads",)) if key_dim is None else ((heads, key_dim), ("heads", "state_k"))


def _rates(A_log: nnx.Param, dt_bias: nnx.Param) -> Array:
    """A, with an axis over key channels if b_dt has one."""
    A = jnp.exp(jnp.minimum(A_log[...], MAX_LOG_RATE))
    return A.reshape(A.shape + (1,) * (dt_bias[...].ndim - A.ndim))


def _log_uniform_rates(low: float, high: float) -> Init:
    return lambda key, shape, dtype: jnp.log(jax.random.uniform(key, shape, dtype, low, high))


def inverse_softplus_steps(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    low, high = map(math.log, DT_RANGE)
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return dt + jnp.log(-jnp.expm1(-dt))
