"""Mixture of block attention (arXiv 2502.13189): every query reads the blocks whose mean keys it likes best.

    S_t = the block of t, and of the whole blocks n before it the `top` - 1 of largest q_t·k̄_n
    o_t = Σ_{s <= t, s in S_t} softmax_s(K^-½ q_t·k_s) v_s

k̄_n is the mean of a block's keys after RoPE, q and k̄ in fp32 without rounding before. Blocks count from the start of
the document. The choice has no parameters and no gradient. It is that of each query head, or of the heads of a group
together, by their mean score.
"""

import dataclasses
from typing import Literal, TypeAlias

import jax.numpy as jnp

from hydrax.core.build import Positive
from hydrax.core.typing import Array, Int, PyTree
from hydrax.mixers.base import Context, SoftmaxConfig, SoftmaxMixer
from hydrax.nn import chosen_blocks
from hydrax.nn.chosen_blocks import BlockConfig
from hydrax.ops.softmax.forms import Queries
from hydrax.ops.sparse.pooled import Blocks, choose_blocks, pooled_keys


@dataclasses.dataclass(frozen=True)
class Config(BlockConfig, SoftmaxConfig):
    block: Positive = 256  # tokens per block
    top: Positive = 4  # blocks that a query reads, its own among them
    route: Literal["query", "kv"] = "query"  # who chooses: every query head, or the heads of a group together
    decode: Literal["sparse", "full"] = "sparse"  # of calls with one token: as in training, or over all keys


class BlockAttention(SoftmaxMixer):
    """y = W_o (o ⊙ σ(W_g x)); the state holds keys, values and sums over blocks of keys of the whole document."""

    Config: TypeAlias = Config

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg = self.cfg

        def choose(queries: Queries, sums: Blocks) -> Int[Array, "B T G n"]:
            return choose_blocks(queries, pooled_keys(sums, cfg.block), cfg.block, cfg.top, apart=cfg.route == "query")

        dense = cfg.decode == "full" and x.shape[1] == 1
        o, state = chosen_blocks.attend(self.qkv, cfg, choose, x, ctx, state, dense=dense)
        return self.gate(ctx.tap("reads", o), x), state

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return self.cfg.init_state(batch, max_len, dtype)
