"""Normalisation by what has come so far in the document: its statistics are a state, as that of a mixer.

y_t = (x_t - μ_t) rsqrt(σ²_t + ε) (1 + w) + b,      μ, σ² per group of features

timestep_norm        moments over the features of the group in all tokens so far (arXiv 2404.08801)
timestep_decay_norm  averages of the tokens' own means and variances that decay by `betas` (2601.06463)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, Float, PyTree
from hydrax.nn.param import param
from hydrax.ops.moments import decayed_moments, welford_scan
from hydrax.parallel.sequence import linear_scan

BETAS = (0.999, 0.9999)
"""Decay of the mean and of the variance."""

MOMENTS: dict[str, Callable] = {
    "timestep_norm": welford_scan,
    "timestep_decay_norm": functools.partial(decayed_moments, betas=BETAS),
}


def check_groups(groups: int, d_model: int, key: str) -> None:
    """Raises `ConfigError` unless every group has the same number of features, and more than one."""
    if d_model % groups or groups == d_model:
        raise ConfigError(key, groups, f"expected a divisor of d_model = {d_model} below it")


class TimestepNorm(nnx.Module):
    """One of `MOMENTS` over `groups` groups of the `width` features; w = b = 0 at first. The state is in fp32."""

    def __init__(self, width: int, groups: int, kind: str, *, eps: float = 1e-5, rngs: nnx.Rngs):
        self.groups, self.kind, self.eps = groups, kind, eps
        self.weight = param(rngs, jax.nn.initializers.zeros, (width,), ("norm",))
        self.bias = param(rngs, jax.nn.initializers.zeros, (width,), ("norm",))

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Any, state: PyTree | None
    ) -> tuple[Float[Array, "B T D"], dict[str, Float[Array, "B G"]]]:
        """y in the dtype of x, and the state after it; `ctx` (`mixers.Context`) gives positions and documents."""
        groups = fp32(x).reshape(*x.shape[:2], self.groups, -1)
        own = jnp.mean(groups, axis=-1)
        (mean, var), (last, end) = MOMENTS[self.kind](
            own,
            jnp.mean((groups - own[..., None]) ** 2, axis=-1),
            ctx.positions,
            initial_state=None if state is None else (state["mean"], state["var"]),
            segment_ids=ctx.segment_ids,
            impl=ctx.impl,
            scan=functools.partial(linear_scan, shards=ctx.shards, impl=ctx.impl),
        )
        y = (groups - mean[..., None]) * jax.lax.rsqrt(var + self.eps)[..., None]
        y = y.reshape(x.shape) * (1 + self.weight[...]) + self.bias[...]
        return y.astype(x.dtype), {"mean": last, "var": end}

    def init_state(self, batch: int, dtype: jnp.dtype) -> dict[str, Float[Array, "B G"]]:
        """The state before token 0, zeros."""
        return {name: jnp.zeros((batch, self.groups), wide(dtype)) for name in ("mean", "var")}
