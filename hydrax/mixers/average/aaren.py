"""Attention whose queries are parameters, as a recurrence (Aaren, arXiv 2405.13956):

o_t = Σ_m p_tm Σ_{j<=t} e^{s_jm} v_j / Σ_{j<=t} e^{s_jm},      s_jm = K^-½ a_m·k_j,      p_t = softmax(W_r x_t)

The paper has one query a per head, so that p = 1.
"""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Positive
from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array
from hydrax.mixers.average.slots import SlotAverages, SlotConfig
from hydrax.mixers.base import Context
from hydrax.nn.linear import Linear
from hydrax.nn.param import param


@dataclasses.dataclass(frozen=True)
class Config(SlotConfig):
    slots: Positive = 1  # M learned queries per head, mixed by each token if more than one


class Aaren(SlotAverages):
    """M learned queries per head, mixed by a router."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        H, K, M = cfg.heads, cfg.key_dim, cfg.slots
        self.query = param(rngs, jax.nn.initializers.normal(K**-0.5), (H, M, K), ("heads", "slots", "state_k"))
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.read = Linear(d_model, (H, M), axes=("embed", "heads", "slots"), rngs=rngs) if M > 1 else None
        super().__init__(d_model, cfg, M, rngs=rngs)

    def weights(self, x: Array, ctx: Context) -> tuple[Array, Array]:
        k = fp32(ctx.tap("keys", self.k(x)))
        s = einsum("hmk,bthk->bthm", fp32(self.query[...]), k) * self.cfg.key_dim**-0.5
        return jnp.ones_like(s) if self.read is None else jax.nn.softmax(fp32(self.read(x)), axis=-1), s
