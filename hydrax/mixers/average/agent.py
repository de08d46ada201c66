"""Agent attention (arXiv 2312.08874), causal form: M learned agents read the past, and tokens read the agents.

    o_t = Σ_m softmax_m(K^-½ q_t·a_m) Σ_{j<=t} softmax_j(K^-½ a_m·k_j) v_j + conv(v)_t

The paper is about images: its agents are the pooled queries of all tokens, which here would look ahead. Agents are
parameters instead, as the queries of `aaren` are, and the causal form is hydrax's own. The convolution of the values
(3 taps) is the paper's, in one dimension.
"""

import dataclasses
from typing import TypeAlias

import jax
from flax import nnx

from hydrax.core.build import NonNegative, Positive
from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array
from hydrax.mixers.average.slots import SlotAverages, SlotConfig
from hydrax.mixers.base import Context
from hydrax.nn.linear import Linear
from hydrax.nn.param import param


@dataclasses.dataclass(frozen=True)
class Config(SlotConfig):
    agents: Positive = 16  # M per head
    conv_width: NonNegative = 3  # taps of the convolution of the values; 0: none


class Agent(SlotAverages):
    """M learned agents per head."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        H, K, M = cfg.heads, cfg.key_dim, cfg.agents
        self.agents = param(rngs, jax.nn.initializers.normal(0.02), (H, M, K), ("heads", "slots", "state_k"))
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        super().__init__(d_model, cfg, M, rngs=rngs, width=cfg.conv_width)

    def weights(self, x: Array, ctx: Context) -> tuple[Array, Array]:
        a = fp32(self.agents[...]) * self.cfg.key_dim**-0.5
        q, k = fp32(self.q(x)), fp32(ctx.tap("keys", self.k(x)))
        logits, s = (einsum("hmk,bthk->bthm", a, y) for y in (q, k))
        return jax.nn.softmax(logits, axis=-1), s
