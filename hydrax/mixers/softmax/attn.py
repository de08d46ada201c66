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
            softcap=self.cfg.softcap,
            impl=ctx.impl,
        )
        return self.gate(ctx.tap("reads", o), x), state

    def out(self, z: Array) -> Array:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        return kv_cache.empty(batch, max_len, cfg.kv_heads, cfg.key_dim, cfg.value_dim, dtype)
