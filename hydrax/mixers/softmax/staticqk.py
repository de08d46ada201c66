"""Softmax attention whose queries and keys do not see the layers below (arXiv 2510.11602): they are made of the token
embeddings e, in every layer, and the values of the input.

    q_t = W_q norm(e_t),      k_t = W_k norm(e_t),      o_t = Σ_{j<=t} softmax_j(K^-½ q_t·k_j) W_v x_j
"""

import dataclasses
from typing import TypeAlias

import jax.numpy as jnp

from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, SoftmaxConfig, SoftmaxMixer
from hydrax.ops.rowwise import rms_norm


@dataclasses.dataclass(frozen=True)
class Config(SoftmaxConfig):
    """What all softmax mixers have."""


class StaticQK(SoftmaxMixer):
    """y = W_o (attention(q, k, v) ⊙ σ(W_g x)); outside a model, which tells the embeddings, e = x.

    Embeddings are small and not those of a normed input. Their RMS norm has no weight: W_q and W_k have one each.
    """

    Config: TypeAlias = Config

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        e = x if ctx.embeddings is None else ctx.embeddings
        q, keys, state = self.qkv.see(x, ctx, state, rms_norm(jnp.asarray(e)))
        return self.gate(ctx.tap("reads", self.attend(q, keys, ctx)), x), state
