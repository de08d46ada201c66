"""Running mean and variance of a stream of groups, each of which comes with a mean m_t and a variance v_t of its own.

    μ_t = μ_{t-1} + w_t (m_t - μ_{t-1}),      σ²_t = σ²_{t-1} + u_t (v_t + δ_t - σ²_{t-1})

    welford_scan     w_t = u_t = 1/n,  δ_t = (m_t - μ_{t-1})(m_t - μ_t): moments of all that came (Welford's updates)
    decayed_moments  w_t = (1 - β₁) / (1 - β₁ⁿ), u_t alike with β₂,  δ_t = 0: averages that forget, without their bias

n is the number of tokens of the document so far. At its first token w = u = 1, so that every document starts anew.
Covers the norms of Megalodon (arXiv 2404.08801) and Gecko (2601.06463). No sums of squares that would cancel.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from hydrax.core import tree
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, Float, Int
from hydrax.ops import layout
from hydrax.ops.dispatch import select
from hydrax.ops.scan import linear_scan

Moments = tuple[Float[Array, "B G"], Float[Array, "B G"]]


def welford_scan(
    mean: Float[Array, "B T G"], var: Float[Array, "B T G"], positions: Int[Array, "B T"], **facts: Any
) -> tuple[tuple[Array, Array], Moments]:
    """Mean and variance of all features of a group in all tokens of the document so far, see above.

    Args:
      mean, var: over the features of each group, in each token.
      positions: index of each token in its document.
      facts: `initial_state` (mean, variance) before token 0, which belong to its document; `segment_ids`, where id 0
        (right padding) leaves them alone; `impl` "recurrent" (the definition), "chunked" or None; `scan`, in whose
        place `ops.scan.linear_scan` runs the chunked form.

    Returns:
      (mean, variance) [B,T,G] and the last of them [B,G], in fp32; zero at padding.

    Raises:
      ValueError: shapes that do not fit, or an unknown `impl`.
    """
    w = 1 / _count(positions, mean)
    return _moments(mean, var, w, w, drift=True, **facts)


def decayed_moments(
    mean: Float[Array, "B T G"],
    var: Float[Array, "B T G"],
    positions: Int[Array, "B T"],
    betas: tuple[float, float],
    **facts: Any,
) -> tuple[tuple[Array, Array], Moments]:
    """Averages of the means and variances of tokens that decay by β₁ and β₂; as `welford_scan` in all else."""
    n = _count(positions, mean)
    w, u = ((1 - beta) / -jnp.expm1(n * math.log(beta)) for beta in betas)
    return _moments(mean, var, *(jnp.where(n == 1, 1, x) for x in (w, u)), drift=False, **facts)


def _count(positions: Array, like: Array) -> Array:
    """n of every token."""
    return positions.astype(wide(like.dtype)) + 1


def _moments(
    mean: Array,
    var: Array,
    w: Array,
    u: Array,
    *,
    drift: bool,
    initial_state: Moments | None = None,
    segment_ids: Array | None = None,
    impl: str | None = None,
    scan: Callable = linear_scan,
) -> tuple[tuple[Array, Array], Moments]:
    B, T = mean.shape[:2]
    if var.shape != mean.shape or w.shape != (B, T):
        raise ValueError(f"mean {mean.shape}, var {var.shape}, positions {w.shape}: expected [B,T,G] twice and [B,T]")
    mean, var, w, u = (fp32(x) for x in (mean, var, w[..., None], u[..., None]))
    if initial_state is None:
        initial_state = (jnp.zeros_like(mean[:, 0]), jnp.zeros_like(var[:, 0]))
    form = select("moments", impl, FORMS, "recurrent" if T == 1 else "chunked", mean.shape)
    return form(mean, var, w, u, drift, initial_state, segment_ids, scan)


def _recurrent(
    mean: Array, var: Array, w: Array, u: Array, drift: bool, state: Moments, segment_ids: Array | None, _: Callable
) -> tuple[tuple[Array, Array], Moments]:
    """The definition, one token at a time."""

    def step(m: Array, v: Array, w: Array, u: Array, state: Moments) -> tuple[Moments, Moments]:
        before, spread = state
        after = before + w * (m - before)
        spread = spread + u * (v + drift * (m - before) * (m - after) - spread)
        return (after, spread), (after, spread)

    seg, valid, (w, u) = layout.at_padding(segment_ids, w, u)
    ys, state = layout.scan_tokens(lambda *x: _stacked(*step(*x)), (mean, var, w, u), seg, state)
    ys = ys if valid is None else tree.where(valid, ys, jnp.zeros_like(ys))
    return (ys[..., 0], ys[..., 1]), state


def _stacked(y: Moments, state: Moments) -> tuple[Array, Moments]:
    return jnp.stack(y, axis=-1), state


def _chunked(
    mean: Array, var: Array, w: Array, u: Array, drift: bool, state: Moments, segment_ids: Array | None, scan: Callable
) -> tuple[tuple[Array, Array], Moments]:
    """Two linear recurrences, the second of which needs the results of the first at its own token alone.

    1 - w and products of many of them are rounded to 2^-24, which is no little beside w: weights that should sum to 1
    would miss 1e-4 of it after 10^5 tokens. So their sum comes along, as the average of ones, and divides.
    """

    def average(x: Array, w: Array, start: Array) -> tuple[Array, Array]:
        x, start = (jnp.stack([a, jnp.ones_like(a)], axis=-1) for a in (x, start))
        w = w[..., None]
        h, last = scan(jnp.broadcast_to(1 - w, x.shape), w * x, initial_state=start, segment_ids=segment_ids)
        return _over_weights(h), _over_weights(last)

    means, last = average(mean, w, state[0])
    if drift:  # m_t - μ_{t-1} = (m_t - μ_t) / (1 - w_t)
        var = var + jnp.where(w < 1, (mean - means) ** 2 / jnp.where(w < 1, 1 - w, 1), 0)
    spreads, end = average(var, u, state[1])
    return (means, spreads), (last, end)


def _over_weights(h: Array) -> Array:
    """Sums [...,0] over those of their weights [...,1], which are 0 at padding."""
    return h[..., 0] / jnp.where(h[..., 1] == 0, 1, h[..., 1])


FORMS: dict[str, Callable] = {"recurrent": _recurrent, "chunked": _chunked}
