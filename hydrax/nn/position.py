"""Positions in queries and keys: rotary (RoPE, arXiv 2104.09864) and learned phases (LRPE, arXiv 2307.14995)."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from hydrax.core.build import Fraction, PositiveFloat
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Rope:
    """Options of rotary positions, see `rope`."""

    theta: PositiveFloat = 10000.0  # pair m of d/2 turns by theta^(-2m/d) per token
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
    """x with its first d = ⌊fraction · K⌋ channels (rounded down to even) turned; exact at all positions, dtype of x.

    Pair m turns by the angle p · theta^(-2m/d). It is the channels (m, m + d/2), or (2m, 2m + 1) if interleaved;
    "torchscale" is interleaved with angles p · theta^(-m/(d/2 - 1)), down to 1/theta itself (arXiv 2307.08621).
    """
    half = int(fraction * x.shape[-1]) // 2
    if half == 0:
        return x
    exponents = np.linspace(0, 1, half) if style == "torchscale" else np.arange(half) / half
    angles = turned_by(positions, theta**-exponents, wide(x.dtype))[..., None, :]  # [B,T,1,d/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    pairs, axis = ((2, half), -2) if style == "half" else ((half, 2), -1)
    a, b = jnp.moveaxis(fp32(x[..., : 2 * half]).reshape(*x.shape[:-1], *pairs), axis, 0)
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=axis).reshape(*x.shape[:-1], -1).astype(x.dtype)
    return jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


def turned_by(positions: Array, frequencies: np.ndarray, dtype: jnp.dtype) -> Float[Array, "... d"]:
    """The angles p · frequencies, up to whole turns: in fp32 to 3e-7 at all positions below 2^24.

    The product itself would keep 7 digits of an angle that grows with p, and lose the sines of long rows: 1e-3 at
    20,000 radians. Multiples of 2^-32 of a turn are integers instead, whose products drop whole turns as they overflow.
    What is left of a frequency stays so small that its product has all digits that count. Positions are integers, or
    floats that may lie between them.
    """
    if dtype == jnp.float64:
        return positions.astype(dtype)[..., None] * frequencies
    parts = frequencies / (2 * np.pi) % 1 * 2.0**32
    whole = jnp.floor(positions).astype(jnp.int32)
    between = (positions - whole).astype(dtype)[..., None] * jnp.asarray(frequencies, dtype)
    steps = whole.astype(jnp.uint32)[..., None] * parts.astype(np.uint32)
    near = jax.lax.bitcast_convert_type(steps, jnp.int32).astype(dtype) * 2.0**-32  # within half a turn
    rest = whole.astype(dtype)[..., None] * jnp.asarray(parts % 1 * 2.0**-32, dtype)
    return 2 * np.pi * (near + rest) + between


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
