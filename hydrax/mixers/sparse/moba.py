"""Mixture of block attention (arXiv 2502.13189): every query reads the blocks whose mean keys it likes best.

    S_t = the block of t, and of the whole blocks n before it the `top` - 1 of largest q_t·k̄_n
    o_t = Σ_{s <= t, s in S_t} softmax_s(K^-½ q_t·k_s) v_s

k̄_n is the mean of a block's keys after RoPE, q and k̄ in fp32 without rounding before. Blocks count from the start of
the document. The choice has no parameters and no gradient. It is that of each query head, or of the heads of a group
together, by their mean score.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, Positive
from hydrax.core.numerics import wide
from hydrax.core.typing import Array, Int, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn import kv_cache
from hydrax.nn.attention import QKV, AttentionConfig, OutGate
from hydrax.nn.linear import Linear
from hydrax.ops.softmax.forms import Queries
from hydrax.ops.sparse import block_topk_attention, pooled
from hydrax.parallel.sequence import over_all_keys


@dataclasses.dataclass(frozen=True)
class Config(AttentionConfig, MixerConfig):
    lifetimes: ClassVar[str] = "by content"

    block: Positive = 256  # tokens per block
    top: Positive = 4  # blocks that a query reads, its own among them
    route: Literal["query", "kv"] = "query"  # who chooses: every query head, or the heads of a group together
    decode: Literal["sparse", "full"] = "sparse"  # of calls with one token: as in training, or over all keys

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv == "shared":
            raise ConfigError("kv", self.kv, "expected own: the sums over blocks are of the layer's own keys")

    @property
    def stride(self) -> int:
        """Tokens that every entry of the sums stands for."""
        return self.block

    def fill(self, d_model: int) -> "Config":
        return self.with_head_width(self.key_dim or per_head(d_model, self.heads))


class BlockAttention(Mixer):
    """y = W_o (o ⊙ σ(W_g x)); the state holds keys, values and sums over strides of keys of the whole document."""

    Config: ClassVar[type[MixerConfig]] = Config

    def __init__(self, d_model: int, cfg: Any, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.qkv = QKV(d_model, cfg, rngs=rngs)
        self.gate = OutGate(d_model, cfg, rngs=rngs)
        axes = ("heads", "head_dim", "embed")
        shape = (cfg.heads, cfg.value_dim)
        self.project = Linear(shape, d_model, axes=axes, bias=cfg.out_bias, residual=True, rngs=rngs)

    def choose(self, queries: Queries, sums: pooled.Blocks) -> Int[Array, "B T G n"]:
        """The blocks that every query reads; `sums` are of keys over every `stride` tokens."""
        cfg = self.cfg
        means = pooled.pooled_keys(sums, cfg.stride)
        return pooled.choose_blocks(queries, means, cfg.block, cfg.top, apart=cfg.route == "query")

    def dense(self, tokens: int) -> bool:
        """Whether a call of so many tokens after a state reads all keys."""
        return self.cfg.decode == "full" and tokens == 1

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg = self.cfg
        facts: dict[str, Any] = {"positions": ctx.positions, "segment_ids": ctx.segment_ids}
        fine_q, fine_k, v = self.qkv(x, ctx.positions, exact=True)
        assert fine_k is not None
        q, k, v = fine_q.astype(x.dtype), fine_k.astype(x.dtype), ctx.tap("values", v)
        ids = jnp.ones_like(ctx.positions) if ctx.segment_ids is None else ctx.segment_ids
        own = {"positions": ctx.positions, "segment_ids": ids}
        rows = {"q": q, "fine": fine_q, **own}
        if state is None:
            o = over_all_keys(self._trained(ctx), rows, {"k": k, "v": v, "fine": fine_k, **own}, ctx.shards)
            return self.gate(ctx.tap("reads", o), x), None
        keys = kv_cache.in_order(k, v, state["cache"], **facts)
        if self.dense(x.shape[1]):
            o = kv_cache.attend(q, keys, **facts, scale=cfg.scale, softcap=cfg.softcap, impl=ctx.impl)
        else:
            blocks = pooled.block_sums(fine_k, cfg.stride, ctx.positions, ids, state["sums"])
            o = self._read(ctx, rows, blocks, keys)
        sums = pooled.add_sums(state["sums"], fine_k, cfg.stride, ctx.positions, ids)
        return self.gate(ctx.tap("reads", o), x), {"cache": kv_cache.write(state["cache"], k, v, **facts), "sums": sums}

    def _trained(self, ctx: Context) -> Callable[[dict[str, Array], dict[str, Array]], Array]:
        """o of some queries by all keys of their rows."""

        def f(rows: dict[str, Array], keys: dict[str, Array]) -> Array:
            sums = pooled.block_sums(keys["fine"], self.cfg.stride, keys["positions"], keys["segment_ids"])
            places = () if ctx.shards is None else (keys["positions"], keys["segment_ids"])
            return self._read(ctx, rows, sums, kv_cache.Keys(keys["k"], keys["v"], *places))

        return f

    def _read(self, ctx: Context, rows: dict[str, Array], sums: pooled.Blocks, keys: kv_cache.Keys) -> Array:
        cfg = self.cfg
        positions, ids = rows["positions"], rows["segment_ids"]
        by_group = rows["fine"].reshape(*rows["q"].shape[:2], keys.k.shape[2], -1, rows["q"].shape[3])
        idx = self.choose(Queries(by_group, positions, ids), sums)
        return block_topk_attention(
            rows["q"],
            keys.k,
            keys.v,
            idx,
            block_size=cfg.block,
            scale=cfg.scale,
            softcap=cfg.softcap,
            positions=positions,
            segment_ids=ids,
            kv_positions=keys.positions,
            kv_segment_ids=keys.segment_ids,
            impl=ctx.impl,
        )

    def out(self, z: Array) -> Array:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        shape = (batch, -(-max_len // cfg.stride), cfg.kv_heads, cfg.key_dim)
        return {"cache": cfg.init_cache(batch, max_len, dtype), "sums": jnp.zeros(shape, wide(dtype))}
