"""Sliding-window attention:  softmax attention over the last `window` keys, the query's own included.

What lies outside the window may stay visible through the first tokens of the document (`sink_tokens`, arXiv
2309.17453), or be replaced by a learned empty key per head (`sinks`, 2508.10925).
"""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import NonNegative, Positive
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn import kv_cache
from hydrax.nn.attention import QKV, AttentionConfig, OutGate
from hydrax.nn.linear import Linear
from hydrax.nn.param import param


@dataclasses.dataclass(frozen=True)
class Config(AttentionConfig, MixerConfig):
    window: Positive = 128  # visible keys, the query's own included
    sinks: bool = False  # learned score of an empty key, per head
    sink_tokens: NonNegative = 0  # first tokens of each document that stay visible

    def fill(self, d_model: int) -> "Config":
        return self.with_head_width(self.key_dim or per_head(d_model, self.heads))


class SlidingWindowAttention(Mixer):
    """y = W_o (attention(q, k, v) ⊙ σ(W_g x)); the state is a ring of `window` keys and values and the sink tokens."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.qkv = QKV(d_model, cfg, rngs=rngs)
        self.sinks = param(rngs, jax.nn.initializers.normal(0.02), (cfg.heads,), ("heads",)) if cfg.sinks else None
        self.gate = OutGate(d_model, cfg, rngs=rngs)
        axes = ("heads", "head_dim", "embed")
        self.project = Linear((cfg.heads, cfg.value_dim), d_model, axes=axes, residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        q, k, v = self.qkv(x, ctx.positions)
        o, state = kv_cache.attend(
            q,
            k,
            ctx.tap("values", v),
            state,
            positions=ctx.positions,
            segment_ids=ctx.segment_ids,
            window=self.cfg.window,
            sinks=None if self.sinks is None else self.sinks[...],
            sink_tokens=self.cfg.sink_tokens,
            softcap=self.cfg.softcap,
            impl=ctx.impl,
        )
        return self.gate(ctx.tap("reads", o), x), state

    def out(self, z: Array) -> Array:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        slots = min(max_len, cfg.window + cfg.sink_tokens)
        return kv_cache.empty(batch, slots, cfg.kv_heads, cfg.key_dim, cfg.value_dim, dtype)
