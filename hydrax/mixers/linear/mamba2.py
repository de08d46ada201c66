"""Mamba-2 (arXiv 2405.21060):  S_t = exp(-A Δ_t) S_{t-1} + b_t (Δ_t x_t)ᵀ,   o_t = S_tᵀ c_t + D x_t."""

import dataclasses
import math
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ChunkSize, ConfigError, NonNegativeFloat, Positive, PositiveFloat
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig
from hydrax.nn.conv import ShortConv
from hydrax.nn.decay import StepDecay
from hydrax.nn.linear import Linear
from hydrax.nn.param import param
from hydrax.ops.rowwise import rms_norm
from hydrax.parallel.sequence import linear_attention

GATED_NORMS = {
    "after_gate": lambda y, gate, norm: norm(y * gate),
    "before_gate": lambda y, gate, norm: norm(y) * gate,
    "none": lambda y, gate, norm: y * gate,
}


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 1  # groups of value heads that share b (keys) and c (queries), and the output norm
    value_heads: Positive | None = None  # a multiple of heads; 2 d_model / value_dim if None
    key_dim: Positive = 128  # K, the state size N of the paper
    value_dim: Positive | None = None  # V per value head; 64 if None, less if that does not divide 2 d_model
    conv_width: Positive = 4  # taps of the convolutions on x, b, c
    conv_activation: Literal["none", "silu"] = "silu"  # after these convolutions
    dt_min: NonNegativeFloat = 0.0  # Δ is at least this; 0.001 where transformers prefills Zamba2 and Nemotron-H
    norm: Literal["after_gate", "before_gate", "none"] = "after_gate"  # where the output norm stands
    norm_eps: PositiveFloat = 1e-5  # of the output norm
    chunk_size: ChunkSize | None = None  # tokens per chunk of the training form

    def fill(self, d_model: int) -> "Config":
        V = self.value_dim or math.gcd(64, 2 * d_model)
        if self.value_heads is None and 2 * d_model % V:
            raise ConfigError("value_dim", V, f"expected a divisor of 2 d_model = {2 * d_model}, or set value_heads")
        heads = self.value_heads or 2 * d_model // V
        if heads % self.heads:
            raise ConfigError("heads", self.heads, f"expected a divisor of value_heads = {heads}")
        return dataclasses.replace(self, value_heads=heads, value_dim=V)


class Mamba2(Mixer):
    """x, b, c = silu(conv(W u) + bias), Δ = softplus(W_Δ u + b_dt);  y = W_o RMSNorm_group(o ⊙ silu(W_z u)).

    Oryx (arXiv 2605.28769) has no silu after the convolutions, Falcon-H1 (2507.22448) a gate without a norm.
    """

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        G, Hv, K, V = cfg.heads, cfg.value_heads, cfg.key_dim, cfg.value_dim
        keys, values = ("kv_heads", "state_k"), ("heads", "state_v")
        self.c = Linear(d_model, (G, K), axes=("embed", *keys), rngs=rngs)
        self.b = Linear(d_model, (G, K), axes=("embed", *keys), rngs=rngs)
        self.x = Linear(d_model, (Hv, V), axes=("embed", *values), rngs=rngs)
        conv: dict[str, Any] = {"width": cfg.conv_width, "bias": True, "rngs": rngs}
        conv["activation"] = None if cfg.conv_activation == "none" else cfg.conv_activation
        self.c_conv = ShortConv((G, K), axes=keys, **conv)
        self.b_conv = ShortConv((G, K), axes=keys, **conv)
        self.x_conv = ShortConv((Hv, V), axes=values, **conv)
        self.step_size = Linear(d_model, Hv, axes=("embed", "heads"), rngs=rngs)
        self.decay = StepDecay(Hv, rates=(1.0, 16.0), dt_min=cfg.dt_min, rngs=rngs)
        self.skip = param(rngs, jax.nn.initializers.ones, (Hv,), ("heads",))
        self.gate = Linear(d_model, (Hv, V), axes=("embed", *values), rngs=rngs)
        ones = jax.nn.initializers.ones
        self.norm_weight = None if cfg.norm == "none" else param(rngs, ones, (Hv, V), values)
        self.project = Linear((Hv, V), d_model, axes=(*values, "embed"), residual=True, rngs=rngs)

    def mix(self, u: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = dict.fromkeys(("memory", "c", "b", "x")) if state is None else state
        facts: dict[str, Any] = {"segment_ids": ctx.segment_ids, "shards": ctx.shards, "impl": ctx.impl}
        c, c_tail = self.c_conv(self.c(u), past["c"], **facts)
        b, b_tail = self.b_conv(self.b(u), past["b"], **facts)
        x, x_tail = self.x_conv(self.x(u), past["x"], **facts)
        g, dt = self.decay(self.step_size(u))
        o, memory = linear_attention(
            c,
            ctx.tap("keys", b),
            (dt[..., None] * ctx.tap("values", x)).astype(x.dtype),
            g,
            scale=1.0,
            initial_state=past["memory"],
            chunk_size=self.cfg.chunk_size,
            **facts,
        )
        y = ctx.tap("reads", o) + self.skip[...][:, None] * fp32(x)
        z = GATED_NORMS[self.cfg.norm](y, jax.nn.silu(fp32(self.gate(u))), self._group_norm)
        return z.astype(u.dtype), {"memory": memory, "c": c_tail, "b": b_tail, "x": x_tail}

    def _group_norm(self, y: Array) -> Array:
        """RMS norm over all value heads of a group."""
        grouped = rms_norm(y.reshape(*y.shape[:2], self.cfg.heads, -1), eps=self.cfg.norm_eps)
        return grouped.reshape(y.shape) * self.norm_weight[...]

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        return {
            "memory": jnp.zeros((batch, cfg.value_heads, cfg.key_dim, cfg.value_dim), wide(dtype)),
            "c": self.c_conv.init_state(batch, dtype),
            "b": self.b_conv.init_state(batch, dtype),
            "x": self.x_conv.init_state(batch, dtype),
        }
