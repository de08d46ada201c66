"""A memory of M slots per head, each with a key and a value that decay and are written for every token.

    K̃_t = diag(exp g_t) K̃_{t-1} + w_t k_tᵀ,      Ṽ_t = diag(exp g_t) Ṽ_{t-1} + w_t v_tᵀ,
    o_t = Ṽ_tᵀ softmax(scale · K̃_t q_t)

Covers ABC (arXiv 2110.02488) and gated slot attention (2409.07146). Slots of `slot_softmax` have no keys: they average
the values under scores of their own. The letter M stands for slots everywhere here.
"""

import functools

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import MIN_LOG_DECAY, fp32, wide
from hydrax.core.typing import Array, Float, Int
from hydrax.ops import documents, layout, linear
from hydrax.ops.dispatch import select
from hydrax.ops.identity import as_matrix, identity_values
from hydrax.ops.scan import linear_scan
from hydrax.ops.slots import forms

FORMS = {"recurrent": forms.recurrent, "chunked": forms.chunked}
SOFTMAX = {"recurrent": forms.softmax_recurrent, "chunked": forms.softmax_chunked}


def slot_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    write: Float[Array, "B T H M"],
    log_decay: Float[Array, "B T H M"],
    *,
    scale: float | None = None,
    initial_state: tuple[Float[Array, "B H M K"], Float[Array, "B H M V"]] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], tuple[Float[Array, "B H M K"], Float[Array, "B H M V"]]]:
    """Outputs and final state of the recurrence above.

    Slots that hold nothing yet score 0 in the softmax, and are not masked.

    Args:
      q, k, v: queries, keys and values.
      write: how much of the token each slot takes.
      log_decay: g <= 0.
      scale: factor on the scores of the slots, K^-1/2 if None.
      initial_state: (K̃, Ṽ) before token 0, belonging to the document of token 0; zeros if None.
      segment_ids: documents; the state restarts at each change of id, and id 0 (right padding) leaves it alone.
      impl: "recurrent" (the definition), "chunked", or None to choose.
      chunk_size: tokens per chunk of the chunked form (a multiple of 16); results do not depend on it.

    Returns:
      o in the dtype of v, zero at padding, and the final (K̃, Ṽ) in fp32.

    Raises:
      ValueError: shapes that do not fit, or an unknown `impl`.
    """
    state = _state(q, k, v, write, log_decay, initial_state)
    seg, valid, (k, v, w, g) = layout.at_padding(segment_ids, k, v, fp32(write), fp32(log_decay))
    form = select("slot_attention", impl, FORMS, "recurrent" if q.shape[1] == 1 else "chunked", q.shape)
    if form is forms.chunked and chunk_size is not None:
        form = functools.partial(form, chunk_size=chunk_size)
    o, state = form(q, k, v, w, g, seg, state, scale=q.shape[-1] ** -0.5 if scale is None else scale)
    o = o.astype(v.dtype)
    return o if valid is None else o * valid[:, :, None, None], state


def slot_softmax(
    q: Float[Array, "B T H M"],
    scores: Float[Array, "B T H M"],
    v: Float[Array, "B T H V"],
    *,
    initial_state: tuple[Int[Array, "B H M"], Float[Array, "B H M V"], Float[Array, "B H M"]] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], tuple[Int[Array, "B H M"], Float[Array, "B H M V"], Float[Array, "B H M"]]]:
    """Every slot averages the values so far by the softmax of its own scores, a query mixes the slots.

        o_t = Σ_m q_tm Σ_{j<=t} e^{s_jm} v_j / Σ_{j<=t} e^{s_jm}

    The state (p, n, d) holds the two sums over the document as e^p n and e^p d: the integer p, within 8 of the largest
    score, keeps them in range. States of adjacent tokens make p = max(p_1, p_2), n = e^{p_1-p} n_1 + e^{p_2-p} n_2, and
    d alike. Covers the running softmax of arXiv 2510.11602 and 2405.13956.

    Args:
      q: how much of each slot is read.
      scores: s, of any size; those beyond ±1e5 count as that.
      v: values.
      initial_state: (p, n, d) before token 0, belonging to the document of token 0; zeros, or None, are empty slots.
      segment_ids: documents; the state restarts at each change of id, and id 0 (right padding) leaves it alone.
      impl: "recurrent" (the definition), "chunked", or None to choose.
      chunk_size: tokens per chunk of the chunked form (a multiple of 16); results do not depend on it.

    Returns:
      o in the dtype of v, zero at padding, and the final state: int32 exponents, numerators and denominators in fp32.

    Raises:
      ValueError: shapes that do not fit, or an unknown `impl`.
    """
    state = _average(q, scores, v, initial_state)
    s = jnp.clip(fp32(scores), -forms.MAX_SCORE, forms.MAX_SCORE)
    seg, valid, (v,) = layout.at_padding(segment_ids, v)
    s = s if valid is None else tree.where(valid, s, jnp.full_like(s, 2 * forms.NOTHING))
    form = select("slot_softmax", impl, SOFTMAX, "recurrent" if q.shape[1] == 1 else "chunked", q.shape)
    if form is forms.softmax_chunked and chunk_size is not None:
        form = functools.partial(form, chunk_size=chunk_size)
    o, state = form(fp32(q), s, v, seg, state)
    o = o.astype(v.dtype)
    return o if valid is None else o * valid[:, :, None, None], state


