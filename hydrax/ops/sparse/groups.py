"""Attention in two levels: keys weigh among those of their group, and groups among each other.

A group is `size` consecutive tokens of a document, counted from its start; its last token stands for it. With z_ts the
scores, c(t) the group of query t and softmax over what each line names,

    chunk_attention     o_t = Σ_{s in c(t), c(t)-1} softmax(z) v
                              + g_t Σ_{chosen c < c(t)} softmax_c(q_t·k̄_c) Σ_{s in c} softmax(z) v
    landmark_attention  o_t = Σ_{s in c(t)} p_ts v + Σ_{c < c(t)} p_t,last(c) Σ_{s in c} softmax(z) v,
                        p = softmax(z) over the tokens of c(t) up to t, and the last tokens of the groups before

where k̄_c is the mean of a group's keys and the last token of a group, its landmark, gives no value (arXiv 2105.14039,
2305.16300).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, Bool, Float, Int
from hydrax.ops import documents
from hydrax.ops.dispatch import KERNEL, select
from hydrax.ops.softmax import forms
from hydrax.ops.softmax.forms import MASKED


def _recurrent(f: Callable, rows: tuple, keys: forms.Keys, rules: forms.Rules) -> tuple:
    """The definition: one query at a time, in fp32."""
    queries, *others = rows
    rows = (queries._replace(q=fp32(queries.q)), *others)
    return forms.in_chunks(f, rows, keys._replace(k=fp32(keys.k), v=fp32(keys.v)), rules, 1)


FORMS: dict[str, Callable] = {"recurrent": _recurrent, "chunked": functools.partial(forms.in_chunks, chunk_size=128)}


def chunk_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S Hk K"],
    v: Float[Array, "B S Hk V"],
    gate: Float[Array, "B T H"],
    *,
    size: int,
    top: int,
    impl: str | None = None,
    **facts: Any,
) -> Float[Array, "B T H V"]:
    """The first line above: every query reads `top` complete groups before its own, those whose mean scores highest.

    Args:
      q, k, v: kv head h serves the query heads h·R .. h·R + R - 1, R = H / Hk.
      gate: g.
      facts: scale, softcap, positions, segment_ids, kv_positions, kv_segment_ids as of `ops.softmax.attention`; of the
        keys the first `cached` (0) are those of a cache, where position p is in slot p.
      impl: "recurrent" (the definition), "chunked", or None to choose.

    Returns:
      o in the dtype of v. What is chosen has no gradient, and of equal scores the earlier group wins.
    """
    queries, keys, rules, last = _sides(q, k, v, size, **facts)
    means = _sums(keys.k, last) / size
    run = functools.partial(select("chunk_attention", impl, FORMS, "chunked", q.shape), rules=rules)

    def scored(queries: forms.Queries, keys: forms.Keys) -> Array:
        """q·k̄ of the groups before the query's, at their last tokens."""
        r = forms.scores(queries, keys._replace(k=means), rules)
        return jnp.where(_before(queries, keys, size) & _landmarks(keys, last), r, MASKED)

    def choose(rows: tuple, keys: forms.Keys) -> tuple[Array]:
        return _best(scored(rows[0], keys), top)

    def read(rows: tuple, keys: forms.Keys) -> tuple[Array]:
        queries, gate, chosen = rows
        z, before = forms.scores(queries, keys, rules), _before(queries, keys, size)
        near = softmax(jnp.where(_before(queries, keys, size, 1), MASKED, z))
        group = softmax(jnp.where(_at(chosen, z.shape[-1]), scored(queries, keys), MASKED))
        inner = within(jnp.where(before, z, MASKED), last)
        return _read(near + jnp.moveaxis(gate, 1, 2)[..., None] * of_group(group, last) * inner, keys)

    chosen = _chosen(run, choose, queries, keys)
    (o,) = run(read, (queries, fp32(gate).reshape(queries.q.shape[:4]), chosen), keys)
    return o.reshape(*q.shape[:3], -1)


