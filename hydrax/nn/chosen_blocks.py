"""Softmax attention to blocks of keys that are chosen by sums of keys: what its mixers share beside the choice.

The state is {"cache": keys and values, "sums": fp32 [B,S,Hk,K]}, sums of keys over every `unit` tokens of the document,
of the open unit as well. What is chosen by never had less than fp32: rounded to bfloat16 it would rank otherwise.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from hydrax.core.build import ConfigError, Positive
from hydrax.core.numerics import wide
from hydrax.core.typing import Array, Float, PyTree
from hydrax.nn import kv_cache
from hydrax.nn.attention import QKV, AttentionConfig
from hydrax.ops.softmax.forms import Queries
from hydrax.ops.sparse import block_topk_attention, pooled
from hydrax.parallel.sequence import over_all_keys
from hydrax.parallel.shards import Shards

Choose = Callable[[Queries, pooled.Blocks], Array]
"""Of the blocks [B,T,G,n] that every query reads, by queries and sums of keys in fp32."""


@dataclasses.dataclass(frozen=True)
class BlockConfig(AttentionConfig):
    lifetimes: ClassVar[str] = "by content"

    block: Positive = 64  # tokens per block

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv == "shared":
            raise ConfigError("kv", self.kv, "expected own: the sums are of the layer's own keys")

    @property
    def unit(self) -> int:
        """Tokens per sum."""
        return self.block

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        """The state before the first token."""
        shape = (batch, -(-max_len // self.unit), self.kv_heads, self.key_dim)
        return {"cache": self.init_cache(batch, max_len, dtype), "sums": jnp.zeros(shape, wide(dtype))}


class Rows(NamedTuple):
    """Queries, or keys, and the same in fp32; where they are."""

    x: Array
    fine: Array
    positions: Array
    segment_ids: Array


def attend(
    qkv: QKV,
    cfg: BlockConfig,
    choose: Choose,
    x: Float[Array, "B T D"],
    ctx: Any,
    state: PyTree | None,
    *,
    dense: bool = False,
    placed: bool = True,
) -> tuple[Float[Array, "B T H V"], PyTree]:
    """o and the state after these tokens; `dense`: all keys are read, after a state.

    Args:
      ctx: the context of the mixer (`mixers.Context`).
      placed: False: queries and keys of `qkv` have no positions. They choose as they are, and turn to attend.
    """
    facts = ctx.places
    fine_q, fine_k, v = qkv(x, ctx.positions, exact=True)
    assert fine_k is not None
    near_q, near_k = (a if placed else cfg.rope.turn(a, ctx.positions) for a in (fine_q, fine_k))
    q, k, v = near_q.astype(x.dtype), near_k.astype(x.dtype), ctx.tap("values", v)
    ids = ctx.ids
    rows = Rows(q, fine_q, ctx.positions, ids)
    if state is None:
        return _trained(cfg, choose, rows, Rows(k, fine_k, ctx.positions, ids), v, ctx.shards, ctx.impl), None
    keys = kv_cache.in_order(k, v, state["cache"], **facts)
    if dense:
        o = kv_cache.attend(q, keys, **facts, scale=cfg.scale, softcap=cfg.softcap, impl=ctx.impl)
    else:
        blocks = pooled.block_sums(fine_k, cfg.unit, ctx.positions, ids, state["sums"])
        o = _read(cfg, choose, rows, blocks, keys, ctx.impl)
    sums = pooled.add_sums(state["sums"], fine_k, cfg.unit, ctx.positions, ids)
    return o, {"cache": kv_cache.write(state["cache"], k, v, **facts), "sums": sums}


def _trained(
    cfg: BlockConfig, choose: Choose, rows: Rows, keys: Rows, v: Array, shards: Shards | None, impl: str | None
) -> Array:
    """o of whole rows, on the devices that share them."""

    def f(rows: Rows, given: tuple[Rows, Array]) -> Array:
        keys, v = given
        sums = pooled.block_sums(keys.fine, cfg.unit, keys.positions, keys.segment_ids)
        places = () if shards is None else (keys.positions, keys.segment_ids)
        return _read(cfg, choose, rows, sums, kv_cache.Keys(keys.x, v, *places), impl)

    return over_all_keys(f, rows, (keys, v), shards)


def _read(
    cfg: BlockConfig, choose: Choose, rows: Rows, sums: pooled.Blocks, keys: kv_cache.Keys, impl: str | None
) -> Array:
    by_group = rows.fine.reshape(*rows.x.shape[:2], keys.k.shape[2], -1, rows.x.shape[3])
    return block_topk_attention(
        rows.x,
        keys.k,
        keys.v,
        choose(Queries(by_group, rows.positions, rows.segment_ids), sums),
        block_size=cfg.block,
        scale=cfg.scale,
        softcap=cfg.softcap,
        positions=rows.positions,
        segment_ids=rows.segment_ids,
        kv_positions=keys.positions,
        kv_segment_ids=keys.segment_ids,
        impl=impl,
    )
