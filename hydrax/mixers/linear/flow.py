"""Flow attention (Flowformer, arXiv 2202.06258), causal: keys compete for the flow that queries take in.

With q, k = σ(W x) + ε and n = t, the number of tokens so far in the document:

    I_t = q_t·Σ_{j<=t} k_j,       O_t = k_t·Σ_{j<=t} q_j                              what goes in and out
    sink_t = q_t·Σ_{j<=t} k_j (j/O_j) / n,     source_t = k_t·Σ_{j<=t} q_j (j/I_j) / n,  within ±clip
    o_t = σ(sink_t) Σ_{j<=t} (q_t·k_j) / I_t · c_j v_j,      c_j = j e^{source_j} / Σ_{i<=j} e^{source_i}

The ε stands in the products with the sums, and not in q_t·k_j, as published.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ChunkSize, Positive, PositiveFloat
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn.linear import Linear
from hydrax.parallel.sequence import linear_attention, linear_scan

EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 4
    key_dim: Positive | None = None  # K per head; d_model / heads if None
    value_dim: Positive | None = None  # V per head; d_model / heads if None
    clip: PositiveFloat = 5.0  # bound of the sources in the softmax: 1 in the first release, 5 for language, 10 for RL
    chunk_size: ChunkSize | None = None  # tokens per chunk of the training form

    def fill(self, d_model: int) -> "Config":
        return dataclasses.replace(
            self,
            key_dim=self.key_dim or per_head(d_model, self.heads),
            value_dim=self.value_dim or per_head(d_model, self.heads),
        )


class Flow(Mixer):
    """y = W_o o + b; the state holds the five sums and the matrix Σ k_j c_j v_jᵀ. All projections have biases."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V = cfg.heads, cfg.key_dim, cfg.value_dim
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), bias=True, scale=0.5**0.5, rngs=rngs)
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), bias=True, scale=0.5**0.5, rngs=rngs)
        self.v = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), bias=True, scale=0.5**0.5, rngs=rngs)
        axes = ("heads", "state_v", "embed")
        self.project = Linear((H, V), d_model, axes=axes, bias=True, residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = {"memory": None} if state is None else state
        facts: dict[str, Any] = {"segment_ids": ctx.segment_ids, "shards": ctx.shards, "impl": ctx.impl}
        new = {}

        def total(name: str, x: Array) -> Array:
            """Σ_{j<=t} x_j, in fp32: the sums grow with t."""
            sums, new[name] = linear_scan(jnp.ones_like(x), x, initial_state=past.get(name), **facts)
            return sums

        q, k = jax.nn.sigmoid(fp32(self.q(x))), jax.nn.sigmoid(fp32(ctx.tap("keys", self.k(x))))
        v = ctx.tap("values", self.v(x))
        n = fp32(ctx.positions + 1)[..., None]
        incoming = _dot(q, total("k", k))
        outgoing = _dot(k, total("q", q))
        sink = _dot(q, total("k_out", k * (n / outgoing)[..., None])) / n
        source = _dot(k, total("q_in", q * (n / incoming)[..., None])) / n
        strength = jnp.exp(jnp.clip(source, -self.cfg.clip, self.cfg.clip))
        competing = n * strength / jnp.maximum(total("strength", strength), EPS)
        o, new["memory"] = linear_attention(
            q / incoming[..., None],
            k,
            fp32(v) * competing[..., None],
            scale=1.0,
            initial_state=past["memory"],
            chunk_size=self.cfg.chunk_size,
            **facts,
        )
        return ctx.tap("reads", (jax.nn.sigmoid(sink)[..., None] * o).astype(x.dtype)), new

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        c = self.cfg
        sums = dict.fromkeys(("k", "q", "k_out", "q_in"), (batch, c.heads, c.key_dim))
        shapes = {**sums, "strength": (batch, c.heads), "memory": (batch, c.heads, c.key_dim, c.value_dim)}
        return {name: jnp.zeros(shape, wide(dtype)) for name, shape in shapes.items()}


def _dot(x: Array, total: Array) -> Array:
    """(x + ε)·(total + ε) over the last axis."""
    return ((x + EPS) * (total + EPS)).sum(-1)
