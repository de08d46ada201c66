"""Feature maps of linear attention: φ(q)·φ(k) takes the place of exp(q·k). What is learned is shared by the heads."""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Check
from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array
from hydrax.nn.param import Init, param

Map = Callable[[Array], Array]

DPFP_ROLLS = 4
"""ν of arXiv 2102.11174: how many products with shifted copies DPFP takes."""


@dataclasses.dataclass(frozen=True)
class FeatureMap:
    """A line of the table of feature maps.

    Attributes:
      make: (K, rngs) -> φ, [...,K] -> [...,width(K)] in the dtype of its argument.
      width: features of K channels.
      nonnegative: φ >= 0, so that a sum of φ(q)·φ(k) may divide.
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
}

Name = Annotated[str, Check(f"one of {', '.join(TABLE)}", lambda name: name in TABLE)]
