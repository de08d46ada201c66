"""Filters that reach back to the start of a document, one kernel per channel, for convolutions beside a few taps.

ema, N decaying exponentials (Mega, arXiv 2209.10655):

    k_τ = N^-½ Σ_n γ_n p_n β_n q_n^τ,      q_n = 1 - p_n a_n,      p = σ(δ), a = σ(α)

implicit, a network of the distance under a decay per channel (after CKConv, 2102.02611, and Hyena, 2302.10866):

    k_τ = MLP(τ/T₀, cos 2πfτ/T₀, sin 2πfτ/T₀ for f = 1 .. 8) ⊙ e^{-softplus(λ) τ/T₀}

The first has a state, the second transforms whole rows.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hydrax.core.build import ConfigError
from hydrax.core.numerics import einsum, fp32, wide
from hydrax.core.typing import Array, Float
from hydrax.nn.param import param
from hydrax.ops.conv.long import fft_conv
from hydrax.parallel.sequence import moving_average

LARGEST = 1 - 1e-6
"""Of p a: powers of a decay of 0 are no numbers."""
BANDS, HIDDEN = 8, 16
"""Of the network: frequencies it sees, and the width of its one hidden layer."""
FASTEST, SLOWEST = 15.0, 3.0
"""e-foldings of the kernels of the first and of the last channel over T₀ tokens, at first."""

Name = Literal["ema", "implicit"]


class EMA(nnx.Module):
    """k * x in fp32, with `skip` also ω x; the state is h [B,D,N] of the averages, in fp32."""

    def __init__(self, width: int, modes: int, *, skip: bool, rngs: nnx.Rngs):
        shape, axes, normal = (width, modes), ("inner", "ema"), jax.nn.initializers.normal
        self.shape = shape
        self.delta = param(rngs, normal(0.2), shape, axes)
        self.alpha = param(rngs, normal(0.2), shape, axes)
        self.beta = param(rngs, _alternating, shape, axes)
        self.gamma = param(rngs, normal(1.0), shape, axes)
        self.omega = param(rngs, normal(1.0), (width,), ("inner",)) if skip else None

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Any, state: Array | None, chunk_size: int | None = None
    ) -> tuple[Float[Array, "B T D"], Array]:
        """`ctx` (`mixers.Context`) gives documents."""
        p, a = jax.nn.sigmoid(self.delta[...]), jax.nn.sigmoid(self.alpha[...])
        y, h = moving_average(
            fp32(jnp.asarray(x)),
            jnp.log1p(-jnp.minimum(p * a, LARGEST)),
            p * self.beta[...],
            self.gamma[...] * self.shape[1] ** -0.5,
            initial_state=state,
            segment_ids=ctx.segment_ids,
            shards=ctx.shards,
            impl=ctx.impl,
            chunk_size=chunk_size,
        )
        return y if self.omega is None else y + self.omega[...] * x, h

    def init_state(self, batch: int, dtype: jnp.dtype) -> Array:
        """The averages before token 0: zeros."""
        return jnp.zeros((batch, *self.shape), wide(dtype))


class Implicit(nnx.Module):
    """k * x in fp32, by FFT: for whole rows of one document each, and without a state."""

    def __init__(self, width: int, horizon: int, *, rngs: nnx.Rngs):
        self.horizon = horizon
        places, zeros, normal = 1 + 2 * BANDS, jax.nn.initializers.zeros, jax.nn.initializers.normal
        self.first = param(rngs, normal(math.sqrt(2 / places)), (places, HIDDEN), ("place", "hidden"))
        self.offset = param(rngs, normal(1.0), (HIDDEN,), ("hidden",))
        self.second = param(rngs, normal(1 / math.sqrt(HIDDEN * horizon)), (HIDDEN, width), ("hidden", "inner"))
        self.level = param(rngs, zeros, (width,), ("inner",))
        self.rate = param(rngs, _rates, (width,), ("inner",))

    def kernel(self, T: int) -> Float[Array, "T D"]:
        """k_τ for τ < T."""
        time = jnp.arange(T, dtype=self.rate[...].dtype)[:, None] / self.horizon
        turns = 2 * jnp.pi * time * np.arange(1, BANDS + 1)
        places = jnp.concatenate([time, jnp.cos(turns), jnp.sin(turns)], axis=-1)
        hidden = jax.nn.relu(einsum("tp,ph->th", places, self.first[...]) + self.offset[...])
        values = einsum("th,hd->td", hidden, self.second[...]) + self.level[...]
        return values * jnp.exp(-jax.nn.softplus(self.rate[...]) * time)

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Any, state: None, chunk_size: int | None = None
    ) -> tuple[Float[Array, "B T D"], None]:
        """Raises:
        ConfigError: there are documents, a state to start from, or devices that share a row.
        """
        del chunk_size
        if ctx.segment_ids is not None or state is not None:
            raise ConfigError("filter", "implicit", NO_RESTART)
        if ctx.shards is not None:
            allowed = "filter = 'implicit' transforms whole rows: expected 1, or filter ema"
            raise ConfigError("mesh.context", ctx.shards.number, allowed)
        return fft_conv(fp32(jnp.asarray(x)), self.kernel(x.shape[1]), impl=ctx.impl), None

    def init_state(self, batch: int, dtype: jnp.dtype) -> None:
        raise ConfigError("filter", "implicit", NO_RESTART)


NO_RESTART = "a transform of whole rows knows no documents and carries no state: expected ema"

FILTERS: dict[Name, Callable[..., EMA | Implicit]] = {
    "ema": lambda width, cfg, rngs: EMA(width, cfg.modes, skip=False, rngs=rngs),
    "implicit": lambda width, cfg, rngs: Implicit(width, cfg.horizon, rngs=rngs),
}
"""(width, options `modes` and `horizon`, rngs) -> filter."""

HELD: dict[Name, Callable[[Any], int]] = {"ema": lambda cfg: 4 * cfg.modes, "implicit": lambda cfg: 0}
"""Bytes of a channel's state; an implicit filter refuses to have one."""

FLOPS: dict[Name, Callable[[Any, int], float]] = {
    "ema": lambda cfg, n: 4 * cfg.modes,
    "implicit": lambda cfg, n: 10 * math.log2(2 * n) + 6,  # two real transforms of 2 n numbers, and their product
}
"""Per token and channel, in documents of n tokens."""


def _alternating(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """+1, -1, +1, ... along the averages of a channel, and a little noise."""
    signs = 1 - 2 * (jnp.arange(shape[-1]) % 2)
    return (signs + 0.02 * jax.random.normal(key, shape)).astype(dtype)


def _rates(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """λ of rates that are spread evenly over the channels."""
    del key
    return jnp.log(jnp.expm1(jnp.linspace(FASTEST, SLOWEST, shape[0]))).astype(dtype)
