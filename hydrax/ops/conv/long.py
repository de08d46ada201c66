"""Causal convolution with kernels as long as the row, one for every channel.

    y_t = Σ_{j<=t} k_{t-j} ⊙ x_j,      k_τ = 0 from τ = L on

By FFT it takes O(D T log T), after CKConv (arXiv 2102.02611) and Hyena (2302.10866). What no output can do is begin
anew: a transform mixes all tokens of a row. Averages that restart and carry a state are those of `ops.ema`.
"""

from collections.abc import Callable

import jax.numpy as jnp

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float, PyTree
from hydrax.ops.conv import forms
from hydrax.ops.dispatch import select


def recurrent(x: Array, k: Array) -> Array:
    """The definition, O(T L): the last L inputs against the kernel, token by token."""
    seg, valid = jnp.zeros(x.shape[:2], jnp.int32), jnp.ones(x.shape[:2], bool)
    tail = jnp.zeros((x.shape[0], k.shape[0] - 1, *x.shape[2:]), x.dtype)
    return forms.recurrent(x, k[::-1], seg, valid, tail)[0]


def transformed(x: Array, k: Array) -> Array:
    """By FFT in fp32. With fewer than T + L - 1 places the product would be circular, and tell of the future."""
    T, n = x.shape[1], 1 << (x.shape[1] + k.shape[0] - 2).bit_length()
    product = jnp.fft.rfft(fp32(x), n, axis=1) * jnp.fft.rfft(fp32(k), n, axis=0)
    return jnp.fft.irfft(product, n, axis=1)[:, :T]


FORMS: dict[str, Callable] = {"recurrent": recurrent, "chunked": transformed}
"""The second, of all tokens at once, goes by the name it has among all ops."""


def fft_conv(
    x: Float[Array, "B T *C"],
    k: Float[Array, "L *C"],
    *,
    initial_state: PyTree = None,
    segment_ids: Array | None = None,
    impl: str | None = None,
) -> Float[Array, "B T *C"]:
    """y in the dtype of x, for rows of one document each; padding on the right needs no ids, as nothing reads it.

    By FFT y_t is not exactly free of later tokens: they move it by up to 1e-7 |x| |k|, norms over the row, and one that
    is not finite spoils the whole row.

    Args:
      x: inputs; every dimension after T is a channel dimension.
      k: kernels; k[0] multiplies the current token. Any L: taps from T on reach no token.
      initial_state, segment_ids: None. What they would ask for needs another op.
      impl: "recurrent" (the definition), "chunked" (by FFT), or None to choose.

    Raises:
      ValueError: documents or a state to start from, shapes that do not fit, or an unknown `impl`.
    """
    given = {"segment_ids": segment_ids, "initial_state": initial_state}
    if any(value is not None for value in given.values()):
        asked = " and ".join(name for name, value in given.items() if value is not None)
        raise ValueError(f"fft_conv: {asked}: a transform of a row cannot restart, chunked_ema (hydrax.ops.ema) can")
    if x.ndim < 2 or k.shape[1:] != x.shape[2:] or not k.shape[0]:
        raise ValueError(f"k {k.shape}: expected {('L', *x.shape[2:])} for x {x.shape}")
    form = select("fft_conv", impl, FORMS, "chunked", x.shape)
    return form(x, k[: x.shape[1]]).astype(x.dtype)
