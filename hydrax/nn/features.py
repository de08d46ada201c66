"""Feature maps of linear attention: φ(q)·φ(k) takes the place of exp(q·k). What is learned is shared by the heads."""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hydrax.core.build import Check
from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array
from hydrax.nn.param import Init, param

Map = Callable[[Array], Array]

DPFP_ROLLS = 4
"""ν of arXiv 2102.11174: how many products with shifted copies DPFP takes."""

SMALLEST_SUM = 1e-10
"""Added to Σ φ(q)·φ(k): where a query meets none of the keys, the output is 0."""


@dataclasses.dataclass(frozen=True)
class FeatureMap:
    """A line of the table of feature maps.

    Attributes:
      make: (K, rngs) -> φ, [...,K] -> [...,width(K)] in the dtype of its argument.
      width: features of K channels.
      nonnegative: φ(q)·φ(k) >= 0 for all q and k, so that a sum of them may divide.
      matrices: learned K x K matrices in φ.
    """

    make: Callable[[int, nnx.Rngs], Map]
    width: Callable[[int], int] = lambda K: K
    nonnegative: bool = False
    matrices: int = 0


def fixed(f: Map) -> Callable[[int, nnx.Rngs], Map]:
    """A map without parameters."""
    return lambda K, rngs: f


def identity(x: Array) -> Array:
    return x


def elu1(x: Array) -> Array:
    """elu(x) + 1, as e^x below 0, where 1 + (e^x - 1) would lose it (arXiv 2006.16236)."""
    y = fp32(x)
    return jnp.where(y >= 0, y + 1, jnp.exp(jnp.minimum(y, 0))).astype(x.dtype)


def dpfp(x: Array) -> Array:
    """x' ⊙ roll(x', j) for j = 1 .. ν, with x' = [relu x, relu -x] (arXiv 2102.11174)."""
    halves = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
    return jnp.concatenate([halves * jnp.roll(halves, j, axis=-1) for j in range(1, DPFP_ROLLS + 1)], axis=-1)


def taylor2(x: Array) -> Array:
    """[1, x / K^¼, x_i² / (2K)^½, x_i x_j / K^½ for i < j], so that φ(q)·φ(k) = 1 + s + s²/2 >= ½ for s = K^-½ q·k.

    Papers: 2402.18668, 2510.11602. A product of two channels is one feature, which counts for both orders.
    """
    y = fp32(x) * x.shape[-1] ** -0.25
    i, j = np.triu_indices(x.shape[-1])
    pairs = y[..., i] * y[..., j] * np.where(i == j, 0.5**0.5, 1).astype(y.dtype)
    return jnp.concatenate([jnp.ones_like(y[..., :1]), y, pairs], axis=-1).astype(x.dtype)


def taylor2_width(K: int) -> int:
    """1 + K + K (K + 1) / 2."""
    return 1 + K + K * (K + 1) // 2


class Affine(nnx.Module):
    """x W (+ b) over the last axis, in fp32; small and of a meaningful scale: no weight decay, left to Adam."""

    def __init__(self, K: int, *, init: Init, bias: bool, rngs: nnx.Rngs):
        self.weight = param(rngs, init, (K, K), ("state_k", "feature"), cast=True)
        self.bias = param(rngs, jax.nn.initializers.zeros, (K,), ("feature",)) if bias else None

    def __call__(self, x: Array) -> Array:
        y = einsum("...k,kf->...f", x, self.weight[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...]


class Hadamard(nnx.Module):
    """(W₁x + b₁) ⊙ (W₂x + b₂)."""

    def __init__(self, K: int, rngs: nnx.Rngs):
        self.left, self.right = (Affine(K, init=_unit_variance, bias=True, rngs=rngs) for _ in range(2))

    def __call__(self, x: Array) -> Array:
        return (self.left(x) * self.right(x)).astype(x.dtype)


class Hedgehog(nnx.Module):
    """softmax [2(Wx + b), -2(Wx + b)], W = I and b = 0 at first (arXiv 2402.04347)."""

    def __init__(self, K: int, rngs: nnx.Rngs):
        self.map = Affine(K, init=_eye, bias=True, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = 2 * self.map(x)
        return jax.nn.softmax(jnp.concatenate([y, -y], axis=-1)).astype(x.dtype)


class T2R(nnx.Module):
    """relu(Wx) (arXiv 2103.13076)."""

    def __init__(self, K: int, rngs: nnx.Rngs):
        self.map = Affine(K, init=_unit_variance, bias=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(self.map(x)).astype(x.dtype)


_unit_variance = jax.nn.initializers.lecun_normal()


def _eye(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jnp.eye(shape[0], dtype=dtype)


TABLE: dict[str, FeatureMap] = {
    "dpfp": FeatureMap(fixed(dpfp), width=lambda K: 2 * DPFP_ROLLS * K, nonnegative=True),
    "elu1": FeatureMap(fixed(elu1), nonnegative=True),
    "hadamard": FeatureMap(Hadamard, matrices=2),
    "hedgehog": FeatureMap(Hedgehog, width=lambda K: 2 * K, nonnegative=True, matrices=1),
    "identity": FeatureMap(fixed(identity)),
    "relu": FeatureMap(fixed(jax.nn.relu), nonnegative=True),
    "t2r": FeatureMap(T2R, nonnegative=True, matrices=1),
    "taylor2": FeatureMap(fixed(taylor2), width=taylor2_width, nonnegative=True),
}

Name = Annotated[str, Check(f"one of {', '.join(TABLE)}", lambda name: name in TABLE)]


def with_ones(v: Array) -> Array:
    """Values [...,V] and a column of ones: what reads them reads Σ φ(q)·φ(k) beside the output.

    So the normaliser z is a column of the state S, exact whatever the op does with S.
    """
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)


def divided(o: Array) -> Array:
    """Outputs for `with_ones` values by their last column; in bf16 both were read with the same rounded weights, which
    cancels."""
    return (fp32(o[..., :-1]) / (fp32(o[..., -1:]) + SMALLEST_SUM)).astype(o.dtype)
