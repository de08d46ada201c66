"""Complex exponential moving averages of every channel (Megalodon, arXiv 2404.08801; Gecko, 2601.06463).

    h_tn = q_n h_{t-1,n} + α_n x_t,      q_n = (1 - α_n δ_n) e^{i n θ},      y_t = Re(s Σ_n γ_n h_tn) + ω x_t

α, δ = σ of parameters per channel and n, θ = 2π/N σ(τ) per channel, N averages of each.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, Float, PyTree
from hydrax.nn.param import param
from hydrax.parallel.sequence import moving_average

LARGEST = 1 - 1e-6
"""Of α δ: powers of q = 0 are no numbers."""


def _spread(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """τ = logit(D^{-j/D}), j = 1..D, in random order: σ(τ) from nearly 1 to 1/D, evenly in its logarithm."""
    (D,) = shape
    p = np.exp(-np.log(D) * np.arange(1, D + 1) / D) if D > 1 else np.array([0.5])
    return jax.random.permutation(key, jnp.asarray(np.log(p) - np.log1p(-p), dtype))


class CEMA(nnx.Module):
    """The averages above. With `skip` ω is a parameter and s = N^-½ with γ of size 1; else ω = 1, s = 1, γ of N^-½."""

    def __init__(self, width: int, modes: int, *, skip: bool, rngs: nnx.Rngs):
        shape, axes, normal = (width, modes), ("inner", "ema"), jax.nn.initializers.normal
        self.shape, self.scale = shape, modes**-0.5 if skip else 1.0
        self.alpha = param(rngs, normal(0.2), shape, axes)
        self.delta = param(rngs, normal(0.2), shape, axes)
        self.theta = param(rngs, _spread, (width,), ("inner",))
        self.real = param(rngs, normal(1.0 if skip else modes**-0.5), shape, axes)
        self.imaginary = param(rngs, jax.nn.initializers.zeros, shape, axes)
        narrow = jax.nn.initializers.truncated_normal(0.25, lower=-4.0, upper=4.0)  # of standard deviations: [-1, 1]
        self.omega = param(rngs, narrow, (width,), ("inner",)) if skip else None

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Any, state: PyTree | None, chunk_size: int | None = None
    ) -> tuple[Float[Array, "B T D"], PyTree]:
        """y in the dtype of x, and the state after it; `ctx` (`mixers.Context`) gives documents."""
        alpha, delta = jax.nn.sigmoid(self.alpha[...]), jax.nn.sigmoid(self.delta[...])
        turns = jnp.arange(1, alpha.shape[1] + 1) / alpha.shape[1]
        y, h = moving_average(
            fp32(x),
            jnp.log1p(-jnp.minimum(alpha * delta, LARGEST)),
            alpha,
            self.scale * jax.lax.complex(self.real[...], self.imaginary[...]),
            2 * jnp.pi * turns * jax.nn.sigmoid(self.theta[...])[:, None],
            initial_state=None if state is None else jax.lax.complex(state["real"], state["imaginary"]),
            segment_ids=ctx.segment_ids,
            shards=ctx.shards,
            impl=ctx.impl,
            chunk_size=chunk_size,
        )
        y = y + (x if self.omega is None else self.omega[...] * x)
        return y.astype(x.dtype), {"real": h.real, "imaginary": h.imag}

    def init_state(self, batch: int, dtype: jnp.dtype) -> PyTree:
        """The state before token 0, zeros."""
        return {name: jnp.zeros((batch, *self.shape), wide(dtype)) for name in ("real", "imaginary")}
