"""InfLLM-V2 (arXiv 2509.24663): softmax attention to blocks chosen by attention to means of spans of keys.

    p_tc = Σ_{heads of a group} softmax_c(K^-½ q_t·k̄_c),   k̄_c the mean of the `kernel` keys from c · `stride` on
    S_t = the first `init_blocks` blocks, the own one and `local` before it, and of the others those with the largest
          max of p_tc over the spans c that overlap them: `topk` + `local` in all
    o_t = Σ_{s <= t, s in S_t} softmax_s(K^-½ q_t·k_s) v_s

The first `dense_len` tokens of a document attend to all before them. There is nothing to learn beside attention, which
can become this and this attention. Spans are of keys as they are attended to, after RoPE, or, with `use_nope`, before
it, as their queries then are. The choice has no gradient.
"""

import dataclasses
from typing import TypeAlias

import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, NonNegative, Positive
from hydrax.core.typing import Array, Int, PyTree
from hydrax.mixers.base import Context, SoftmaxConfig, SoftmaxMixer
from hydrax.nn import chosen_blocks
from hydrax.nn.attention import QKV
from hydrax.nn.chosen_blocks import BlockConfig
from hydrax.nn.position import Rope
from hydrax.ops.softmax.forms import Queries
from hydrax.ops.sparse.pooled import Blocks
from hydrax.ops.sparse.span_scores import Choice, choose_by_spans


@dataclasses.dataclass(frozen=True)
class Config(BlockConfig, SoftmaxConfig):
    block: Positive = 64  # tokens per block
    topk: Positive = 64  # blocks beside the local ones: the own one, the first ones, and the best
    init_blocks: NonNegative = 1  # blocks of the start of the document that are always read
    local: NonNegative = 32  # blocks before the own one that are always read
    kernel: Positive = 32  # tokens of a span whose mean is scored
    stride: Positive = 16  # tokens from span to span
    dense_len: NonNegative = 8192  # tokens of a document up to which attention is dense
    use_nope: bool = False  # blocks are chosen by queries and keys without positions

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block", "kernel"):
            if getattr(self, name) % self.stride:
                raise ConfigError(name, getattr(self, name), f"expected a multiple of stride = {self.stride}")
        if self.topk <= self.init_blocks:
            raise ConfigError("topk", self.topk, f"expected more than init_blocks = {self.init_blocks}")

    @property
    def unit(self) -> int:
        return self.stride

    @property
    def choice(self) -> Choice:
        """The same as the op wants it."""
        count = self.topk + self.local
        return Choice(self.block, self.kernel, self.stride, self.init_blocks, self.local, count, self.dense_len)

    @property
    def reads(self) -> int:
        """Tokens that a query reads, at most."""
        return max(self.dense_len, self.block * self.choice.count)


class SpanScoredAttention(SoftmaxMixer):
    """y = W_o (o ⊙ σ(W_g x)); the state holds keys, values and sums over strides of keys of the whole document."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        bare = dataclasses.replace(cfg, rope=Rope(fraction=0.0))
        self.qkv = QKV(d_model, bare if cfg.use_nope else cfg, rngs=rngs)
        self.read_out(d_model, rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg = self.cfg
        assert cfg.key_dim is not None
        scale = cfg.scale or cfg.key_dim**-0.5

        def choose(queries: Queries, sums: Blocks) -> Int[Array, "B T G n"]:
            return choose_by_spans(queries, sums, cfg.choice, scale)

        o, state = chosen_blocks.attend(self.qkv, cfg, choose, x, ctx, state, placed=not cfg.use_nope)
        return self.gate(ctx.tap("reads", o), x), state

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return self.cfg.init_state(batch, max_len, dtype)
