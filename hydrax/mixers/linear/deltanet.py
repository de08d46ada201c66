"""DeltaNet (arXiv 2406.06484):  S_t = (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ,   o_t = K^-½ S_tᵀ q_t."""

import dataclasses
from typing import Literal, TypeAlias

import jax.numpy as jnp
from flax import nnx

from hydrax.core.numerics import wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, default_heads, per_head
from hydrax.nn.delta import DeltaConfig, DeltaInputs
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.parallel.sequence import delta_rule


@dataclasses.dataclass(frozen=True)
class Config(DeltaConfig, MixerConfig):
    out_gate: Literal["none", "silu", "sigmoid"] = "none"  # of W_g x, on the normalised outputs

    def fill(self, d_model: int) -> "Config":
        heads = self.heads or default_heads(d_model)
        width = self.key_dim or per_head(d_model, heads)
        return dataclasses.replace(self, heads=heads, key_dim=width, value_dim=self.value_dim or width)


class DeltaNet(Mixer):
    """q, k, v = silu(conv(W x)), q and k of norm 1, β = σ(W_b x);  y = W_o RMSNorm_V(o)."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, V = cfg.heads, cfg.value_dim
        values = ("heads", "state_v")
        self.inputs = DeltaInputs(d_model, cfg, H, rngs=rngs)
        gated = cfg.out_gate != "none"
        self.gate = Linear(d_model, (H, V), axes=("embed", *values), rngs=rngs) if gated else None
        self.norm = RMSNorm(V, axes=("state_v",), eps=cfg.norm_eps, rngs=rngs)
        self.project = Linear((H, V), d_model, axes=(*values, "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        (q, k, v, beta), tails = self.inputs(x, ctx, state)
        o, memory = delta_rule(
            q,
            k,
            v,
            beta,
            initial_state=None if state is None else state["memory"],
            chunk_size=self.cfg.chunk_size,
            **ctx.rows,
        )
        gate = None if self.gate is None else self.gate(x)
        z = self.norm(ctx.tap("reads", o), gate, activation=self.cfg.out_gate, impl=ctx.impl)
        return z, {"memory": memory, **tails}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        memory = jnp.zeros((batch, cfg.heads, cfg.key_dim, cfg.value_dim), wide(dtype))
        return {"memory": memory, **self.inputs.init_state(batch, dtype)}
