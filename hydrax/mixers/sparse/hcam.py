"""Hierarchical chunk attention (arXiv 2105.14039): chunks are weighed by their mean keys, tokens inside their chunk.

    z_t = Σ_{s in the chunk of t and the one before} softmax_s(K^-½ q_t·k_s) v_s
          + g_t Σ_c w_c Σ_{s in c} softmax_s(K^-½ q_t·k_s) v_s
    w = softmax over the `top` complete chunks with the highest K^-½ q_t·k̄_c,   g_t = σ(w_g x_t) per head

A causal form of a memory for agents. Chunks count from the start of the document; k̄ is a mean of keys after RoPE. The
two levels of weights give the choice a gradient: that of w.
"""

import dataclasses
from typing import TypeAlias

import jax
from flax import nnx

from hydrax.core.build import Positive
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, SoftmaxConfig, SoftmaxMixer
from hydrax.nn import kv_cache
from hydrax.nn.attention import QKV
from hydrax.nn.linear import Linear
from hydrax.parallel.sequence import chunk_attention


@dataclasses.dataclass(frozen=True)
class Config(SoftmaxConfig):
    chunk: Positive = 64  # tokens per chunk
    top: Positive = 4  # complete chunks that a query reads


class HierarchicalChunkAttention(SoftmaxMixer):
    """y = W_o (z ⊙ σ(W_o' x)); the state holds the keys and values of the whole document."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.qkv = QKV(d_model, cfg, rngs=rngs)
        self.recall = Linear(d_model, cfg.heads, axes=("embed", "heads"), bias=True, rngs=rngs)
        self.read_out(d_model, rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg = self.cfg
        q, keys, state = self.qkv.see(x, ctx, state)
        o = chunk_attention(
            q,
            keys.k,
            keys.v,
            jax.nn.sigmoid(fp32(self.recall(x))),
            size=cfg.chunk,
            top=cfg.top,
            scale=cfg.scale,
            softcap=cfg.softcap,
            impl=ctx.impl,
            **kv_cache.sides(keys, ctx.positions, ctx.segment_ids, ctx.shards),
        )
        return self.gate(ctx.tap("reads", o), x), state
