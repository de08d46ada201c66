"""Spans of tokens made into one token each, and attention to these (NSA, arXiv 2502.11089).

Span c of a document is its `length` tokens from c · stride on. What it is made into begins with a linear map

    u_c = Σ_{i < length} x_{c·stride + i} W_i

and so with sums over strides of tokens, of which every token of a stride has one for each stride of a span, its role.
These can be kept and added to, token by token.
"""

import jax
import jax.numpy as jnp

from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, Float, Int
from hydrax.ops import dispatch, documents
from hydrax.ops.softmax import forms
from hydrax.ops.sparse.groups import softmax
from hydrax.ops.sparse.pooled import Blocks
from hydrax.ops.sparse.span_scores import Choice, choose, choose_by_keys, over_spans, whole_rows

SOFTMAX_KERNELS = "hydrax.ops.softmax.gpu"


def scaled_terms(
    x: Float[Array, "B T G K"], weights: Float[Array, "m n G"], positions: Int[Array, "B T"]
) -> Float[Array, "B T m G K"]:
    """What every token adds to its stride of n tokens, for every role, if W_i is a number."""
    w = jnp.moveaxis(weights, 0, 1)[positions % weights.shape[1]]
    return fp32(x)[:, :, None] * w[..., None]


def mapped_terms(
    x: Float[Array, "B T G K"],
    weights: Float[Array, "m n G K h"],
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> Float[Array, "B T m G h"]:
    """The same if W_i is a matrix, for `pooled.block_sums` and `pooled.add_sums`: the last token of a stride, of those
    that are here, adds what all of them do. Strides that nothing can come of have zeros.
    """
    (B, T), n = positions.shape, weights.shape[1]
    N, index = -(-T // n), jnp.arange(T, dtype=jnp.int32)[None]
    last = index + n - 1 - positions % n
    whole = (last < T) & (jnp.take_along_axis(segment_ids, jnp.minimum(last, T - 1), axis=1) == segment_ids)
    filled, valid = documents.fill_padding(segment_ids)
    entry = jnp.where(filled == filled[:, -1:], N, N + 1)  # N: the stride that the last document leaves open
    entry = jnp.where(valid, jnp.where(whole, last // n, entry), N + 1)
    row = jnp.arange(B)[:, None]
    strides = jnp.zeros_like(fp32(x), shape=(B, N + 1, n, *x.shape[2:]))
    strides = strides.at[row, entry, positions % n].set(fp32(x), mode="drop")
    terms = einsum("bnpgk,mpgkh->bnmgh", strides, weights)
    ends = (entry <= N) & (entry != jnp.pad(entry[:, 1:], [(0, 0), (0, 1)], constant_values=-1))
    return jnp.where(ends[..., None, None, None], terms[row, jnp.minimum(entry, N)], 0)


def spans(sums: Blocks, strides: int) -> Blocks:
    """u [B,N,G,h] of whole spans of so many strides, from the sums [B,N,m,G,h] over these, m = 1 or `strides`.

    A span has the entry of its last stride.
    """
    x, numbers, ids = sums
    u = jnp.zeros_like(x[:, :, 0])
    for i in range(strides):
        later, role = strides - 1 - i, min(i, x.shape[2] - 1)
        u += jnp.pad(x[:, :, role], [(0, 0), (later, 0), (0, 0), (0, 0)])[:, : x.shape[1]]
    return Blocks(u, numbers - (strides - 1), jnp.where(numbers >= strides - 1, ids, 0))


def span_attention(
    queries: forms.Queries,
    keys: forms.Keys,
    sums: Blocks,
    choice: Choice,
    rules: forms.Rules,
    *,
    dtype: jnp.dtype | None = None,
    impl: str | None = None,
    chunk_size: int = 1024,
) -> tuple[Float[Array, "B T G R V"], Int[Array, "B T G n"]]:
    """o_t = Σ_c p_tc v_c over the spans that end at or before t, exactly zero if there are none, and blocks by p.

    Args:
      queries: with their documents.
      keys: of spans, their positions those of the last tokens.
      sums: over strides, as of `block_sums`, for their numbers and documents.
      dtype: of what kernels multiply for o; the choice is by scores in fp32 in any case.
      impl: as of `block_topk_attention`.

    Returns:
      o in fp32, and the numbers of `choice.count` blocks for each head of keys, by the sum of p over its query heads.
      The choice has no gradient.
    """
    if dtype is not None and _kernels_serve(queries, keys, choice, rules, dtype, impl):
        return _by_kernels(queries, keys, choice, rules, dtype), choose_by_keys(queries, keys, sums, choice, rules)

    def block(rows: tuple, keys: forms.Keys) -> tuple[Array, Array]:
        (own,) = rows
        p = softmax(forms.scores(own, keys, rules))
        o = einsum("bgtrs,bsgv->btgrv", p, fp32(keys.v))
        return o, choose(jnp.moveaxis(p.sum(3), 1, 2), own, sums, choice)

    return over_spans(block, queries, keys, choice, rules, chunk_size)


def _kernels_serve(
    queries: forms.Queries, keys: forms.Keys, choice: Choice, rules: forms.Rules, dtype: jnp.dtype, impl: str | None
) -> bool:
    """Whether kernels are wanted, and these are whole rows of what they multiply."""
    wanted = dispatch.named("block_topk_attention", impl) in (None, "pallas_gpu") and dispatch.on_one_device()
    whole = whole_rows(queries, keys, choice) and queries.q.shape[1] > 1 and rules.softcap is None
    low = (jax.ShapeDtypeStruct(x.shape, dtype) for x in (queries.q, keys.k, keys.v))
    return wanted and whole and dispatch.hopper_refusal(SOFTMAX_KERNELS, *low) is None


def _by_kernels(
    queries: forms.Queries, keys: forms.Keys, choice: Choice, rules: forms.Rules, dtype: jnp.dtype
) -> Float[Array, "B T G R V"]:
    from hydrax.ops.sparse import gpu

    (B, T, G, R, K), ids = queries.q.shape, queries.segment_ids
    assert ids is not None
    q, k, v = (x.astype(dtype) for x in (queries.q.reshape(B, T, G * R, K), keys.k, keys.v))
    facts = {"positions": jnp.broadcast_to(queries.positions, ids.shape), "segment_ids": ids}
    o = gpu.span_attention(q, k, v, **facts, length=choice.length, stride=choice.stride, scale=rules.scale)
    return fp32(o).reshape(B, T, G, R, -1)
