"""What is near, without content: the largest of the last W tokens, or their weighted sum (arXiv 2205.12956, causal).

    max_pool:  z_t = max_{i<W} u_{t-i},      depthwise_conv:  z_t = Σ_{i<W} w_i ⊙ u_{t-W+1+i},      u = W_u x

by channel, within the document; y = W_o z. In the Inception token mixer they are heads beside those of attention.
"""

import dataclasses
from typing import Any, TypeAlias

import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Positive
from hydrax.core.numerics import wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn.conv import ShortConv
from hydrax.nn.linear import Linear
from hydrax.parallel.sequence import short_conv

AXES = ("heads", "state_v")


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 4
    value_dim: Positive | None = None  # channels per head; d_model / heads if None
    width: Positive = 3  # W: the tokens an output depends on

    def fill(self, d_model: int) -> Any:
        return dataclasses.replace(self, value_dim=self.value_dim or per_head(d_model, self.heads))

    @property
    def tails(self) -> list[int]:
        """How many tokens before its own the output sees."""
        return [self.width - 1]


class MaxPool(Mixer):
    """The state is the last W - 1 of u, in fp32. A gradient is shared evenly among equal largest values."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        shape = (cfg.heads, cfg.value_dim)
        self.u = Linear(d_model, shape, axes=("embed", *AXES), rngs=rngs)
        self.project = Linear(shape, d_model, axes=(*AXES, "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        W, u = self.cfg.width, self.u(x, exact=True)  # which is the largest must not depend on rounding
        # W convolutions with one tap of 1 each: copy j is late by W - 1 - j tokens, and zero before the document.
        copies = jnp.broadcast_to(u[:, :, None], (*u.shape[:2], W, *u.shape[2:]))
        taps = jnp.broadcast_to(jnp.eye(W, dtype=u.dtype)[..., None, None], (W, W, *u.shape[2:]))
        past = None if state is None else state["inputs"][:, :, None]
        late, tails = short_conv(
            copies,
            taps,
            initial_state=past if past is None else jnp.broadcast_to(past, (*past.shape[:2], W, *u.shape[2:])),
            **ctx.rows,
        )
        seen = jnp.arange(W)[::-1] <= ctx.positions[..., None]
        z = jnp.where(seen[..., None, None], late, -jnp.inf).max(2)
        return z.astype(x.dtype), {"inputs": tails[:, :, 0]}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return {"inputs": jnp.zeros((batch, self.cfg.width - 1, self.cfg.heads, self.cfg.value_dim), wide(dtype))}


class DepthwiseConv(Mixer):
    """The state is the last W - 1 of u."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        shape = (cfg.heads, cfg.value_dim)
        self.u = Linear(d_model, shape, axes=("embed", *AXES), rngs=rngs)
        self.conv = ShortConv(shape, cfg.width, axes=AXES, activation=None, rngs=rngs)
        self.project = Linear(shape, d_model, axes=(*AXES, "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = None if state is None else state["inputs"]
        u = ctx.by_channel("values", self.u(x))
        z, tail = self.conv(u, past, **ctx.rows)
        return ctx.by_channel("reads", z), {"inputs": tail}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return {"inputs": self.conv.init_state(batch, dtype)}
