"""Rotary position embedding (arXiv 2104.09864):  channels (m, m + d/2) turn by the angle p · theta^(-2m/d)."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from hydrax.core.build import Fraction, PositiveFloat
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Rope:
    theta: PositiveFloat = 10000.0
    fraction: Fraction = 1.0  # of the channels that turn; 0 = no positions (NoPE)


def rope(
    x: Float[Array, "B T H K"], positions: Int[Array, "B T"], theta: float = 10000.0, fraction: float = 1.0
) -> Float[Array, "B T H K"]:
    """x with its first d = ⌊fraction · K⌋ channels (rounded down to even) turned; angles in fp32, dtype of x."""
    half = int(fraction * x.shape[-1]) // 2
    if half == 0:
        return x
    frequencies = jnp.asarray(theta ** (-np.arange(half) / half), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies  # [B,T,1,d/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = fp32(x[..., :half]), fp32(x[..., half : 2 * half])
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)
