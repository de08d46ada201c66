"""Efficient attention (arXiv 1812.01243), causal form: every key feature averages the past by a softmax of its own.

    o_t = Σ_n softmax_n(q_t)_n Σ_{j<=t} softmax_j(k_jn) v_j

In the paper the softmax of a key feature is over the whole input; here it runs over the past, which is hydrax's own
form. Keys are normed to the length √K, or one outlier would fill a slot for the rest of the document.
"""

import dataclasses
from typing import TypeAlias

import jax
from flax import nnx

from hydrax.core.build import PositiveFloat
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array
from hydrax.mixers.average.slots import SlotAverages, SlotConfig
from hydrax.mixers.base import Context
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm


@dataclasses.dataclass(frozen=True)
class Config(SlotConfig):
    key_norm: bool = True  # RMSNorm of the keys
    norm_eps: PositiveFloat = 1e-6  # of that


class Efficient(SlotAverages):
    """One slot per key feature, M = K."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        shape, axes = (cfg.heads, cfg.key_dim), ("heads", "state_k")
        self.q = Linear(d_model, shape, axes=("embed", *axes), bias=True, rngs=rngs)
        self.k = Linear(d_model, shape, axes=("embed", *axes), bias=True, rngs=rngs)
        self.k_norm = RMSNorm(cfg.key_dim, axes=axes[1:], eps=cfg.norm_eps, rngs=rngs) if cfg.key_norm else None
        super().__init__(d_model, cfg, cfg.key_dim, rngs=rngs)

    def weights(self, x: Array, ctx: Context) -> tuple[Array, Array]:
        k = ctx.tap("keys", self.k(x))
        return jax.nn.softmax(fp32(self.q(x)), axis=-1), fp32(k if self.k_norm is None else self.k_norm(k))
