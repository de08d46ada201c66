"""RG-LRU (arXiv 2402.19427):  h_t = a_t ⊙ h_{t-1} + √(1 - a_t²) ⊙ i_t ⊙ u_t,   a_t = exp(-8 softplus(Λ) ⊙ r_t).

The first token of a document has nothing to keep: its a is 0, and the factor √(1 - a²) 1.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Positive
from hydrax.core.numerics import einsum, fp32, wide
from hydrax.core.typing import Array, Float, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn.conv import ShortConv
from hydrax.nn.linear import Linear
from hydrax.nn.param import param
from hydrax.parallel.sequence import linear_scan

SHARPNESS = 8.0
"""c of the paper: a^(1/c) at r = 1 is what the decays are initialised by."""

RATES = (0.9, 0.999)
"""Range of exp(-softplus(Λ)) at initialisation; its square is uniform."""

MAX_SLOPE = 1000.0
"""Bound on the derivative of the square root, which has none at 0, where a token keeps all and writes nothing."""


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 4  # blocks of the gates' matrices
    value_dim: Positive | None = None  # V, channels of the state per head; d_model / heads if None
    conv_width: Positive = 4  # taps of the convolution on u
    chunk_size: Positive | None = None  # tokens per chunk of the training form

    # RecurrentGemma 2B, at d_model 2560.
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"griffin": {"heads": 10, "value_dim": 256}}

    def fill(self, d_model: int) -> "Config":
        return dataclasses.replace(self, value_dim=self.value_dim or per_head(d_model, self.heads))


class RGLRU(Mixer):
    """u = conv(W_x x + b_x), r and i = σ(W_h u_h + b_h) by head;  y = W_o (gelu(W_y x + b_y) ⊙ h) + b_o."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        shape, axes = (cfg.heads, cfg.value_dim), ("heads", "state_v")
        self.x = Linear(d_model, shape, axes=("embed", *axes), bias=True, rngs=rngs)
        self.x_conv = ShortConv(shape, cfg.conv_width, axes=axes, bias=True, activation=None, init="small", rngs=rngs)
        self.keep = HeadGate(*shape, rngs=rngs)
        self.write = HeadGate(*shape, rngs=rngs)
        self.rate = param(rngs, _rates, shape, axes)
        self.gate = Linear(d_model, shape, axes=("embed", *axes), bias=True, rngs=rngs)
        self.project = Linear(shape, d_model, axes=(*axes, "embed"), bias=True, residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = dict.fromkeys(("memory", "x")) if state is None else state
        facts: dict[str, Any] = {"segment_ids": ctx.segment_ids, "shards": ctx.shards, "impl": ctx.impl}
        u, tail = self.x_conv(self.x(x), past["x"], **facts)
        log_a = -SHARPNESS * jax.nn.softplus(self.rate[...]) * self.keep(u)
        first = (ctx.positions == 0)[..., None, None]
        factor = jnp.where(first, 1, bounded_sqrt(-jnp.expm1(2 * log_a)))
        h, memory = linear_scan(
            jnp.exp(log_a),
            factor * self.write(u) * ctx.by_channel("values", fp32(u)),
            initial_state=past["memory"],
            chunk_size=self.cfg.chunk_size,
            **facts,
        )
        h = ctx.by_channel("reads", h).astype(x.dtype)
        return h * jax.nn.gelu(self.gate(x)), {"memory": memory, "x": tail}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        memory = jnp.zeros((batch, self.cfg.heads, self.cfg.value_dim), wide(dtype))
        return {"memory": memory, "x": self.x_conv.init_state(batch, dtype)}


class HeadGate(nnx.Module):
    """σ(u_h W_h + b_h) for every head h, in fp32."""

    def __init__(self, heads: int, width: int, *, rngs: nnx.Rngs):
        normal = jax.nn.initializers.normal(width**-0.5)
        shape, axes = (heads, width, width), ("heads", "state_v", "state_v")
        self.kernel = param(rngs, normal, shape, axes, decay=True, matrix=((-2,), (-1,)), cast=True)
        self.bias = param(rngs, jax.nn.initializers.zeros, shape[:2], axes[:2])

    def __call__(self, u: Float[Array, "B T H V"]) -> Float[Array, "B T H V"]:
        return jax.nn.sigmoid(einsum("bthv,hvw->bthw", u, self.kernel[...].astype(u.dtype)) + self.bias[...])


@jax.custom_jvp
def bounded_sqrt(x: Array) -> Array:
    """√x, with a derivative of at most `MAX_SLOPE`."""
    return jnp.sqrt(x)


bounded_sqrt.defjvps(lambda dx, _, x: dx / jnp.sqrt(jnp.maximum(4 * x, MAX_SLOPE**-2)))


def _rates(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Λ of the initial `RATES`: softplus(Λ) = -log ρ."""
    low, high = RATES
    squares = jax.random.uniform(key, shape, dtype, low**2, high**2)
    return jnp.log(jnp.expm1(-0.5 * jnp.log(squares)))
