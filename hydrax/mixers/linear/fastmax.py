"""Fastmax (arXiv 2402.07901): attention with a polynomial of the scores in place of the exponential.

    o_t = Σ_{j<=t} w_tj v_j / Σ_{j<=t} w_tj,      w_tj = 1 + s (+ s²/2),      s = q̂_t·k̂_j

q̂ and k̂ are of zero mean and of length c, one per head, so that |s| <= c². The statistics are those of a token: the
public code takes them over the whole input, and so looks ahead.
"""

import dataclasses
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.numerics import fp32
from hydrax.core.typing import Array
from hydrax.mixers.linear import taylor
from hydrax.nn.features import taylor2, taylor2_width
from hydrax.nn.param import param
from hydrax.nn.position import Rope

LONGEST = 0.999
"""c at most, with degree 1: weights 1 + s stay positive."""

EPS = 1e-6
"""Added to the variance of a query or key."""


@dataclasses.dataclass(frozen=True)
class Config(taylor.Config):
    degree: Literal[1, 2] = 2  # of the polynomial
    rope: Rope = dataclasses.field(default_factory=lambda: Rope(fraction=0.0))

    @property
    def state_shape(self) -> tuple[int, int, int]:
        width = 1 + self.key_dim if self.degree == 1 else taylor2_width(self.key_dim)
        return self.heads, width, self.value_dim + 1


class Fastmax(taylor.Taylor):
    """y = W_o o; c is 1 at first."""

    Config: TypeAlias = Config
    cfg: Config

    def __init__(self, d_model: int, cfg: Any, *, rngs: nnx.Rngs):
        super().__init__(d_model, cfg, rngs=rngs)
        self.length = param(rngs, jax.nn.initializers.ones, (cfg.heads,), ("heads",))

    def features(self, x: Array) -> Array:
        y = fp32(x)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y**2).sum(-1, keepdims=True) + EPS)
        c = self.length[...]
        if self.cfg.degree == 1:
            c = jnp.clip(c, -LONGEST, LONGEST)
            return jnp.concatenate([jnp.ones_like(y[..., :1]), c[:, None] * y], axis=-1)
        return taylor2(y * (c * x.shape[-1] ** 0.25)[:, None])
