"""Additive matrix state: linear attention without, with scalar, or with vector decay.

    S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ,      o_t = scale · S_tᵀ q_t

Covers linear attention (arXiv 2006.16236), RetNet (2307.08621), Lightning (2405.17381), GLA (2312.06635) and
Mamba-2 (2405.21060).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import clamp_decay, fp32
from hydrax.core.typing import Array, Float, Int
from hydrax.ops import layout
from hydrax.ops.dispatch import select_fast
from hydrax.ops.identity import as_matrix, identity_values
from hydrax.ops.linear import forms


def _fused(*inputs: Any, scale: float, form: Callable) -> tuple[Array, Array]:
    from hydrax.ops.linear import gpu
    from hydrax.ops.pallas import step

    if inputs[0].shape[1] == 1:
        return step.step(form, scale, *inputs)
    return gpu.fused(*inputs, scale=scale, form=form)


def _on_tpu(*inputs: Any, scale: float) -> tuple[Array, Array]:
    from hydrax.ops.linear import tpu
    from hydrax.ops.pallas.tpu import require

    require("linear_attention", *inputs[:3])
    return tpu.chunked(*inputs, scale=scale)


FORMS: dict[str, Callable] = {
    "recurrent": forms.recurrent,
    "chunked": forms.chunked,
    "pallas_gpu": _fused,
    "pallas_tpu": _on_tpu,
}


def linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T Hv V"],
    log_decay: Array | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B Hv K V"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T Hv V"], Float[Array, "B Hv K V"]]:
    """Outputs and final state of the recurrence above.

    Args:
      q, k: queries and keys; query/key head h serves the value heads h·R .. h·R + R - 1, R = Hv / H.
      v: values; Hv is a multiple of H.
      log_decay: g <= 0. None (no decay), [Hv] (constant), [B,T,Hv] (scalar per head) or [B,T,H,K] (vector).
      scale: factor on the output, K^-1/2 if None.
      initial_state: state before token 0, belonging to the document of token 0; zeros if None.
      segment_ids: documents; the state restarts at each change of id, and id 0 (right padding) leaves it alone.
      impl: "recurrent" (the definition), "chunked", "pallas_gpu" (a Hopper GPU, bfloat16; of one token any dtype),
        "pallas_tpu" (a TPU, bfloat16 or float32; by name only, since it was not timed), or None to choose.
      chunk_size: tokens per chunk of the chunked form (a multiple of 16); results do not depend on it.

    Returns:
      o in the dtype of v, zero at padding, and the final state in fp32.

    Raises:
      ValueError: shapes that do not fit, or an `impl` that is unknown or cannot serve.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = tree.alike((q, k, v, log_decay, segment_ids, initial_state))
    form = select_fast(
        "linear_attention", impl, FORMS, "hydrax.ops.linear.gpu", q, k, v, log_decay, step="hydrax.ops.pallas.step"
    )
    if form is _fused:
        by_xla = functools.partial(by_form, forms.recurrent if q.shape[1] == 1 else forms.chunked, scale)
        jax.eval_shape(by_xla, *inputs)  # refuses shapes that do not fit
        return _fused(*inputs, scale=scale, form=by_xla)
    if form is _on_tpu:
        return by_form(functools.partial(form, scale=scale), 1.0, *inputs)
    if form is forms.chunked and chunk_size is not None:
        form = functools.partial(form, chunk_size=chunk_size)
    return by_form(form, scale, *inputs)


def by_form(
    form: Callable,
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    log_decay: Array | None,
    segment_ids: Array | None,
    initial_state: Array | None,
) -> tuple[Array, Array]:
    """The op by one of the forms of grouped values."""
    B, T, H, K = q.shape
    g = layout.canonical_decay(q, k, v, log_decay)
    seg, valid, (k, v, g) = layout.at_padding(segment_ids, k, v, g)
    grouped = v.reshape(B, T, H, -1, v.shape[-1])
    o, state = form(q, k, grouped, g, seg, layout.grouped_state(initial_state, k, grouped))
    o = (o * scale).astype(v.dtype).reshape(v.shape)
    return o if valid is None else o * valid[:, :, None, None], state.reshape(B, -1, K, v.shape[-1])


def summarize(
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T Hv V"],
    log_decay: Array | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Array, Float[Array, "B Hv K V"]]:
    """The map over all T tokens, S_out = M ⊙ S_in + U: M as [B,Hv,1] or [B,Hv,K], and U.

    A document change inside the tokens makes M zero. Composition: (M_b M_a, M_b U_a + U_b) for a, then b.
    """
    B, T, H, K = k.shape
    g = layout.canonical_decay(k, k, v, log_decay)
    seg, _, (k, v, g) = layout.at_padding(segment_ids, k, v, g)
    grouped = v.reshape(B, T, H, -1, v.shape[-1])
    R = grouped.shape[3]
    _, U = forms.chunked(k, k, grouped, g, seg, layout.grouped_state(None, k, grouped))
    M = jnp.exp(clamp_decay(g).sum(1))
    if seg is not None:
        M = M * (seg[:, 0] == seg[:, -1])[:, None, None, None]
    M = jnp.broadcast_to(M, (B, H, R, M.shape[-1]))
    return M.reshape(B, H * R, -1), U.reshape(B, H * R, K, -1)


def attention_matrix(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    log_decay: Array | None = None,
    *,
    value_heads: int | None = None,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B Hv T T"]:
    """What values become outputs by, from a state of zeros: o_i = Σ_j A_ij v_j, in fp32.

        A_ij = scale · Σ_d q_id k_jd exp(g_(j+1)d + ... + g_id)  for j <= i in one document, else 0

    Args:
      value_heads: Hv; if None, the heads of a decay per value head, else H.

    Raises:
      ValueError: shapes that do not fit, or more than 4096 tokens.
    """
    if value_heads is None:
        value_heads = q.shape[2] if log_decay is None or log_decay.ndim == 4 else log_decay.shape[-1]
    identity = identity_values(q, value_heads)
    o, _ = linear_attention(fp32(q), fp32(k), identity, log_decay, scale=scale, segment_ids=segment_ids)
    return as_matrix(o)
