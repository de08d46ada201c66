"""Sliding-window attention:  softmax attention over the last `window` keys, the query's own included.

What lies outside the window may stay visible through the first tokens of the document (`sink_tokens`, arXiv
2309.17453), or be replaced by a learned empty key per head (`sinks`, 2508.10925).
"""

import dataclasses
from typing import Any, TypeAlias

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
        shape = (cfg.heads, cfg.value_dim)
        self.project = Linear(shape, d_model, axes=axes, bias=cfg.out_bias, residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg = self.cfg
        ring: dict[str, Any] = {"window": cfg.window, "sink_tokens": cfg.sink_tokens}
        q, keys, state = self.qkv.see(x, ctx, state, **ring)
        o = kv_cache.attend(
            q,
            keys,
            positions=ctx.positions,
            segment_ids=ctx.segment_ids,
            sinks=None if self.sinks is None else self.sinks[...],
            scale=cfg.scale,
            softcap=cfg.softcap,
            shards=ctx.shards,
            impl=ctx.impl,
            tap_lse=ctx.taps.get("lse"),
            **ring,
        )
        return self.gate(ctx.tap("reads", o), x), state

    def out(self, z: Array) -> Array:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return self.cfg.init_cache(batch, min(max_len, self.cfg.window + self.cfg.sink_tokens), dtype)