def summarize(
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    write: Float[Array, "B T H M"],
    log_decay: Float[Array, "B T H M"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B H M"], tuple[Float[Array, "B H M K"], Float[Array, "B H M V"]]]:
    """The map over all T tokens, K̃_out = P ⊙ K̃_in + U_K and Ṽ_out = P ⊙ Ṽ_in + U_V: P, (U_K, U_V).

    A document change inside the tokens makes P zero. Composition: (P_b P_a, P_b U_a + U_b) for a, then b.
    """
    P, U = linear.summarize(fp32(write), jnp.concatenate([k, v], axis=-1), log_decay, segment_ids=segment_ids)
    return P, (U[..., : k.shape[-1]], U[..., k.shape[-1] :])


def attention_matrix(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    write: Float[Array, "B T H M"],
    log_decay: Float[Array, "B T H M"],
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B H T T"]:
    """What values become outputs by, from a state of zeros: o_i = Σ_j A_ij v_j, in fp32.

        A_ij = Σ_m p_im w_jm exp(g_(j+1)m + ... + g_im)  for j <= i in one document, else 0,
        p_i = softmax(scale · K̃_i q_i)

    Raises:
      ValueError: shapes that do not fit, or more than 4096 tokens.
    """
    identity = identity_values(q, q.shape[2])
    o, _ = slot_attention(fp32(q), fp32(k), identity, write, log_decay, scale=scale, segment_ids=segment_ids)
    return as_matrix(o)


def softmax_decay(
    logits: Float[Array, "B T H M"],
    *,
    initial_state: Float[Array, "B H M"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T H M"], Float[Array, "B H M"]]:
    """The log-decay g_t = log(z_{t-1} / z_t) with z_t = Σ_{i<=t} e^{s_i}, from the logits s; and the final z, in fp32.

    With it and write = 1 - e^g the slots are running averages: K̃_t = Σ_i e^{s_i} k_i / z_t. z restarts with each
    document and is kept as it is, not as a logarithm, so that zero means "nothing yet": |s| <= 32 keeps it in range.
    """
    s = fp32(logits)
    new = jnp.exp(s)
    z = jnp.zeros_like(new[:, 0]) if initial_state is None else initial_state.astype(new.dtype)
    sums, final = linear_scan(jnp.ones_like(new), new, initial_state=z, segment_ids=segment_ids, impl=impl)
    past = jnp.concatenate([z[:, None], sums[:, :-1]], axis=1)
    if segment_ids is not None:
        past = tree.where(documents.changes(segment_ids), jnp.zeros_like(past), past)
    # Where nothing is past, the token replaces the slot: any decay will do, but its gradient must be zero.
    g = -jax.nn.softplus(s - jnp.log(jnp.where(past > 0, past, 1)))
    return jnp.where(past > 0, g, MIN_LOG_DECAY), final


def _state(q: Array, k: Array, v: Array, w: Array, g: Array, initial: tuple | None) -> tuple[Array, Array]:
    """The state before token 0 in fp32, after checking every shape."""
    (B, T, H, K), V, M = q.shape, v.shape[-1], w.shape[-1]
    if k.shape != q.shape or v.shape[:3] != (B, T, H):
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: expected [B,T,H,K] twice and [B,T,H,V]")
    if w.shape != (B, T, H, M) or g.shape != w.shape:
        raise ValueError(f"write {w.shape}, log_decay {g.shape}: expected {(B, T, H)} and slots, twice")
    shapes = (B, H, M, K), (B, H, M, V)
    if initial is None:
        return jnp.zeros(shapes[0], wide(v.dtype)), jnp.zeros(shapes[1], wide(v.dtype))
    if (initial[0].shape, initial[1].shape) != shapes:
        raise ValueError(f"initial_state {initial[0].shape}, {initial[1].shape}: expected {shapes[0]}, {shapes[1]}")
    return fp32(initial[0]), fp32(initial[1])


def _average(q: Array, s: Array, v: Array, initial: tuple | None) -> tuple[Array, Array, Array]:
    """The state of `slot_softmax` before token 0, after checking every shape."""
    (B, T, H, M), V = q.shape, v.shape[-1]
    if s.shape != q.shape or v.shape[:3] != (B, T, H):
        raise ValueError(f"q {q.shape}, scores {s.shape}, v {v.shape}: expected [B,T,H,M] twice and [B,T,H,V]")
    shapes = (B, H, M), (B, H, M, V), (B, H, M)
    if initial is None:
        dtypes = jnp.int32, wide(v.dtype), wide(v.dtype)
        exponents, numerators, denominators = map(jnp.zeros, shapes, dtypes)
        return exponents, numerators, denominators
    if tuple(x.shape for x in initial) != shapes:
        raise ValueError(f"initial_state {', '.join(str(x.shape) for x in initial)}: expected {shapes}")
    return initial[0], fp32(initial[1]), fp32(initial[2])
