"""The choice of blocks by attention to means of overlapping spans of keys (InfLLM-V2, arXiv 2509.24663).

p_tc = Σ_{heads of a group} softmax_c(scale · q_t·k̄_c),   span c = the `length` keys of a document from c·stride on
score_tj = max of p_tc over the spans that overlap block j,   both over the spans that end at or before t
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hydrax.core.numerics import einsum, fp32
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
    queries: forms.Queries, sums: Blocks, choice: Choice, scale: float, *, chunk_size: int = 128
) -> Int[Array, "B T G n"]:
    """Numbers of blocks for every query and head of keys, -1 where there are none left.

    Args:
      sums: of the keys over every `stride` tokens, as of `block_sums`.
    """
    queries, sums = jax.lax.stop_gradient((queries, sums))
    spans = pooled_keys(sums, choice.stride, choice.length)
    count = -(-sums.numbers.shape[1] // (choice.block // choice.stride))
    width = min(max(choice.count, -(-choice.dense // choice.block)), count + 1)

    def block(rows: tuple, keys: forms.Keys) -> tuple[Array]:
        (own,) = rows
        number, t = own.positions // choice.block, own.positions[..., None]
        ends = spans.numbers[:, None] * choice.stride + choice.length - 1
        visible = (ends <= t) & (spans.segment_ids[:, None] != 0)
        if own.segment_ids is not None:
            visible &= spans.segment_ids[:, None] == own.segment_ids[..., None]
        z = einsum("btgrk,bngk->btgrn", fp32(own.q), keys.k) * scale
        p = softmax(jnp.where(visible[:, :, None, None], z, forms.MASKED)).sum(3)
        chosen = choose(p, own, sums, choice)
        chosen = jnp.pad(chosen, [(0, 0)] * 3 + [(0, max(0, width - chosen.shape[-1]))], constant_values=-1)
        index = jnp.arange(chosen.shape[-1])
        every = jnp.where(index <= number[..., None], index, -1)[:, :, None]
        return (jnp.where((own.positions < choice.dense)[..., None, None], every, chosen),)

    bare = forms.Keys(spans.x, spans.x[..., :0], spans.numbers, spans.segment_ids)
    rules = forms.Rules(scale, None, None, 0, aligned=False)
    (chosen,) = forms.in_chunks(block, (queries,), bare, rules, chunk_size)
    return checkpoint_name(chosen.astype(jnp.int32), KERNEL)


def choose(p: Float[Array, "B T G N"], own: forms.Queries, sums: Blocks, choice: Choice) -> Int[Array, "B T G n"]:
    """Numbers of the blocks of best p, by the entries of `sums`; -1 where there are none left."""
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
