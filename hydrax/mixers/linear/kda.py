"""Kimi Delta Attention (arXiv 2510.26692), the delta rule with a decay per key channel:

S_t = (I - β_t k_t k_tᵀ) diag(exp g_t) S_{t-1} + β_t k_t v_tᵀ,      o_t = K^-½ S_tᵀ q_t
"""

import dataclasses
from typing import Annotated, Literal, TypeAlias

import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Check, Positive
from hydrax.core.numerics import wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, default_heads, per_head
from hydrax.nn.decay import BoundedDecay, StepDecay
from hydrax.nn.delta import DeltaConfig, DeltaInputs
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.parallel.sequence import delta_rule

LowerLimit = Annotated[float, Check("a number >= -5 and < 0", lambda x: -5 <= x < 0)]


@dataclasses.dataclass(frozen=True)
class Config(DeltaConfig, MixerConfig):
    out_gate: Literal["none", "silu", "sigmoid"] = "sigmoid"  # of W_g↑ W_g↓ x, on the normalised outputs
    gate_rank: Positive | None = None  # low-rank width of the decay and of the output gate; value_dim if None
    gate_bias: bool = False  # of the output gate
    safe_gate: bool = False  # g = lower_limit · σ(A (W_f x + b_dt)) instead of -A softplus(W_f x + b_dt)
    lower_limit: LowerLimit = -5.0  # of the log-decay g under safe_gate

    def fill(self, d_model: int) -> "Config":
        heads = self.heads or default_heads(d_model)
        K = self.key_dim or per_head(d_model, heads)
        V = self.value_dim or K
        return dataclasses.replace(self, heads=heads, key_dim=K, value_dim=V, gate_rank=self.gate_rank or V)


class KimiDeltaAttention(Mixer):
    """q, k, v = silu(conv(W x)), q and k of norm 1, β = σ(W_b x), g = -A softplus(W_f↑ W_f↓ x + b_dt) per channel;
    y = W_o (RMSNorm_V(o) ⊙ σ(W_g↑ W_g↓ x))."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V, R = cfg.heads, cfg.key_dim, cfg.value_dim, cfg.gate_rank
        keys, values = ("heads", "state_k"), ("heads", "state_v")
        self.inputs = DeltaInputs(d_model, cfg, H, rngs=rngs)
        self.decay_down = Linear(d_model, R, axes=("embed", "rank"), rngs=rngs)
        self.decay_up = Linear(R, (H, K), axes=("rank", *keys), rngs=rngs)
        self.decay: BoundedDecay | StepDecay
        if cfg.safe_gate:
            self.decay = BoundedDecay(H, K, lower_limit=cfg.lower_limit, rngs=rngs)
        else:
            self.decay = StepDecay(H, K, rates=(1.0, 16.0), rngs=rngs)
        gated = cfg.out_gate != "none"
        self.gate_down = Linear(d_model, R, axes=("embed", "rank"), rngs=rngs) if gated else None
        self.gate_up = Linear(R, (H, V), axes=("rank", *values), bias=cfg.gate_bias, rngs=rngs) if gated else None
        self.norm = RMSNorm(V, axes=("state_v",), eps=cfg.norm_eps, rngs=rngs)
        self.project = Linear((H, V), d_model, axes=(*values, "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        (q, k, v, beta), tails = self.inputs(x, ctx, state)
        g, _ = self.decay(self.decay_up(self.decay_down(x)))
        o, memory = delta_rule(
            q,
            k,
            v,
            beta,
            g,
            initial_state=None if state is None else state["memory"],
            chunk_size=self.cfg.chunk_size,
            **ctx.rows,
        )
        gate = None if self.gate_up is None else self.gate_up(self.gate_down(x))
        z = self.norm(ctx.tap("reads", o), gate, activation=self.cfg.out_gate, impl=ctx.impl)
        return z, {"memory": memory, **tails}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        memory = jnp.zeros((batch, cfg.heads, cfg.key_dim, cfg.value_dim), wide(dtype))
        return {"memory": memory, **self.inputs.init_state(batch, dtype)}
