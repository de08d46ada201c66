"""Softmax attention (arXiv 1706.03762, grouped heads 2305.13245):  o_t = Σ_{s<=t} softmax_s(K^-1/2 q_t·k_s) v_s."""

import dataclasses
from typing import TypeAlias

import jax.numpy as jnp
from flax import nnx

from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn import kv_cache
from hydrax.nn.attention import QKV, AttentionConfig, OutGate
from hydrax.nn.linear import Linear


@dataclasses.dataclass(frozen=True)
class Config(AttentionConfig, MixerConfig):
    def fill(self, d_model: int) -> "Config":
        return self.with_head_width(self.key_dim or per_head(d_model, self.heads))


class Attention(Mixer):
    """y = W_o (attention(q, k, v) ⊙ σ(W_g x)); the state holds the keys and values of the whole document."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.qkv = QKV(d_model, cfg, rngs=rngs)
        self.gate = OutGate(d_model, cfg, rngs=rngs)
        axes = ("heads", "head_dim", "embed")
        shape = (cfg.heads, cfg.value_dim)
        self.project = Linear(shape, d_model, axes=axes, bias=cfg.out_bias, residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg = self.cfg
        q, keys, state = self.qkv.see(x, ctx, state)
        attend = ctx.attend or kv_cache.attend
        o = attend(
            q,
            keys,
            positions=ctx.positions,
            segment_ids=ctx.segment_ids,
            scale=cfg.scale,
            softcap=cfg.softcap,
            shards=ctx.shards,
            impl=ctx.impl,
            tap_lse=ctx.taps.get("lse"),
        )
        return self.gate(ctx.tap("reads", o), x), state

    def out(self, z: Array) -> Array:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return self.cfg.init_cache(batch, max_len, dtype)
