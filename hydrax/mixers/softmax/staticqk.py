"""Softmax attention whose queries and keys do not see the layers below (arXiv 2510.11602): they are made of the token
embeddings e, in every layer, and the values of the input.

    q_t = W_q norm(e_t),      k_t = W_k norm(e_t),      o_t = Σ_{j<=t} softmax_j(K^-½ q_t·k_j) W_v x_j
"""

import dataclasses
from typing import TypeAlias

import jax.numpy as jnp
from flax import nnx

from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn import kv_cache
from hydrax.nn.attention import QKV, AttentionConfig, OutGate
from hydrax.nn.linear import Linear
from hydrax.ops.rowwise import rms_norm


@dataclasses.dataclass(frozen=True)
class Config(AttentionConfig, MixerConfig):
    def fill(self, d_model: int) -> "Config":
        return self.with_head_width(self.key_dim or per_head(d_model, self.heads))


class StaticQK(Mixer):
    """y = W_o (attention(q, k, v) ⊙ σ(W_g x)); outside a model, which tells the embeddings, e = x.

    Embeddings are small and not those of a normed input. Their RMS norm has no weight: W_q and W_k have one each.
    """

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
        e = x if ctx.embeddings is None else ctx.embeddings
        q, keys, state = self.qkv.see(x, ctx, state, rms_norm(jnp.asarray(e)))
        o = kv_cache.attend(
            q,
            keys,
            positions=ctx.positions,
            segment_ids=ctx.segment_ids,
            scale=cfg.scale,
            softcap=cfg.softcap,
            shards=ctx.shards,
            impl=ctx.impl,
        )
        return self.gate(ctx.tap("reads", o), x), state

    def out(self, z: Array) -> Array:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return self.cfg.init_cache(batch, max_len, dtype)
