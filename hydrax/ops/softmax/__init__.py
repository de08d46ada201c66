"""Softmax attention over documents, windows and caches, with sinks, soft-cap, bias and log-sum-exp.

    z_ts = softcap(scale · q_t·k_s + bias_ts),      o_t = Σ_s e^{z_ts} v_s / (Σ_s e^{z_ts} + e^{sink}),   s visible to t

Key s is visible to query t in the same document (id 0 never is), at p_s <= p_t <= end_s, if p_t - p_s < window or
p_s < sink_tokens, and dilation divides p_t - p_s. Papers: arXiv 1706.03762, grouped heads 2305.13245, sink tokens
2309.17453.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float, Int
from hydrax.ops import documents
from hydrax.ops.dispatch import hopper_refusal, named, on_one_device, select
from hydrax.ops.identity import as_matrix, identity_values
from hydrax.ops.softmax import forms

FORMS = {
    "recurrent": forms.recurrent,
    "xla": forms.attend,
    "chunked": forms.chunked,
    "cudnn": forms.cudnn,
    "pallas_gpu": forms.pallas_gpu,
}

DENSE = 4096
"""Tokens up to which cuDNN is given documents as a dense mask."""

LONG = 2048
"""Keys from which scores are formed by blocks of queries."""


def attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S Hk K"],
    v: Float[Array, "B S Hk V"],
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: Float[Array, "H"] | None = None,
    sink_tokens: int = 0,
    dilation: int = 1,
    softcap: float | None = None,
    bias: Float[Array, "#B #H T S"] | None = None,
    ends: Int[Array, "#B S #Hk"] | None = None,
    alive: int | None = None,
    key_bias: Float[Array, "#B S #Hk"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S *#Hk"] | None = None,
    kv_positions: Int[Array, "B S *#Hk"] | None = None,
    impl: str | None = None,
    return_lse: bool = False,
    chunk_size: int | None = None,
) -> Any:
    """Outputs of the attention above.

    Args:
      q, k, v: kv head h serves the query heads h·R .. h·R + R - 1, R = H / Hk.
      scale: factor on the scores, K^-1/2 if None.
      window: visible keys including the query's own; None: all of the past.
      sinks: score of an empty key that every query of the head sees.
      sink_tokens: first tokens of each document that stay visible outside the window.
      dilation: only keys at a multiple of so many tokens before the query are visible.
      softcap: c·tanh(z/c), after the biases and before the mask.
      ends: position in the document of the last query that sees the key, for each head of keys.
      alive: most keys of one document that live at once by these ends, if that is known: it saves work.
      key_bias: added to all scores of a key.
      segment_ids, positions: document of each query and its index in the document; 0, 1, 2, ... per document if None.
      kv_segment_ids, kv_positions: the same for the keys, or for each head of keys; if None, those of the queries
        (T = S), else 0, 1, 2, ...
      impl: "recurrent" (the definition), "xla", "chunked", "cudnn", "pallas_gpu" (a Hopper GPU, bfloat16, K and V 64 or
        128), or None to choose.
      return_lse: also return the logarithm of the denominator (sinks included), differentiable, for `merge`.
      chunk_size: queries per block of the chunked form; results do not depend on it.

    Returns:
      o [B,T,H,V] in the dtype of v, exactly zero where no key is visible; with `return_lse` (o, lse fp32 [B,T,H]),
      lse = -inf where neither key nor sink is.

    Raises:
      ValueError: shapes that do not fit, an unknown `impl`, or a named one that cannot serve, with the reason.
    """
    _check_shapes(q, k, v, window, sinks, bias)
    _check_keys(k, dilation, ends=ends, key_bias=key_bias)
    (B, T, H, K), S = q.shape, k.shape[1]
    groups = (k.shape[2], H // k.shape[2])
    aligned = T == S and kv_segment_ids is None and kv_positions is None
    if aligned:
        kv_segment_ids, kv_positions = segment_ids, positions
    if (segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("segment_ids, kv_segment_ids: expected both or neither where keys are not the queries' own")
    if bias is not None:  # rows first, as in q
        bias = jnp.moveaxis(bias.reshape(bias.shape[0], *((1, 1) if bias.shape[1] == 1 else groups), T, S), 3, 1)
    queries = forms.Queries(q.reshape(B, T, *groups, K), _positions(positions, segment_ids, T), segment_ids, bias)
    keys = forms.Keys(k, v, _positions(kv_positions, kv_segment_ids, S), kv_segment_ids, ends, key_bias)
    sink_tokens = 0 if window is None else sink_tokens
    rules = forms.Rules(K**-0.5 if scale is None else scale, softcap, window, sink_tokens, aligned, dilation, alive)
    refusals = {
        "cudnn": _cudnn_refusal(queries, keys, sinks, rules, return_lse),
        "pallas_gpu": _refusal(queries, rules) or hopper_refusal("hydrax.ops.softmax.gpu", q, k, v),
    }
    if refusal := refusals.get(named("attention", impl) or ""):
        raise ValueError(f"attention: impl = {named('attention', impl)!r} cannot serve: {refusal}")
    form = select("attention", impl, FORMS, _default(refusals, queries, keys), q.shape)
    if form is forms.chunked and chunk_size is not None:
        form = functools.partial(form, chunk_size=chunk_size)
    o, lse = form(queries, keys, None if sinks is None else sinks.reshape(groups), rules)
    o = o.reshape(B, T, H, -1).astype(v.dtype)
    return (o, lse.reshape(B, T, H)) if return_lse else o


def attention_matrix(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: Float[Array, "H"] | None = None,
    sink_tokens: int = 0,
    softcap: float | None = None,
    bias: Float[Array, "#B #H T T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    **of_keys: Any,
) -> Float[Array, "B H T T"]:
    """The weight of every key in every query's output, in fp32. Rows sum to 1, or less where sinks take a part.

    `of_keys`: `ends`, `key_bias` and `dilation` of `attention`.

    Raises:
      ValueError: shapes that do not fit, or more than 4096 tokens.
    """
    o = attention(
        fp32(q),
        fp32(k),
        identity_values(k, k.shape[2]),
        scale=scale,
        window=window,
        sinks=sinks,
        sink_tokens=sink_tokens,
        softcap=softcap,
        bias=bias,
        segment_ids=segment_ids,
        positions=positions,
        **of_keys,
    )
    return as_matrix(o)


def merge(*parts: tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]) -> tuple[Array, Array]:
    """Attention over the union of disjoint key sets, from (o, lse) of each; returns (o, lse). Gradients are exact."""
    lses = jnp.stack([lse for _, lse in parts])
    top = jax.lax.stop_gradient(lses.max(0))
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(lses - top)
    total = weights.sum(0)
    some = total > 0
    total = jnp.where(some, total, 1)
    o = sum(w[..., None] * fp32(o) for w, (o, _) in zip(weights, parts, strict=True)) / total[..., None]
    return o.astype(parts[0][0].dtype), jnp.where(some, top + jnp.log(total), -jnp.inf)


def _positions(positions: Array | None, segment_ids: Array | None, length: int) -> Array:
    if positions is not None:
        return positions
    return jnp.arange(length)[None] if segment_ids is None else documents.document_positions(segment_ids)


def _check_shapes(q: Array, k: Array, v: Array, window: int | None, sinks: Array | None, bias: Array | None) -> None:
    (B, T, H, K), S = q.shape, k.shape[1]
    if k.shape[0] != B or k.shape[3] != K or v.shape[:3] != k.shape[:3] or H % k.shape[2]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: expected [B,T,H,K], [B,S,Hk,K], [B,S,Hk,V], H = R·Hk")
    if window is not None and window < 1:
        raise ValueError(f"window = {window}: expected at least 1 (the query's own key)")
    if sinks is not None and sinks.shape != (H,):
        raise ValueError(f"sinks {sinks.shape}: expected {(H,)}")
    if bias is not None and (bias.shape[0] not in (1, B) or bias.shape[1] not in (1, H) or bias.shape[2:] != (T, S)):
        raise ValueError(f"bias {bias.shape}: expected [{B} or 1, {H} or 1, {T}, {S}]")


def _check_keys(k: Array, dilation: int, **of_keys: Array | None) -> None:
    B, S, G = k.shape[:3]
    if dilation < 1:
        raise ValueError(f"dilation = {dilation}: expected at least 1 (every key)")
    for name, x in of_keys.items():
        if x is not None and (x.ndim != 3 or x.shape[0] not in (1, B) or x.shape[1] != S or x.shape[2] not in (1, G)):
            raise ValueError(f"{name} {x.shape}: expected [{B} or 1, {S}, {G} or 1]")


def _default(refusals: Mapping[str, str | None], queries: forms.Queries, keys: forms.Keys) -> str:
    """The form that serves, fastest first: of documents cuDNN forms a dense mask."""
    kernels = [("cudnn", queries.segment_ids is None), ("pallas_gpu", on_one_device()), ("cudnn", True)]
    slow = "chunked" if queries.q.shape[1] > 1 and keys.k.shape[1] >= LONG else "xla"
    return next((name for name, suits in kernels if suits and refusals[name] is None), slow)


def _refusal(queries: forms.Queries, rules: forms.Rules) -> str | None:
    """Why no kernel can serve these inputs, or None."""
    reasons = {
        "serves self-attention only, without a cache": not rules.aligned,
        "has no softcap": rules.softcap is not None,
        "gives no gradient of a bias of scores": queries.bias is not None,
        "has no dilation with sink_tokens, or that does not divide the row": (
            rules.dilation > 1 and not forms.separable(queries, rules)
        ),
        "serves more than one token": queries.q.shape[1] == 1,
    }
    return next((f"it {reason}" for reason, holds in reasons.items() if holds), None)


def _cudnn_refusal(
    queries: forms.Queries, keys: forms.Keys, sinks: Array | None, rules: forms.Rules, return_lse: bool
) -> str | None:
    """Why cuDNN cannot serve these inputs, or None."""
    T, K, V = queries.q.shape[1], keys.k.shape[-1], keys.v.shape[-1]
    dtypes = {x.dtype for x in (queries.q, keys.k, keys.v)}
    reasons = {
        "runs on NVIDIA GPUs only": jax.default_backend() != "gpu",
        "needs q, k and v all bfloat16 or all float16": dtypes not in ({jnp.dtype("bfloat16")}, {jnp.dtype("float16")}),
        "needs V = K": V != K,
        "needs K <= 128 and a multiple of 8": K > 128 or K % 8 != 0,
        f"takes documents (segment_ids) in rows of up to {DENSE} tokens, a multiple of 128": (
            queries.segment_ids is not None and (T > DENSE or T % 128 != 0)
        ),
        "has no sinks": sinks is not None,
        "has no sink_tokens": rules.sink_tokens > 0,
        "has no ends or biases of keys": keys.ends is not None or keys.bias is not None,
        "has no dilation": rules.dilation > 1,
        "gives no differentiable lse": return_lse,
        "needs an even number of tokens": T % 2 != 0,
    }
    refused = next((f"it {reason}" for reason, holds in reasons.items() if holds), None)
    return _refusal(queries, rules) or refused
