"""Activations and their derivatives, in what Pallas lowers on GPUs."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from hydrax.core.typing import Array

Pair = tuple[Callable[[Array], Array], Callable[[Array], Array]]

_C, _A = math.sqrt(2 / math.pi), 0.044715
"""Of the tanh approximation of gelu: tanh(C (z + A z³))."""


def _silu_derivative(z: Array) -> Array:
    s = jax.nn.sigmoid(z)
    return s * (1 + z * (1 - s))


def _sigmoid_derivative(z: Array) -> Array:
    s = jax.nn.sigmoid(z)
    return s * (1 - s)


def _tanh(z: Array) -> Array:
    return jnp.tanh(_C * z * (1 + _A * z * z))


def _gelu_derivative(z: Array) -> Array:
    t = _tanh(z)
    return 0.5 * (1 + t) + 0.5 * _C * z * (1 - t * t) * (1 + 3 * _A * z * z)


def _elu1(z: Array, above: Array) -> Array:
    return jnp.where(z > 0, above, jnp.exp(jnp.minimum(z, 0.0)))


ACTIVATIONS: dict[str | None, Pair] = {
    None: (lambda z: z, jnp.ones_like),
    "silu": (lambda z: z * jax.nn.sigmoid(z), _silu_derivative),
    "sigmoid": (jax.nn.sigmoid, _sigmoid_derivative),
    "relu": (lambda z: jnp.maximum(z, 0.0), lambda z: jnp.where(z > 0, jnp.ones_like(z), jnp.zeros_like(z))),
    "gelu": (lambda z: 0.5 * z * (1 + _tanh(z)), _gelu_derivative),
    "elu1": (lambda z: _elu1(z, z + 1), lambda z: _elu1(z, jnp.ones_like(z))),
}