def landmark_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S Hk K"],
    v: Float[Array, "B S Hk V"],
    *,
    size: int,
    top: int | None = None,
    over_heads: bool = False,
    impl: str | None = None,
    **facts: Any,
) -> Float[Array, "B T H V"]:
    """The second line above; arguments and errors are those of `chunk_attention`.

    Args:
      top: read only so many groups before a query's own, those whose landmarks score highest; None: all of them.
      over_heads: the query heads of a kv head choose the same groups, by their highest score.
    """
    queries, keys, rules, last = _sides(q, k, v, size, **facts)
    run = functools.partial(select("landmark_attention", impl, FORMS, "chunked", q.shape), rules=rules)

    def scored(queries: forms.Queries, keys: forms.Keys) -> Array:
        """The scores of the landmarks before the query's group."""
        return jnp.where(
            _before(queries, keys, size) & _landmarks(keys, last), forms.scores(queries, keys, rules), MASKED
        )

    def choose(rows: tuple, keys: forms.Keys) -> tuple[Array]:
        z = scored(rows[0], keys)
        return _best(jnp.broadcast_to(z.max(3, keepdims=True), z.shape) if over_heads else z, top or 0)

    def read(rows: tuple, keys: forms.Keys) -> tuple[Array]:
        queries, *chosen = rows
        z, before = forms.scores(queries, keys, rules), _before(queries, keys, size)
        landmark = (keys.positions % size == size - 1)[:, None, None, None]
        seen = landmark == before
        if chosen:
            seen &= ~before | _at(chosen[0], z.shape[-1])
        outer = softmax(jnp.where(seen, z, MASKED))
        inner = within(jnp.where(before & ~landmark, z, MASKED), last)
        return _read(jnp.where(before, of_group(outer, last) * inner, jnp.where(landmark, 0, outer)), keys)

    rows = (queries,) if top is None else (queries, _chosen(run, choose, queries, keys))
    (o,) = run(read, rows, keys)
    return o.reshape(*q.shape[:3], -1)


def softmax(z: Float[Array, "*n S"]) -> Float[Array, "*n S"]:
    """e^z / Σ e^z, 0 at `MASKED` scores."""
    top = jax.lax.stop_gradient(jnp.maximum(z.max(-1, keepdims=True), MASKED / 2))
    p = jnp.exp(z - top)
    total = p.sum(-1, keepdims=True)
    return p / jnp.where(total > 0, total, 1)


def within(z: Float[Array, "B *n S"], last: Int[Array, "B S"]) -> Float[Array, "B *n S"]:
    """`softmax` among the keys with the same entry in `last`, 0 where that is S."""
    S = z.shape[-1]

    def one_row(z: Array, last: Array) -> Array:
        top = jnp.full_like(z, MASKED / 2, shape=(*z.shape[:-1], S + 1)).at[..., last].max(jax.lax.stop_gradient(z))
        p = jnp.where(last < S, jnp.exp(z - jax.lax.stop_gradient(top)[..., last]), 0)
        total = jnp.zeros_like(z, shape=(*z.shape[:-1], S + 1)).at[..., last].add(p)[..., last]
        return p / jnp.where(total > 0, total, 1)

    return jax.vmap(one_row)(z, last)


def of_group(x: Float[Array, "B *n S"], last: Int[Array, "B S"]) -> Float[Array, "B *n S"]:
    """For every key, what x has at the last token of its group; 0 where there is none."""
    return jax.vmap(lambda x, last: jnp.where(last < x.shape[-1], x[..., jnp.minimum(last, x.shape[-1] - 1)], 0))(
        x, last
    )


def group_ends(
    positions: Int[Array, "B S"], segment_ids: Int[Array, "B S"], size: int, cached: int = 0
) -> Int[Array, "B S"]:
    """The index of the last token of every key's group; S where that is not there (yet)."""
    S, index = positions.shape[1], jnp.arange(positions.shape[1])
    first = positions[:, min(cached, S - 1), None]
    place = jnp.where(index < cached, positions - first, index - cached)  # counted from the first new token
    last = place + size - 1 - positions % size
    at = jnp.clip(jnp.where(last < 0, last + first, last + cached), 0, S - 1)
    same = jnp.take_along_axis(segment_ids, at, axis=1) == segment_ids
    return jnp.where((last < S - cached) & same & (segment_ids != 0), at, S)


