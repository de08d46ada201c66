"""Gated DeltaNet (arXiv 2412.06464):  S_t = e^g_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ,   o_t = K^-½ S_tᵀ q_t."""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, Positive, PositiveFloat
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig
from hydrax.nn.conv import ShortConv
from hydrax.nn.decay import StepDecay
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm, l2_norm
from hydrax.ops.delta import delta_rule


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 4  # query/key heads
    value_heads: Positive | None = None  # a multiple of heads; heads if None
    key_dim: Positive | None = None  # K per head; 0.75 d_model / heads, rounded down to a multiple of 8, if None
    value_dim: Positive | None = None  # V per head; if None, values are twice as wide as keys over all heads
    conv_width: Positive = 4  # taps of the convolutions on q, k, v
    allow_neg_eigval: bool = False  # β in (0, 2) instead of (0, 1): transitions with eigenvalues down to -1
    norm_eps: PositiveFloat = 1e-5  # of the output norm; outputs are small at initialisation
    chunk_size: Positive | None = None  # tokens per chunk of the training form

    def fill(self, d_model: int) -> "Config":
        heads = self.value_heads or self.heads
        if heads % self.heads:
            raise ConfigError("value_heads", heads, f"expected a multiple of heads = {self.heads}")
        K = self.key_dim or max(8, 3 * d_model // (4 * self.heads) // 8 * 8)
        V = self.value_dim or max(1, 2 * K * self.heads // heads)
        return dataclasses.replace(self, value_heads=heads, key_dim=K, value_dim=V)


class GatedDeltaNet(Mixer):
    """q, k, v = silu(conv(W x)), q and k of norm 1, β = σ(W_b x), g = -A softplus(W_a x + b_dt);
    y = W_o (RMSNorm_V(o) ⊙ silu(W_g x))."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, Hv, K, V = cfg.heads, cfg.value_heads, cfg.key_dim, cfg.value_dim
        keys, values = ("heads", "state_k"), ("heads", "state_v")
        self.q = Linear(d_model, (H, K), axes=("embed", *keys), rngs=rngs)
        self.k = Linear(d_model, (H, K), axes=("embed", *keys), rngs=rngs)
        self.v = Linear(d_model, (Hv, V), axes=("embed", *values), rngs=rngs)
        self.q_conv = ShortConv((H, K), cfg.conv_width, axes=keys, rngs=rngs)
        self.k_conv = ShortConv((H, K), cfg.conv_width, axes=keys, rngs=rngs)
        self.v_conv = ShortConv((Hv, V), cfg.conv_width, axes=values, rngs=rngs)
        self.beta = Linear(d_model, Hv, axes=("embed", "heads"), rngs=rngs)
        self.step_size = Linear(d_model, Hv, axes=("embed", "heads"), rngs=rngs)
        self.decay = StepDecay(Hv, rates=(0.01, 16.0), rngs=rngs)  # a rate of 0 would never train: log 0
        self.gate = Linear(d_model, (Hv, V), axes=("embed", *values), rngs=rngs)
        self.norm = RMSNorm(V, axes=("state_v",), eps=cfg.norm_eps, rngs=rngs)
        self.project = Linear((Hv, V), d_model, axes=(*values, "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = dict.fromkeys(("memory", "q", "k", "v")) if state is None else state
        facts: dict[str, Any] = {"segment_ids": ctx.segment_ids, "impl": ctx.impl}
        q, q_tail = self.q_conv(self.q(x), past["q"], **facts)
        k, k_tail = self.k_conv(self.k(x), past["k"], **facts)
        v, v_tail = self.v_conv(self.v(x), past["v"], **facts)
        beta = jax.nn.sigmoid(fp32(self.beta(x))) * (2 if self.cfg.allow_neg_eigval else 1)
        g, _ = self.decay(self.step_size(x))
        o, memory = delta_rule(
            l2_norm(q),
            l2_norm(k),
            v,
            beta,
            g,
            initial_state=past["memory"],
            chunk_size=self.cfg.chunk_size,
            **facts,
        )
        return self.norm(o) * jax.nn.silu(self.gate(x)), {"memory": memory, "q": q_tail, "k": k_tail, "v": v_tail}

    def out(self, z: Array) -> Array:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        return {
            "memory": jnp.zeros((batch, cfg.value_heads, cfg.key_dim, cfg.value_dim), jnp.float32),
            "q": self.q_conv.init_state(batch, dtype),
            "k": self.k_conv.init_state(batch, dtype),
            "v": self.v_conv.init_state(batch, dtype),
        }
