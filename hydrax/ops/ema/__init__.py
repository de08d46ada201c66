"""Exponential moving averages with fixed decays: N real or complex modes for every channel, read as one sum.

    h_t = e^{g + iθ} ⊙ h_{t-1} + p x_t,      y_t = Re Σ_n γ_n h_tn

Covers the averages of Mega (arXiv 2209.10655, θ = 0) and Megalodon (2404.08801). Decays that depend on the token are
those of `ops.scan`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import clamp_decay, fp32, wide
from hydrax.core.typing import Array, Float, Int
from hydrax.ops import layout
from hydrax.ops.dispatch import select
from hydrax.ops.ema import forms
from hydrax.ops.identity import as_matrix, identity_values

FORMS: dict[str, Callable] = {"recurrent": forms.recurrent, "chunked": forms.chunked}


def ema(
    x: Float[Array, "B T D"],
    log_decay: Float[Array, "D N"],
    write: Float[Array, "D N"],
    read: Array,
    angle: Float[Array, "D N"] | None = None,
    *,
    initial_state: Array | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T D"], Array]:
    """The sums y of the averages above, and the last h.

    Args:
      x: what is averaged.
      log_decay: g <= 0; what is below -50 counts as that, a decay of 0.
      write: p.
      read: γ [D,N], real or, beside angles, complex.
      angle: θ in radians; None: all modes are real.
      initial_state: h before token 0 [B,D,N], belonging to the document of token 0; zeros if None.
      segment_ids: documents; h restarts at each change of id, and id 0 (right padding) leaves it alone.
      impl: "recurrent" (the definition), "chunked", or None to choose.
      chunk_size: tokens per chunk of the chunked form (64): D·C² numbers hold what a channel does within a chunk.

    Returns:
      y in the dtype of x, zero at padding, and the final h [B,D,N] in fp32, or complex64 where there are angles.

    Raises:
      ValueError: shapes that do not fit, or an unknown `impl`.
    """
    log_q, write, read = _modes(x, log_decay, write, read, angle)
    seg, valid, (x,) = layout.at_padding(segment_ids, x)
    h = _state(x, log_q, initial_state)
    x, seg, valid, h, log_q, write, read = tree.alike((x, seg, valid, h, log_q, write, read))
    form = select("ema", impl, FORMS, "recurrent" if x.shape[1] == 1 else "chunked", x.shape)
    how = {"chunk_size": chunk_size} if chunk_size is not None and form is forms.chunked else {}
    y, h = form(x, log_q, write, read, seg, valid, h, **how)
    y = y.astype(x.dtype)
    return y if valid is None else y * valid[..., None], h


def summarize(
    x: Float[Array, "B T D"],
    log_decay: Float[Array, "D N"],
    write: Float[Array, "D N"],
    angle: Float[Array, "D N"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Array, Array]:
    """The map over all T tokens, h_out = M ⊙ h_in + U; M and U are [B,D,N].

    A document change inside the tokens makes M zero. Composition: (M_b M_a, M_b U_a + U_b) for a, then b.
    """
    log_q, write, _ = _modes(x, log_decay, write, write, angle)
    seg, valid, (x,) = layout.at_padding(segment_ids, x)
    x, seg, valid, h, log_q, write = tree.alike((x, seg, valid, _state(x, log_q, None), log_q, write))
    _, U = forms.chunked(x, log_q, write, write, seg, valid, h)
    tokens = jnp.full(x.shape[:1], x.shape[1]) if valid is None else valid.sum(1)
    M = forms.power_of(log_q, tokens, x.shape[1])
    return M if seg is None else tree.where(seg[:, 0] == seg[:, -1], M, jnp.zeros_like(M)), U


def attention_matrix(
    tokens: Array,
    log_decay: Float[Array, "D N"],
    write: Float[Array, "D N"],
    read: Array,
    angle: Float[Array, "D N"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B D T T"]:
    """What x becomes y by for `tokens` [B,T,...], from h = 0: y_id = Σ_j A_dij x_jd, in fp32.

        A_dij = Re Σ_n γ_dn p_dn e^{(g_dn + iθ_dn)(i - j)}  for j <= i in one document, else 0

    Raises:
      ValueError: more than 4096 tokens.
    """
    D = log_decay.shape[0]
    identity = identity_values(tokens, D)
    B, T = identity.shape[:2]
    angle = None if angle is None else jnp.repeat(angle, T, axis=0)
    log_decay, write, read = (jnp.repeat(a, T, axis=0) for a in (log_decay, write, read))
    y, _ = ema(identity.reshape(B, T, D * T), log_decay, write, read, angle, segment_ids=segment_ids)
    return as_matrix(y.reshape(B, T, D, T))


def _modes(x: Array, log_decay: Array, write: Array, read: Array, angle: Array | None) -> tuple[Array, Array, Array]:
    """log q, real or complex, p and γ, after checking every shape."""
    shapes = [a.shape for a in (log_decay, write, read, *([] if angle is None else [angle]))]
    if x.ndim != 3 or any(shape != (x.shape[-1], *log_decay.shape[1:]) or len(shape) != 2 for shape in shapes):
        raise ValueError(f"x {x.shape}, modes {', '.join(map(str, shapes))}: expected [B,T,D], and [D,N] of all modes")
    if angle is None and jnp.iscomplexobj(read):
        raise ValueError("read is complex: expected real numbers where no angle is given")
    g = clamp_decay(fp32(log_decay))
    return g if angle is None else jax.lax.complex(g, angle.astype(g.dtype)), fp32(write), read


def _state(x: Array, log_q: Array, initial: Array | None) -> Array:
    """h before token 0."""
    shape = (x.shape[0], *log_q.shape)
    dtype = jnp.result_type(log_q.dtype, wide(x.dtype))
    if initial is None:
        return jnp.zeros(shape, dtype)
    if initial.shape != shape:
        raise ValueError(f"initial_state {initial.shape}: expected {shape}")
    return initial.astype(dtype)
