"""Short depthwise causal convolution, whose state is the last inputs.

    y_t = act(b + Σ_{i<W} w_i ⊙ x_{t-d(W-1-i)}),      x before the start of a document is zero

Used before q, k and v of most linear mixers, e.g. Mamba (arXiv 2312.00752) and DeltaNet (2406.06484), with d = 1: taps
side by side.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float, Int
from hydrax.ops import documents
from hydrax.ops.conv import forms
from hydrax.ops.dispatch import select, select_fast


def _fused(*inputs: Any, **how: Any) -> Array:
    from hydrax.ops.conv import gpu

    return gpu.fused(*inputs, **how)


FORMS: dict[str, Callable] = {"recurrent": forms.recurrent, "chunked": forms.chunked, "pallas_gpu": _fused}
SPACED = {name: FORMS[name] for name in ("recurrent", "chunked")}
"""Those that serve taps apart."""
ACTIVATIONS: dict[str | None, Callable[[Array], Array]] = {
    None: lambda y: y,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "elu1": lambda y: jax.nn.elu(y) + 1,
}


def short_conv(
    x: Float[Array, "B T *C"],
    w: Float[Array, "W *C"],
    b: Float[Array, "*C"] | None = None,
    *,
    activation: str | None = None,
    dilation: int = 1,
    initial_state: Float[Array, "B _ *C"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "B T *C"], Float[Array, "B _ *C"]]:
    """Outputs, and the last d(W - 1) inputs of the last document of each row.

    Args:
      x: inputs; every dimension after T is a channel dimension, e.g. [B,T,H,K].
      w: taps; w[W-1] multiplies the current token.
      b: bias.
      activation: None, "silu", "relu" or "elu1" (elu + 1).
      dilation: d >= 1, tokens from one tap to the next.
      initial_state: [B,d(W-1),*C], inputs before token 0, belonging to its document; zeros if None.
      segment_ids: documents; no tap reaches into another one. Id 0 is right padding.
      impl: "recurrent" (the definition), "chunked" (all tokens at once), "pallas_gpu" (a Hopper GPU, a multiple of 128
        channels, 8 taps at most, side by side), or None to choose.

    Returns:
      y in the dtype of x, zero at padding, and the final state [B,d(W-1),*C] in the dtype of x, before bias and
      activation: the inputs a continuation needs, zeros standing for tokens before the document.

    Raises:
      ValueError: shapes that do not fit, an unknown activation, or an `impl` that is unknown or cannot serve.
    """
    B, T, *C = x.shape
    before = (B, dilation * (w.shape[0] - 1), *C)
    if w.shape[1:] != x.shape[2:]:
        raise ValueError(f"w {w.shape}: expected {('W', *C)} for x {x.shape}")
    if initial_state is not None and initial_state.shape != before:
        raise ValueError(f"initial_state {initial_state.shape}: expected {before}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}: expected one of {', '.join(map(str, ACTIVATIONS))}")
    if segment_ids is None:
        seg, valid = jnp.zeros((B, T), jnp.int32), jnp.ones((B, T), bool)
    else:
        seg, valid = documents.fill_padding(segment_ids)
    tail = jnp.zeros(before, x.dtype) if initial_state is None else initial_state
    if dilation == 1:
        form = select_fast("short_conv", impl, FORMS, "hydrax.ops.conv.gpu", x, w)
    else:
        form = select("short_conv", impl, SPACED, "recurrent" if T == 1 else "chunked", x.shape)
    if form is _fused:
        y = form(x, w, b, tail, segment_ids, activation=activation)
        return y, forms.final_state(x, seg, valid, tail)
    y, end = form(x, w, seg, valid, tail, dilation)
    y = ACTIVATIONS[activation](y if b is None else y + fp32(b)).astype(x.dtype)
    return jnp.where(valid.reshape(B, T, *(1 for _ in C)), y, 0), end
