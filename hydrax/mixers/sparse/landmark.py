"""Landmark attention (arXiv 2305.16300): the last token of every section, its landmark, weighs what is in it.

    z_t = Σ_{s in the section of t} p_ts v_s + Σ_c p_t,landmark(c) Σ_{s in c} softmax_s(K^-½ q_t·k_s) v_s,   c complete,
    p = softmax of K^-½ q_t·k_s over the section of t (but its landmark) and the landmarks before it

A section is `section` tokens and a landmark, counted from the start of the document: `data.landmark_every` puts the
landmarks there. Training reads all sections; `retrieve` reads those of the best landmarks alone where there is a cache,
which is an approximation of what was trained and not what training computes.
"""

import dataclasses
from typing import Literal, TypeAlias

from hydrax.core.build import Positive
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, SoftmaxConfig, SoftmaxMixer
from hydrax.nn import kv_cache
from hydrax.parallel.sequence import landmark_attention


@dataclasses.dataclass(frozen=True)
class Config(SoftmaxConfig):
    section: Positive = 63  # tokens per landmark
    retrieve: Positive | None = None  # inference alone: earlier sections that a token reads; None: all, as in training
    retrieve_scope: Literal["head", "kv_head"] = "head"  # who chooses them: every head, or all that share their keys


class LandmarkAttention(SoftmaxMixer):
    """y = W_o (z ⊙ σ(W_g x)); the state holds the keys and values of the whole document."""

    Config: TypeAlias = Config

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg = self.cfg
        top = None if state is None else cfg.retrieve
        q, keys, state = self.qkv.see(x, ctx, state)
        o = landmark_attention(
            q,
            keys.k,
            keys.v,
            size=cfg.section + 1,
            top=top,
            over_heads=cfg.retrieve_scope == "kv_head",
            scale=cfg.scale,
            softcap=cfg.softcap,
            impl=ctx.impl,
            **kv_cache.sides(keys, ctx.positions, ctx.segment_ids, ctx.shards),
        )
        return self.gate(ctx.tap("reads", o), x), state
