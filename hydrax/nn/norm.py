"""Layer, root-mean-square, L2 and sum normalisation, statistics in fp32; by XLA unless a model's `impl` is passed."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array
from hydrax.nn.param import param
from hydrax.ops import rowwise


def l2_norm(x: Array, *, eps: float = 1e-6, impl: str | None = "chunked") -> Array:
    """x / sqrt(Σ x² + eps) over the last axis, in the dtype of x."""
    return rowwise.rms_norm(x, mean=False, eps=eps, impl=impl)


def sum_norm(x: Array, *, eps: float = 1e-6) -> Array:
    """x / (Σ x + eps) over the last axis, for x >= 0, in the dtype of x."""
    y = fp32(x)
    return (y / (jnp.sum(y, axis=-1, keepdims=True) + eps)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMS normalisation over the last dimensions named by `shape`, with a learned weight, initially 1, if `affine`.

    With a gate, of the shape of x, the result is multiplied by act(gate) (arXiv 2307.08621). `offset` is what the
    parameter leaves of that weight: 1 for a weight 1 + w.
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        *,
        axes: tuple[str, ...],
        rngs: nnx.Rngs,
        eps: float = 1e-6,
        affine: bool = True,
        offset: float = 0.0,
    ):
        self.shape = (shape,) if isinstance(shape, int) else shape
        self.eps, self.offset = eps, offset
        self.weight = param(rngs, jax.nn.initializers.constant(1 - offset), self.shape, axes) if affine else None

    def __call__(
        self, x: Array, gate: Array | None = None, *, activation: str | None = "silu", impl: str | None = "chunked"
    ) -> Array:
        weight = None if self.weight is None else jnp.asarray(self.weight[...]) + self.offset
        n = len(self.shape)
        y, weight, gate = jax.tree.map(lambda a: a.reshape(*a.shape[: a.ndim - n], -1), (x, weight, gate))
        y = rowwise.rms_norm(y, weight, gate, activation=activation, eps=self.eps, impl=impl)
        return y.reshape(x.shape)


class LayerNorm(nnx.Module):
    """(x - μ) / sqrt(mean (x - μ)² + eps) ⊙ w + b, μ = mean x, over the last dimensions named by `shape`
    (arXiv 1607.06450); w is initially 1, b 0."""

    def __init__(self, shape: int | tuple[int, ...], *, axes: tuple[str, ...], rngs: nnx.Rngs, eps: float = 1e-6):
        self.shape = (shape,) if isinstance(shape, int) else shape
        self.eps = eps
        self.weight = param(rngs, jax.nn.initializers.ones, self.shape, axes)
        self.bias = param(rngs, jax.nn.initializers.zeros, self.shape, axes)

    def __call__(self, x: Array, *, impl: str | None = "chunked") -> Array:
        y = fp32(x).reshape(*x.shape[: x.ndim - len(self.shape)], -1)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = rowwise.rms_norm(y, jnp.asarray(self.weight[...]).reshape(-1), eps=self.eps, impl=impl)
        return (y.reshape(x.shape) + self.bias[...]).astype(x.dtype)


Norm = RMSNorm | LayerNorm

NORMS: dict[str, Callable[..., Norm]] = {
    "rmsnorm": RMSNorm,
    "rmsnorm1p": functools.partial(RMSNorm, offset=1.0),
    "srmsnorm": functools.partial(RMSNorm, affine=False),
    "layernorm": LayerNorm,
}
"""What a model may set its blocks' norms to: RMS with a learned weight w, with 1 + w, or without, or LayerNorm."""