def _sides(
    q: Array,
    k: Array,
    v: Array,
    size: int,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    positions: Array | None = None,
    segment_ids: Array | None = None,
    kv_positions: Array | None = None,
    kv_segment_ids: Array | None = None,
    cached: int = 0,
) -> tuple[forms.Queries, forms.Keys, forms.Rules, Array]:
    """Queries by heads of keys, keys, rules, and the last token of every key's group."""
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    ids = jnp.ones((B, T), jnp.int32) if segment_ids is None else segment_ids
    positions = documents.document_positions(ids) if positions is None else positions
    kv_ids = ids if S == T and kv_segment_ids is None else kv_segment_ids
    kv_positions = positions if kv_positions is None else kv_positions
    if kv_ids is None:
        kv_ids = jnp.ones((B, S), jnp.int32)
    queries = forms.Queries(q.reshape(B, T, G, H // G, K), jnp.broadcast_to(positions, (B, T)), ids)
    keys = forms.Keys(k, v, jnp.broadcast_to(kv_positions, (B, S)), kv_ids)
    rules = forms.Rules(K**-0.5 if scale is None else scale, softcap, None, 0, aligned=False)
    return queries, keys, rules, group_ends(keys.positions, kv_ids, size, cached)


def _before(queries: forms.Queries, keys: forms.Keys, size: int, back: int = 0) -> Bool[Array, "B 1 T 1 S"]:
    """Whether a key stands before the query's group, and `back` groups more."""
    start = (queries.positions // size - back) * size
    return (keys.positions[:, None] < start[..., None])[:, None, :, None]


def _landmarks(keys: forms.Keys, last: Int[Array, "B S"]) -> Bool[Array, "B 1 1 1 S"]:
    """Whether a key is the last of its group."""
    return (last == jnp.arange(last.shape[1]))[:, None, None, None]


def _sums(x: Float[Array, "B S *n"], last: Int[Array, "B S"]) -> Float[Array, "B S *n"]:
    """The sum over each group in fp32, at its last token."""
    zeros = jnp.zeros_like(fp32(x), shape=(x.shape[0], x.shape[1] + 1, *x.shape[2:]))
    return jax.vmap(lambda total, at, x: total.at[at].add(x))(zeros, last, fp32(x))[:, :-1]


def _best(z: Float[Array, "B G T R S"], top: int) -> tuple[Int[Array, "B T G R n"]]:
    """Where the highest scores are, -1 for those that are masked."""
    z, at = jax.lax.top_k(fp32(z), min(top, z.shape[-1]))
    return (jnp.moveaxis(jnp.where(z > MASKED / 2, at, -1), 1, 2).astype(jnp.int32),)


def _chosen(run: Callable, choose: Callable, queries: forms.Queries, keys: forms.Keys) -> Int[Array, "B T G R n"]:
    """Chosen once: a backward pass that ran the scores again might round them otherwise."""
    given = jax.lax.stop_gradient(((queries,), keys))
    return checkpoint_name(run(choose, *given)[0], KERNEL)


def _at(chosen: Int[Array, "B T G R n"], S: int) -> Bool[Array, "B G T R S"]:
    """Which of the S keys these are."""
    at = jnp.where(chosen < 0, S, chosen)
    marks = jnp.zeros_like(at, bool, (*at.shape[:-1], S + 1))
    return jnp.moveaxis(jnp.put_along_axis(marks, at, True, axis=-1, inplace=False)[..., :S], 1, 2)


def _read(weights: Float[Array, "B G T R S"], keys: forms.Keys) -> tuple[Float[Array, "B T G R V"]]:
    return (einsum("bgtrs,bsgv->btgrv", weights.astype(keys.v.dtype), keys.v).astype(keys.v.dtype),)
