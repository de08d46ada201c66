"""Gated DeltaNet (arXiv 2412.06464):  S_t = e^g_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ,   o_t = K^-½ S_tᵀ q_t."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, Positive
from hydrax.core.numerics import wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig
from hydrax.nn.decay import StepDecay
from hydrax.nn.delta import DeltaConfig, DeltaInputs
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.parallel.sequence import delta_rule


@dataclasses.dataclass(frozen=True)
class Config(DeltaConfig, MixerConfig):
    heads: Positive = 4  # query/key heads
    value_heads: Positive | None = None  # a multiple of heads; heads if None
    key_dim: Positive | None = None  # K per head; 0.75 d_model / heads, rounded down to a multiple of 8, if None
    value_dim: Positive | None = None  # V per head; if None, values are twice as wide as keys over all heads
    dt_init: Literal["steps", "ones"] = "steps"  # b_dt: softplus(b_dt) log-uniform in [0.001, 0.1], or b_dt = 1

    # The head widths belong to the published models: to d_model 3840 (Olmo Hybrid 7B) and 2048 (Qwen3-Next 80B-A3B).
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "olmo": {"heads": 30, "key_dim": 96, "value_dim": 192, "allow_neg_eigval": True, "conv_init": "normal"},
        "qwen3next": {
            "heads": 16,
            "value_heads": 32,
            "key_dim": 128,
            "value_dim": 128,
            "conv_init": "normal",
            "dt_init": "ones",
            "norm_eps": 1e-6,
        },
    }

    def fill(self, d_model: int) -> "Config":
        heads = self.value_heads or self.heads
        if heads % self.heads:
            raise ConfigError("value_heads", heads, f"expected a multiple of heads = {self.heads}")
        K = self.key_dim or max(8, 3 * d_model // (4 * self.heads) // 8 * 8)
        V = self.value_dim or max(1, 2 * K * self.heads // heads)
        return dataclasses.replace(self, value_heads=heads, key_dim=K, value_dim=V)


class GatedDeltaNet(Mixer):
    """q, k, v = silu(conv(W x)), q and k of norm 1, β = σ(W_b x), g = -A softplus(W_a x + b_dt);
    y = W_o (RMSNorm_V(o) ⊙ silu(W_g x))."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        Hv, V = cfg.value_heads, cfg.value_dim
        values = ("heads", "state_v")
        self.inputs = DeltaInputs(d_model, cfg, Hv, rngs=rngs)
        self.step_size = Linear(d_model, Hv, axes=("embed", "heads"), rngs=rngs)
        # a rate of 0 would never train: log 0
        self.decay = StepDecay(Hv, rates=(0.01, 16.0), dt_init=cfg.dt_init, rngs=rngs)
        gated = cfg.out_gate != "none"
        self.gate = Linear(d_model, (Hv, V), axes=("embed", *values), rngs=rngs) if gated else None
        self.norm = RMSNorm(V, axes=("state_v",), eps=cfg.norm_eps, rngs=rngs)
        self.project = Linear((Hv, V), d_model, axes=(*values, "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        (q, k, v, beta), tails = self.inputs(x, ctx, state)
        g, _ = self.decay(self.step_size(x))
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
        gate = None if self.gate is None else self.gate(x)
        z = self.norm(ctx.tap("reads", o), gate, activation=self.cfg.out_gate, impl=ctx.impl)
        return z, {"memory": memory, **tails}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        memory = jnp.zeros((batch, cfg.value_heads, cfg.key_dim, cfg.value_dim), wide(dtype))
        return {"memory": memory, **self.inputs.init_state(batch, dtype)}
