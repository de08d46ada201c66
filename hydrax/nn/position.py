"""Positions in queries and keys: rotary (RoPE, arXiv 2104.09864) and learned phases (LRPE, arXiv 2307.14995)."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

from hydrax.core.build import Fraction, PositiveFloat
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Rope:
    theta: PositiveFloat = 10000.0
    fraction: Fraction = 1.0  # of the channels that turn; 0 = no positions (NoPE)
    style: Literal["half", "interleaved", "torchscale"] = "half"  # which channels pair up, and RetNet's frequencies

    def turn(self, x: Float[Array, "B T H K"], positions: Int[Array, "B T"]) -> Float[Array, "B T H K"]:
        """`rope` with these options."""
        return rope(x, positions, self.theta, self.fraction, self.style)


def rope(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "B T"],
    theta: float = 10000.0,
    fraction: float = 1.0,
    style: str = "half",
) -> Float[Array, "B T H K"]:
    """x with its first d = ⌊fraction · K⌋ channels (rounded down to even) turned; angles in fp32, dtype of x.

    Pair m turns by the angle p · theta^(-2m/d). It is the channels (m, m + d/2), or (2m, 2m + 1) if interleaved;
    "torchscale" is interleaved with angles p · theta^(-m/(d/2 - 1)), down to 1/theta itself (arXiv 2307.08621).
    """
    half = int(fraction * x.shape[-1]) // 2
    if half == 0:
        return x
    exponents = np.linspace(0, 1, half) if style == "torchscale" else np.arange(half) / half
    frequencies = jnp.asarray(theta**-exponents, wide(x.dtype))
    angles = positions.astype(wide(x.dtype))[..., None, None] * frequencies  # [B,T,1,d/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    pairs, axis = ((2, half), -2) if style == "half" else ((half, 2), -1)
    a, b = jnp.moveaxis(fp32(x[..., : 2 * half]).reshape(*x.shape[:-1], *pairs), axis, 0)
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=axis).reshape(*x.shape[:-1], -1).astype(x.dtype)
    return jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


def lrpe(
    x: Float[Array, "B T H K"], positions: Int[Array, "B T"], phases: Float[Array, "H K"]
) -> Float[Array, "B T H 2K"]:
    """[x cos(pθ), x sin(pθ)] for learned phases θ: scores become Σ_i q_i k_i cos((t - s) θ_i); angles in fp32."""
    angles = positions.astype(wide(x.dtype))[..., None, None] * phases
    y = fp32(x)
    return jnp.concatenate([y * jnp.cos(angles), y * jnp.sin(angles)], axis=-1).astype(x.dtype)


def lrpe_phases(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """The phases at initialisation: 10000^(-2i/n) for the n entries of `shape` in order."""
    n = math.prod(shape)
    return jnp.asarray(10000.0 ** (-2 * np.arange(n).reshape(shape) / n), dtype)
