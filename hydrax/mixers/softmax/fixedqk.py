"""Softmax attention whose weights are the same for every text (arXiv 2510.11602): queries and keys are made of a fixed
random stream e_p ~ N(0, σ²) [D] of the positions p, values of the input.

    q_p = W_q e_p,      k_p = W_k e_p,      o_t = Σ_{p<=t} softmax_p(K^-½ q_t·k_p) W_v x_p

The paper runs the stream through the blocks beside the text. Here it enters every layer as it is: a mixer sees its own
layer, and what the blocks' norms would make of the stream has the size that it has for σ = 1.
"""

import dataclasses
import math
from typing import TypeAlias

import jax
import jax.numpy as jnp

from hydrax.core.build import NonNegative, PositiveFloat
from hydrax.core.numerics import wide
from hydrax.core.typing import Array, Float, Int, PyTree
from hydrax.mixers.base import Context, SoftmaxConfig, SoftmaxMixer


@dataclasses.dataclass(frozen=True)
class Config(SoftmaxConfig):
    sigma: PositiveFloat = 1.0  # standard deviation of the stream
    seed: NonNegative = 0  # of the stream; layers with equal seeds share it


class FixedQK(SoftmaxMixer):
    """y = W_o (attention(q, k, v) ⊙ σ(W_g x)), with weights learned for pairs of positions."""

    Config: TypeAlias = Config

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        e = self.cfg.sigma * stream(ctx.positions, x.shape[-1], self.cfg.seed, wide(x.dtype))
        q, keys, state = self.qkv.see(x, ctx, state, e.astype(x.dtype))
        return self.gate(ctx.tap("reads", self.attend(q, keys, ctx)), x), state


def stream(
    positions: Int[Array, "B T"], width: int, seed: int, dtype: jnp.dtype = jnp.float32
) -> Float[Array, "B T D"]:
    """N(0, 1), a function of the position alone: the same in training and decoding, whatever the length.

    The uniform numbers below, odd multiples of 2^-23 in (-1, 1), are exact in every dtype; the rest is rounded in it.
    """
    key = jax.random.key(seed, impl="threefry2x32")

    def draw(position: Array) -> Array:
        bits = jax.random.bits(jax.random.fold_in(key, position), (width,), jnp.uint32)
        uniform = (2 * (bits >> 9) + 1).astype(dtype) * 2**-23 - 1
        return math.sqrt(2) * jax.lax.erf_inv(uniform)

    return jax.vmap(jax.vmap(draw))(positions)
