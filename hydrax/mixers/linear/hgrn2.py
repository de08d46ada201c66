"""HGRN2 (arXiv 2404.07904):  S_t = diag(e^g_t) S_{t-1} + k_t v_tᵀ,   o_t = c S_tᵀ q_t,   with keys k_t = 1 - e^g_t."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ChunkSize, Positive, PositiveFloat
from hydrax.core.numerics import clamp_decay, fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, default_heads, per_head
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.parallel.sequence import linear_attention


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive | None = None  # the largest divisor of d_model up to d_model / 128 if None
    key_dim: Positive | None = None  # K per head, forget gates and keys; d_model / heads if None
    value_dim: Positive | None = None  # V per head; d_model / heads if None
    scale: PositiveFloat | None = None  # c, factor on the output; K^-½ if None
    norm_eps: PositiveFloat = 1e-5  # of the output norm
    chunk_size: ChunkSize | None = None  # tokens per chunk of the training form

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"original": {"scale": 1.0}}

    def fill(self, d_model: int) -> "Config":
        heads = self.heads or default_heads(d_model)
        return dataclasses.replace(
            self,
            heads=heads,
            key_dim=self.key_dim or per_head(d_model, heads),
            value_dim=self.value_dim or per_head(d_model, heads),
        )


class HGRN2(Mixer):
    """g = log(γ + (1 - γ) σ(W_f x)) with the layer's lower bound γ, q = silu(W_q x), k = 1 - e^g;
    y = W_o RMSNorm_HV(o)."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V = cfg.heads, cfg.key_dim, cfg.value_dim
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.forget = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.v = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), rngs=rngs)
        self.norm = RMSNorm((H, V), axes=("heads", "state_v"), eps=cfg.norm_eps, rngs=rngs)
        self.project = Linear((H, V), d_model, axes=("heads", "state_v", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        H, K = self.cfg.heads, self.cfg.key_dim
        g, k = forget_gates(self.forget(x), ctx.lower_bound(H * K).reshape(H, K))
        o, memory = linear_attention(
            jax.nn.silu(self.q(x)),
            ctx.tap("keys", k.astype(x.dtype)),
            ctx.tap("values", self.v(x)),
            g,
            scale=self.cfg.scale,
            initial_state=None if state is None else state["memory"],
            chunk_size=self.cfg.chunk_size,
            **ctx.rows,
        )
        return self.norm(ctx.tap("reads", o)), {"memory": memory}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        return {"memory": jnp.zeros((batch, cfg.heads, cfg.key_dim, cfg.value_dim), wide(dtype))}


def forget_gates(f: Array, lower_bound: Array) -> tuple[Array, Array]:
    """g = log(γ + (1 - γ) σ(f)) and 1 - e^g in fp32, for γ in [0,1); f below -50 counts as -50.

    Both keep their digits at both ends: g comes from what stays where that is little, else from what is lost.
    """
    f = clamp_decay(fp32(f))
    stays = lower_bound + (1 - lower_bound) * jax.nn.sigmoid(f)
    lost = (1 - lower_bound) * jax.nn.sigmoid(-f)
    little = stays < 0.5
    return jnp.where(little, jnp.log(stays), jnp.log1p(-jnp.where(little, 0, lost))), lost
