"""InfLLM-V2 (arXiv 2509.24663): softmax attention to blocks chosen by attention to means of spans of keys.

    p_tc = Σ_{heads of a group} softmax_c(K^-½ q_t·k̄_c),   k̄_c the mean of the `kernel` keys from c · `stride` on
    S_t = the first `init_blocks` blocks, the own one and `local` before it, and of the others those with the largest
          max of p_tc over the spans c that overlap them: `topk` + `local` in all
    o_t = Σ_{s <= t, s in S_t} softmax_s(K^-½ q_t·k_s) v_s

The first `dense_len` tokens of a document attend to all before them. There is nothing to learn beside attention, which
can become this and this attention. Keys are as they are attended to, after RoPE. The choice has no gradient.
"""

import dataclasses
from typing import ClassVar

from hydrax.core.build import ConfigError, NonNegative, Positive
from hydrax.core.typing import Array, Int
from hydrax.mixers.base import MixerConfig, per_head
from hydrax.mixers.sparse.moba import BlockAttention
from hydrax.nn.attention import AttentionConfig
from hydrax.ops.softmax.forms import Queries
from hydrax.ops.sparse.pooled import Blocks
from hydrax.ops.sparse.span_scores import Choice, choose_by_spans


@dataclasses.dataclass(frozen=True)
class Config(AttentionConfig, MixerConfig):
    lifetimes: ClassVar[str] = "by content"

    block: Positive = 64  # tokens per block
    topk: Positive = 64  # blocks beside the local ones: the own one, the first ones, and the best
    init_blocks: NonNegative = 1  # blocks of the start of the document that are always read
    local: NonNegative = 32  # blocks before the own one that are always read
    kernel: Positive = 32  # tokens of a span whose mean is scored
    stride: Positive = 16  # tokens from span to span
    dense_len: NonNegative = 8192  # tokens of a document up to which attention is dense

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block", "kernel"):
            if getattr(self, name) % self.stride:
                raise ConfigError(name, getattr(self, name), f"expected a multiple of stride = {self.stride}")
        if self.topk <= self.init_blocks:
            raise ConfigError("topk", self.topk, f"expected more than init_blocks = {self.init_blocks}")
        if self.kv == "shared":
            raise ConfigError("kv", self.kv, "expected own: the sums over strides are of the layer's own keys")

    def fill(self, d_model: int) -> "Config":
        return self.with_head_width(self.key_dim or per_head(d_model, self.heads))

    @property
    def choice(self) -> Choice:
        """The same as the op wants it."""
        count = self.topk + self.local
        return Choice(self.block, self.kernel, self.stride, self.init_blocks, self.local, count, self.dense_len)

    @property
    def reads(self) -> int:
        """Tokens that a query reads, at most."""
        return max(self.dense_len, self.block * self.choice.count)


class SpanScoredAttention(BlockAttention):
    """`BlockAttention` with another choice; the sums are over strides."""

    Config: ClassVar[type[MixerConfig]] = Config

    def choose(self, queries: Queries, sums: Blocks) -> Int[Array, "B T G n"]:
        cfg = self.cfg
        return choose_by_spans(queries, sums, cfg.choice, cfg.scale or cfg.key_dim**-0.5)

    def dense(self, tokens: int) -> bool:
        return False
