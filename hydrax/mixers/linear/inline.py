"""InLine attention (arXiv 2412.06590), causal: linear attention less its mean, so that different queries read apart.

    o_t = v̄_t + K^-½ q_tᵀ C_t,      C_t = (1/t) Σ_{j<=t} (k_j - k̄_t)(v_j - v̄_t)ᵀ

with the means k̄, v̄ of the document so far: the weight of v_j is K^-½ q_t·(k_j - k̄_t) / t + 1/t. They sum to 1, and may
be negative. The paper is about images; the statistics of the past alone are hydrax's own form. Its local term, a filter
of 3 x 3 that the mean of the image predicts, is a causal convolution of the values here.

All three follow from Welford's updates, so that no large sums cancel: C_t = (1 - 1/t) C_{t-1} + (k_t - k̄_t)(v_t - v̄_t)ᵀ
/ (t - 1), which is linear attention with a decay.
"""

import dataclasses
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ChunkSize, NonNegative, Positive
from hydrax.core.numerics import MIN_LOG_DECAY, fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn.conv import ShortConv
from hydrax.nn.linear import Linear
from hydrax.parallel.sequence import linear_attention, linear_scan

ACTIVATIONS = {"identity": lambda x: x, "relu": jax.nn.relu, "silu": jax.nn.silu}
"""φ of queries and keys."""


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 4
    key_dim: Positive | None = None  # K per head; d_model / heads if None
    value_dim: Positive | None = None  # V per head; d_model / heads if None
    activation: Literal["identity", "relu", "silu"] = "identity"  # of queries and keys
    conv_width: NonNegative = 4  # taps of the convolution of the values; 0: none
    chunk_size: ChunkSize | None = None  # tokens per chunk of the training form

    def fill(self, d_model: int) -> "Config":
        return dataclasses.replace(
            self,
            key_dim=self.key_dim or per_head(d_model, self.heads),
            value_dim=self.value_dim or per_head(d_model, self.heads),
        )


class InLine(Mixer):
    """y = W_o (o + conv(v)); the state holds Σ k, Σ v, C and the last values.

    The decay 1 - 1/t of a mean, rounded to 2^-24, would let it drift away from the mean over long rows: sums do not.
    """

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V, W = cfg.heads, cfg.key_dim, cfg.value_dim, cfg.conv_width
        axes = ("heads", "state_v")
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.v = Linear(d_model, (H, V), axes=("embed", *axes), rngs=rngs)
        self.v_conv = ShortConv((H, V), W, axes=axes, activation=None, rngs=rngs) if W else None
        self.project = Linear((H, V), d_model, axes=(*axes, "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = dict.fromkeys(("k", "v", "memory", "tail")) if state is None else state
        facts: dict[str, Any] = {"segment_ids": ctx.segment_ids, "shards": ctx.shards, "impl": ctx.impl}
        phi = ACTIVATIONS[self.cfg.activation]
        values = ctx.tap("values", self.v(x))
        q, k, v = fp32(phi(self.q(x))), fp32(phi(ctx.tap("keys", self.k(x)))), fp32(values)
        n = fp32(ctx.positions + 1)[..., None, None]

        def total(x: Array, start: Array | None) -> tuple[Array, Array]:
            return linear_scan(jnp.ones_like(x), x, initial_state=start, **facts)

        (k_sum, k_last), (v_sum, v_last) = total(k, past["k"]), total(v, past["v"])
        k_mean, v_mean = k_sum / n, v_sum / n
        decay = jnp.where(n > 1, jnp.log1p(-1 / jnp.maximum(n, 2)), MIN_LOG_DECAY)[..., 0]
        o, memory = linear_attention(
            q,
            jnp.where(n > 1, (k - k_mean) / jnp.maximum(n - 1, 1), 0),
            v - v_mean,
            jnp.broadcast_to(decay, v.shape[:3]),
            initial_state=past["memory"],
            chunk_size=self.cfg.chunk_size,
            **facts,
        )
        o = ctx.tap("reads", (v_mean + o).astype(x.dtype))
        new = {"k": k_last, "v": v_last, "memory": memory}
        if self.v_conv is None:
            return o, new
        near, tail = self.v_conv(values, past["tail"], **facts)
        return o + near, {**new, "tail": tail}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        K, V = self.cfg.key_dim, self.cfg.value_dim
        shapes = {"k": (K,), "v": (V,), "memory": (K, V)}
        state = {name: jnp.zeros((batch, self.cfg.heads, *shape), wide(dtype)) for name, shape in shapes.items()}
        return state if self.v_conv is None else {**state, "tail": self.v_conv.init_state(batch, dtype)}
