"""The choice of blocks by attention to means of overlapping spans of keys (InfLLM-V2, arXiv 2509.24663).

p_tc = Σ_{heads of a group} softmax_c(scale · q_t·k̄_c),   span c = the `length` keys of a document from c·stride on
score_tj = max of p_tc over the spans that overlap block j,   both over the spans that end at or before t
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hydrax.core.numerics import bf16_factors
from hydrax.core.typing import Array, Float, Int
from hydrax.ops.dispatch import KERNEL
from hydrax.ops.softmax import forms
from hydrax.ops.sparse.groups import softmax
from hydrax.ops.sparse.pooled import Blocks, causal_block_topk, pooled_keys, seen_blocks


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which blocks a query reads.

    Attributes:
      block, length, stride: tokens of a block, of a span, and from span to span; a multiple of it both.
      first, local: blocks of the start of the document, and before the query's own, that are always read.
      count: blocks that are read, these and the own one among them.
      dense: queries before that position read everything.
      pool: a block scores the largest p of the spans that overlap it, or their sum, each as often as it shares strides
        with the block (arXiv 2502.11089).
    """

    block: int
    length: int
    stride: int
    first: int
    local: int
    count: int
    dense: int = 0
    pool: Literal["max", "sum"] = "max"


def choose_by_spans(
    queries: forms.Queries, sums: Blocks, choice: Choice, scale: float, *, chunk_size: int = 1024
) -> Int[Array, "B T G n"]:
    """Numbers of blocks for every query and head of keys, -1 where there are none left.

    Args:
      sums: of the keys over every `stride` tokens, as of `block_sums`.
    """
    spans = pooled_keys(sums, choice.stride, choice.length)
    ends = jnp.where(spans.segment_ids != 0, spans.numbers * choice.stride + choice.length - 1, forms.FUTURE)
    keys = forms.Keys(spans.x, spans.x[..., :0], ends, spans.segment_ids)
    return choose_by_keys(queries, keys, sums, choice, forms.Rules(scale, None, None, 0, aligned=False), chunk_size)


def choose_by_keys(
    queries: forms.Queries, keys: forms.Keys, sums: Blocks, choice: Choice, rules: forms.Rules, chunk_size: int = 1024
) -> Int[Array, "B T G n"]:
    """The same by the keys of spans, at their last tokens, whatever these are made of; `sums` tell their documents."""
    queries, keys, sums = jax.lax.stop_gradient((queries, keys, sums))
    split = jax.default_backend() == "gpu" and keys.k.dtype == jnp.float32  # most of the time is spent here

    def block(rows: tuple, keys: forms.Keys) -> tuple[Array]:
        (own,) = rows
        q, k = bf16_factors(own.q, keys.k) if split else (own.q, keys.k)
        p = softmax(forms.scores(own._replace(q=q), keys._replace(k=k), rules)).sum(3)
        return (choose(jnp.moveaxis(p, 1, 2), own, sums, choice),)

    (chosen,) = over_spans(block, queries, keys._replace(v=keys.v[..., :0]), choice, rules, chunk_size)
    return checkpoint_name(chosen, KERNEL)


def over_spans(
    f: Callable, queries: forms.Queries, keys: forms.Keys, choice: Choice, rules: forms.Rules, chunk_size: int
) -> tuple:
    """f((queries,), keys) by blocks of queries, of whole rows with the keys that do not all come after them."""
    form = forms.in_prefixes if whole_rows(queries, keys, choice) else forms.in_chunks
    return form(f, (queries,), keys, rules, chunk_size)


def whole_rows(queries: forms.Queries, keys: forms.Keys, choice: Choice) -> bool:
    """Whether the keys are of these queries' tokens: then there is an entry for each stride of them, and no other."""
    return keys.positions.shape[1] == -(-queries.q.shape[1] // choice.stride)


def choose(p: Float[Array, "B T G N"], own: forms.Queries, sums: Blocks, choice: Choice) -> Int[Array, "B T G n"]:
    """Numbers of the blocks of best p, by the first N entries of `sums`; -1 where there are none left."""
    strides = choice.block // choice.stride
    width = min(max(choice.count, -(-choice.dense // choice.block)), -(-sums.numbers.shape[1] // strides) + 1)
    sums = jax.tree.map(lambda x: x[:, : p.shape[-1]], sums)
    chosen = _best(p, own, sums, choice)
    chosen = jnp.pad(chosen, [(0, 0)] * 3 + [(0, max(0, width - chosen.shape[-1]))], constant_values=-1)
    index = jnp.arange(chosen.shape[-1])
    every = jnp.where(index <= (own.positions // choice.block)[..., None], index, -1)[:, :, None]
    return jnp.where((own.positions < choice.dense)[..., None, None], every, chosen).astype(jnp.int32)


def _best(p: Float[Array, "B T G N"], own: forms.Queries, sums: Blocks, choice: Choice) -> Int[Array, "B T G n"]:
    blocks, number = _whole_blocks(sums, choice), own.positions // choice.block
    forced = (blocks.numbers < choice.first)[:, None] | (blocks.numbers[:, None] >= number[..., None] - choice.local)
    seen = seen_blocks(blocks, number, own.segment_ids)
    facts = {"own": number, "numbers": blocks.numbers, "seen": seen, "forced": forced}
    return causal_block_topk(_over_blocks(p, sums, choice), choice.count, **facts)


def _over_blocks(p: Float[Array, "B T G N"], sums: Blocks, choice: Choice) -> Float[Array, "B T G M"]:
    """The p of the spans that overlap each block, the largest or their sum, by the entries of blocks.

    A span has the entry of its last stride. So those of a block end at its strides, or up to a span less one later.
    """
    strides, later = choice.block // choice.stride, choice.length // choice.stride - 1
    N = p.shape[-1]
    wide = jnp.pad(p, [(0, 0)] * 3 + [(strides - 1, later)])
    parts = [wide[..., i : i + N] for i in range(strides + later)]
    if choice.pool == "max":
        best = jnp.stack(parts).max(0)
    else:
        most = min(strides, later + 1)
        shared = [min(i + 1, strides + later - i, most) for i in range(len(parts))]
        best = jnp.stack([x * n for x, n in zip(parts, shared, strict=True)]).sum(0)
    return _by_block(jnp.where(_ends(sums, choice)[:, None, None], best, -jnp.inf), strides)


def _whole_blocks(sums: Blocks, choice: Choice) -> Blocks:
    """Numbers and documents of whole blocks; their entries are those of `block_sums` with their size."""
    strides, ends = choice.block // choice.stride, _ends(sums, choice)
    numbers = _by_block(jnp.where(ends, sums.numbers // strides, 0), strides)
    return Blocks(sums.x[:, :0], numbers, _by_block(jnp.where(ends, sums.segment_ids, 0), strides))


def _ends(sums: Blocks, choice: Choice) -> Array:
    """[B,N]: whether a whole block ends with this stride. The ends of blocks are a block and more apart."""
    strides = choice.block // choice.stride
    return (sums.numbers % strides == strides - 1) & (sums.segment_ids != 0)


def _by_block(x: Array, strides: int) -> Array:
    """The largest of each group of so many entries."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % strides)])
    return x.reshape(*x.shape[:-1], -1, strides).max(-1)
