"""Linear recurrences whose channels do not mix.

    linear_scan:     h_t = a_t ⊙ h_{t-1} + b_t
    selective_scan:  h_t = exp(dt_t A) ⊙ h_{t-1} + (dt_t x_t) b_tᵀ,      y_t = h_t c_t

Covers HGRN (arXiv 2311.04823) and Mamba (2312.00752).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float, Int
from hydrax.ops import layout
from hydrax.ops.dispatch import select, select_fast
from hydrax.ops.identity import as_matrix, identity_values
from hydrax.ops.scan import forms


def _fused(*inputs: Any) -> tuple[Array, Array]:
    from hydrax.ops.scan import gpu

    return gpu.fused(*inputs)


LINEAR: dict[str, Callable] = {
    "recurrent": forms.linear_recurrent,
    "chunked": forms.linear_chunked,
    "pallas_gpu": _fused,
}
SELECTIVE = {"recurrent": forms.selective_recurrent, "chunked": forms.selective_chunked}


def linear_scan(
    a: Array,
    b: Array,
    *,
    initial_state: Array | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Array, Array]:
    """All h_t of the recurrence above, and the last.

    Args:
      a: decays [B,T,*C], |a| <= 1, real or complex; 0 forgets everything.
      b: what is added [B,T,*C].
      initial_state: h before token 0 [B,*C], belonging to the document of token 0; zeros if None.
      segment_ids: documents; h restarts at each change of id, and id 0 (right padding) leaves it alone.
      impl: "recurrent" (the definition), "chunked", "pallas_gpu" (a Hopper GPU, real numbers, a multiple of 128
        channels), or None to choose.
      chunk_size: tokens per chunk of the chunked form; results do not depend on it.

    Returns:
      h [B,T,*C], zero at padding, and the final state [B,*C], in fp32 (complex64 where a or b are complex).

    Raises:
      ValueError: shapes that do not fit, or an `impl` that is unknown or cannot serve.
    """
    a, b, seg, valid = _linear_inputs(a, b, segment_ids)
    dtype = jnp.result_type(fp32(a), fp32(b))
    h = _state(initial_state, (a.shape[0], *a.shape[2:]), dtype)
    a, b, seg, h = tree.alike((a, b, seg, h))
    form = select_fast("linear_scan", impl, LINEAR, "hydrax.ops.scan.gpu", a, b)
    if form is not _fused:  # the kernels convert what they load
        a, b = a.astype(dtype), b.astype(dtype)
    y, h = _sized(form, LINEAR, chunk_size)(a, b, seg, h)
    return y if valid is None else tree.where(valid, y, jnp.zeros_like(y)), h


def selective_scan(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    *,
    initial_state: Float[Array, "B D N"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B D N"]]:
    """Outputs and final state of the recurrence above, N states for each of D channels.

    Args:
      x: inputs.
      dt: step sizes, >= 0.
      A: rates, < 0.
      b, c: how inputs are written to and states are read from, shared by the channels.
      initial_state: h before token 0, belonging to the document of token 0; zeros if None.
      segment_ids: documents; h restarts at each change of id, and id 0 (right padding) leaves it alone.
      impl: "recurrent" (the definition), "chunked", or None to choose.
      chunk_size: tokens whose h [B,C,D,N] exist at a time in the chunked form; results do not depend on it.

    Returns:
      y in the dtype of x, zero at padding, and the final state in fp32.

    Raises:
      ValueError: shapes that do not fit, or an unknown `impl`.
    """
    _check_selective(x, dt, A, b, c)
    seg, valid, (x, dt) = layout.at_padding(segment_ids, x, dt)
    h = _state(initial_state, (x.shape[0], *A.shape), jnp.result_type(*map(fp32, (x, dt, A, b, c))))
    form = select("selective_scan", impl, SELECTIVE, "recurrent" if x.shape[1] == 1 else "chunked", x.shape)
    form = _sized(form, SELECTIVE, chunk_size)
    y, h = form(x, dt, A, b, c, seg, h)
    y = y.astype(x.dtype)
    return y if valid is None else y * valid[:, :, None], h


def summarize_linear(a: Array, b: Array, *, segment_ids: Int[Array, "B T"] | None = None) -> tuple[Array, Array]:
    """The map of `linear_scan` over all T tokens, h_out = M ⊙ h_in + U; M and U are [B,*C].

    A document change inside the tokens makes M zero. Composition: (M_b M_a, M_b U_a + U_b) for a, then b.
    """
    a, b, seg, _ = _linear_inputs(fp32(a), fp32(b), segment_ids)
    _, U = forms.linear_chunked(a, b, seg, jnp.zeros_like(b[:, 0]))
    return _unless_cut(seg, a.prod(1)), U


def summarize_selective(
    x: Float[Array, "B T D"],
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    b: Float[Array, "B T N"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B D N"], Float[Array, "B D N"]]:
    """The map of `selective_scan` over all T tokens, h_out = M ⊙ h_in + U, as `summarize_linear`."""
    _check_selective(x, dt, A, b, b)
    seg, _, (x, dt) = layout.at_padding(segment_ids, x, dt)
    M = jnp.exp(fp32(dt).sum(1)[..., None] * A)
    _, U = forms.selective_chunked(x, dt, A, b, b, seg, jnp.zeros_like(M))
    return _unless_cut(seg, M), U


def attention_matrix_linear(a: Array, *, segment_ids: Int[Array, "B T"] | None = None) -> Array:
    """What b becomes h by in `linear_scan` of a [B,T,*C], from zeros: h_i = Σ_j A_ij ⊙ b_j; A is [B,*C,T,T].

        A_ij = a_i a_(i-1) ... a_(j+1)  for j <= i in one document, else 0

    One matrix per channel: give it a slice of the channels where T is large.

    Raises:
      ValueError: more than 4096 tokens.
    """
    identity = identity_values(a, *a.shape[2:])
    h, _ = linear_scan(jnp.broadcast_to(a[..., None], identity.shape), identity, segment_ids=segment_ids)
    return as_matrix(h)


def attention_matrix_selective(
    dt: Float[Array, "B T D"],
    A: Float[Array, "D N"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B D T T"]:
    """What x becomes y by in `selective_scan`, from zeros: y_id = Σ_j α_dij x_jd (arXiv 2403.01590 §4), in fp32.

        α_dij = Σ_n c_in exp(A_dn (dt_(j+1)d + ... + dt_id)) dt_jd b_jn  for j <= i in one document, else 0

    One matrix per channel: give it a slice of the channels, of dt and A, where T is large.

    Raises:
      ValueError: shapes that do not fit, or more than 4096 tokens.
    """
    B, T, D = dt.shape
    x = identity_values(dt, D).reshape(B, T, D * T)
    dt, A = jnp.repeat(fp32(dt), T, axis=2), jnp.repeat(A, T, axis=0)
    y, _ = selective_scan(x, dt, A, b, c, segment_ids=segment_ids)
    return as_matrix(y.reshape(B, T, D, T))


def _linear_inputs(a: Array, b: Array, segment_ids: Array | None) -> tuple[Array, Array, Array | None, Array | None]:
    """a and b, 1 and 0 at padding; ids with padding filled; real tokens."""
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(f"a {a.shape}, b {b.shape}: expected [B,T,*C] twice")
    seg, valid, (b,) = layout.at_padding(segment_ids, b)
    return a if valid is None else tree.where(valid, a, jnp.ones_like(a)), b, seg, valid


def _check_selective(x: Array, dt: Array, A: Array, b: Array, c: Array) -> None:
    B, T, D = x.shape
    N = A.shape[-1]
    if dt.shape != x.shape or A.shape != (D, N) or b.shape != (B, T, N) or c.shape != b.shape:
        shapes = f"x {x.shape}, dt {dt.shape}, A {A.shape}, b {b.shape}, c {c.shape}"
        raise ValueError(f"{shapes}: expected [B,T,D] twice, [D,N], [B,T,N] twice")


def _state(initial: Array | None, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """The state before token 0, zeros if None."""
    if initial is None:
        return jnp.zeros(shape, dtype)
    if initial.shape != shape:
        raise ValueError(f"initial_state {initial.shape}: expected {shape}")
    return initial.astype(dtype)


def _sized(form: Callable, forms: Mapping[str, Callable], chunk_size: int | None) -> Callable:
    """The chunked form with chunks of that size, the others as they are."""
    given = chunk_size is not None and form is forms["chunked"]
    return functools.partial(form, chunk_size=chunk_size) if given else form


def _unless_cut(seg: Array | None, M: Array) -> Array:
    """M, or 0 where the document of the first token is not that of the last."""
    return M if seg is None else tree.where(seg[:, 0] == seg[:, -1], M, jnp.zeros_like(M))
