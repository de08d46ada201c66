"""Attention that begins anew with every chunk of a document, with biases by distance (Mega, arXiv 2209.10655).

    z_ts = scale · q_t·k_s / n_t + w_{t-s},      o_t = Σ_s f(z_t)_s v_s

over the keys s <= t of the query's own chunk; chunks count from the start of the document. f is a softmax (n_t = 1), or
the distribution function of a Laplace distribution's normal approximation, ½ (1 + erf((z - μ) / (σ √2))), whose weights
have no common denominator; n_t is then the number of keys that t sees.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, Float, Int
from hydrax.ops.dispatch import select
from hydrax.ops.documents import document_positions
from hydrax.ops.softmax import forms

Weights = Literal["softmax", "laplace"]

MEAN, DEVIATION = math.sqrt(0.5), math.sqrt(0.25 / math.pi)
"""μ and σ, with which f is near to relu² around 0."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How scores become weights, and how far a query sees."""

    weights: Weights
    chunk: int
    scale: float


def relative_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S H K"],
    v: Float[Array, "B S H V"],
    table: Float[Array, "H C"] | None = None,
    *,
    chunk: int,
    weights: Weights = "softmax",
    scale: float | None = None,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    cached: int = 0,
    impl: str | None = None,
) -> Float[Array, "B T H V"]:
    """Outputs of the attention above, zero at padding.

    Args:
      table: w, the bias of every distance below C = `chunk`; None: there is none.
      scale: K^-1/2 if None.
      positions, segment_ids: of the queries, 0, 1, 2, ... per document and one document if None.
      kv_positions, kv_segment_ids: of the keys, if they are not those of the queries.
      cached: how many of them come from a cache; what they are is in their positions.
      impl: "recurrent" (the definition), "chunked", or None to choose.

    Raises:
      ValueError: shapes that do not fit, or an unknown `impl`.
    """
    del cached
    (B, T, H, K), S = q.shape, k.shape[1]
    if k.shape != (B, S, H, K) or v.shape[:3] != (B, S, H):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: expected [B,T,H,K], [B,S,H,K], [B,S,H,V]")
    if table is not None and table.shape != (H, chunk):
        raise ValueError(f"table {table.shape}: expected [H,chunk] = {(H, chunk)}")
    aligned = kv_positions is None
    if aligned and S != T:
        raise ValueError(f"k {k.shape}: expected as many keys as queries, or kv_positions")
    if positions is None:
        positions = jnp.arange(T)[None] if segment_ids is None else document_positions(segment_ids)
    rule = Rule(weights, chunk, K**-0.5 if scale is None else scale)
    if weights == "laplace":
        q = (fp32(q) / (positions % chunk + 1)[..., None, None]).astype(q.dtype)
    kv_positions = positions if kv_positions is None else kv_positions
    ends = ((kv_positions // chunk + 1) * chunk - 1)[..., None]  # of the chunk that a key belongs to
    if aligned:  # distances in the row are those in a document, and the same for all rows
        index = jnp.arange(T)[None]
        ends, positions, kv_positions, kv_segment_ids = ends + (index - positions)[..., None], index, index, segment_ids
    queries = forms.Queries(q[:, :, :, None], positions, segment_ids)
    keys = forms.Keys(k, v, kv_positions, kv_segment_ids, ends)
    form = select("relative_attention", impl, FORMS, "chunked", q.shape)
    return form(queries, keys, table, rule, aligned)[:, :, :, 0].astype(v.dtype)


def _attend(
    rows: tuple[forms.Queries], keys: forms.Keys, *, table: Array | None, rule: Rule, rules: forms.Rules
) -> tuple[Array]:
    """o [B,T,H,1,V] of some queries over all keys that they may see."""
    (queries,) = rows
    if table is not None:
        distance = jnp.clip(queries.positions[:, :, None] - keys.positions[:, None], 0, rule.chunk - 1)
        bias = jnp.moveaxis(table[:, distance], 0, 2)  # [B,T,H,S]; what is clipped is masked
        queries = queries._replace(bias=bias[:, :, :, None])
    if rule.weights == "softmax":
        return (forms.attend(queries, keys, None, rules)[0],)
    z = forms.scores(queries, keys, rules)
    p = (1 + jax.lax.erf((z - MEAN) / (DEVIATION * math.sqrt(2)))) / 2
    p = jnp.where(z > forms.MASKED / 2, p, 0)
    return (einsum("bgtrs,bsgv->btgrv", p.astype(keys.v.dtype), keys.v),)


def recurrent(queries: forms.Queries, keys: forms.Keys, table: Array | None, rule: Rule, aligned: bool) -> Array:
    """The definition: one query at a time, in fp32."""
    queries, keys = queries._replace(q=fp32(queries.q)), keys._replace(k=fp32(keys.k), v=fp32(keys.v))
    return _blocks(queries, keys, table, rule, aligned=False, size=1)


def chunked(queries: forms.Queries, keys: forms.Keys, table: Array | None, rule: Rule, aligned: bool) -> Array:
    """Many queries at a time, over the keys in reach where queries and keys are the same tokens."""
    return _blocks(queries, keys, table, rule, aligned, size=128)


def _blocks(
    queries: forms.Queries, keys: forms.Keys, table: Array | None, rule: Rule, aligned: bool, size: int
) -> Array:
    rules = forms.Rules(rule.scale, None, rule.chunk, 0, aligned)
    f = functools.partial(_attend, table=None if table is None else fp32(table), rule=rule, rules=rules)
    return forms.in_chunks(f, (queries,), keys, rules, size)[0]


FORMS = {"recurrent": recurrent, "chunked": chunked}
