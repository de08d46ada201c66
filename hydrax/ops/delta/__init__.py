"""Matrix state with the delta rule: what a key already holds is replaced by the new value, in proportion to beta.

    S̃_t = diag(exp g_t) S_{t-1},      S_t = S̃_t + beta_t k_t (v_t - S̃_tᵀ k_t)ᵀ,      o_t = scale · S_tᵀ q_t

Covers DeltaNet (arXiv 2406.06484), Gated DeltaNet (2412.06464) and Kimi Delta Attention (2510.26692). Keys are
expected with norm <= 1 and beta in [0, 2]: beyond that the recurrence itself grows without bound.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float, Int
from hydrax.ops import layout
from hydrax.ops.delta import forms
from hydrax.ops.dispatch import select_fast
from hydrax.ops.identity import as_matrix, identity_values


def _fused(*inputs: Any, scale: float, form: Callable) -> tuple[Array, Array]:
    from hydrax.ops.delta import gpu
    from hydrax.ops.pallas import step

    if inputs[0].shape[1] == 1:
        return step.step(form, scale, *inputs)
    return gpu.fused(*inputs, scale=scale)


def _on_tpu(*inputs: Any, scale: float) -> tuple[Array, Array]:
    from hydrax.ops.delta import tpu
    from hydrax.ops.pallas.tpu import require

    require("delta_rule", *inputs[:3])
    return tpu.chunked(*inputs, scale=scale)


FORMS: dict[str, Callable] = {
    "recurrent": forms.recurrent,
    "chunked": forms.chunked,
    "pallas_gpu": _fused,
    "pallas_tpu": _on_tpu,
}


def delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T Hv V"],
    beta: Float[Array, "B T Hv"],
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
      beta: write strengths.
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
    inputs = tree.alike((q, k, v, beta, log_decay, segment_ids, initial_state))
    form = select_fast(
        "delta_rule", impl, FORMS, "hydrax.ops.delta.gpu", q, k, v, log_decay, step="hydrax.ops.pallas.step"
    )
    if form is _fused:
        definition = functools.partial(_by_form, forms.recurrent, scale)
        jax.eval_shape(definition, *inputs)  # refuses shapes that do not fit
        return _fused(*inputs, scale=scale, form=definition)
    if form is _on_tpu:
        return _by_form(functools.partial(form, scale=scale), 1.0, *inputs)
    if form is forms.chunked and chunk_size is not None:
        form = functools.partial(form, chunk_size=chunk_size)
    return _by_form(form, scale, *inputs)


def _by_form(
    form: Callable,
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    log_decay: Array | None,
    segment_ids: Array | None,
    initial_state: Array | None,
) -> tuple[Array, Array]:
    """The op by one of the forms of grouped values."""
    inputs, seg, valid = _grouped(q, k, v, beta, log_decay, segment_ids)
    o, state = form(*inputs, seg, layout.grouped_state(initial_state, *inputs[1:3]))
    o = (o * scale).astype(v.dtype).reshape(v.shape)
    return o if valid is None else o * valid[:, :, None, None], state.reshape(-1, *v.shape[2:3], *state.shape[-2:])


def summarize(
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T Hv V"],
    beta: Float[Array, "B T Hv"],
    log_decay: Array | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B Hv K K"], Float[Array, "B Hv K V"]]:
    """The map over all T tokens, S_out = M S_in + U.

    A document change inside the tokens makes M zero. Composition: (M_b M_a, M_b U_a + U_b) for a, then b.
    """
    # The recurrence acts on every value column alike: K more columns, zero in v and the identity in S, become M.
    V, K = v.shape[-1], k.shape[-1]
    v = jnp.concatenate([v, jnp.zeros((*v.shape[:-1], K), v.dtype)], axis=-1)
    identity = jnp.concatenate([jnp.zeros((K, V)), jnp.eye(K)], axis=-1)
    state = tree.alike(jnp.broadcast_to(identity, (v.shape[0], v.shape[2], K, V + K)), v)
    (q, k, v, beta, g), seg, _ = _grouped(k, k, v, beta, log_decay, segment_ids)
    _, S = forms.chunked(q, k, v, beta, g, seg, layout.grouped_state(state, k, v))
    S = S.reshape(state.shape)
    return S[..., V:], S[..., :V]


def attention_matrix(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    beta: Float[Array, "B T Hv"],
    log_decay: Array | None = None,
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B Hv T T"]:
    """What values become outputs by, from a state of zeros: o_i = Σ_j A_ij v_j, in fp32.

        A_ij = scale · q_iᵀ P_i ... P_(j+1) k_j beta_j  for j <= i in one document, else 0,
        P_t = (I - beta_t k_t k_tᵀ) diag(exp g_t)

    Raises:
      ValueError: shapes that do not fit, or more than 4096 tokens.
    """
    identity = identity_values(q, beta.shape[-1])
    o, _ = delta_rule(fp32(q), fp32(k), identity, beta, log_decay, scale=scale, segment_ids=segment_ids)
    return as_matrix(o)


def _grouped(q: Array, k: Array, v: Array, beta: Array, g: Array | None, segment_ids: Array | None) -> tuple:
    """(q, k, v, beta, g) in the common layout, without effect at padding; ids with padding filled; real tokens."""
    H, Hv = q.shape[2], v.shape[2]
    g = layout.canonical_decay(q, k, v, g)
    if beta.shape != v.shape[:3]:
        raise ValueError(f"beta {beta.shape}: expected {v.shape[:3]}")
    seg, valid, (k, v, beta, g) = layout.at_padding(segment_ids, k, v, fp32(beta), g)
    v = v.reshape(*v.shape[:2], H, Hv // H, -1)
    return (q, k, v, beta.reshape(v.shape[:4]), g), seg, valid
