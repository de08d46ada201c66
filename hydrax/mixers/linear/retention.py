"""Retention (arXiv 2307.08621):  S_t = γ_h S_{t-1} + k_t v_tᵀ,   o_t = K^-½ S_tᵀ q_t,   with γ_h = 1 - 2^(-5-h)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hydrax.core.build import ChunkSize, Positive, PositiveFloat
from hydrax.core.numerics import wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.nn.position import Rope
from hydrax.parallel.sequence import linear_attention


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 8
    key_dim: Positive | None = None  # K per head; d_model / heads if None
    value_dim: Positive | None = None  # V per head; 2 d_model / heads if None
    rope: Rope = dataclasses.field(default_factory=Rope)
    norm_affine: bool = True  # a learned weight in the output norm
    norm_eps: PositiveFloat = 1e-5  # of the output norm
    chunk_size: ChunkSize | None = None  # tokens per chunk of the training form

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "torchscale": {"rope": {"style": "torchscale"}, "norm_affine": False, "norm_eps": 1e-6},
    }

    def fill(self, d_model: int) -> "Config":
        return dataclasses.replace(
            self,
            key_dim=self.key_dim or per_head(d_model, self.heads),
            value_dim=self.value_dim or 2 * per_head(d_model, self.heads),
        )


class Retention(Mixer):
    """q, k = RoPE(W x);  y = W_o (RMSNorm_V(o) ⊙ silu(W_g x)). That norm undoes the row sums the paper divides by."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V = cfg.heads, cfg.key_dim, cfg.value_dim
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.v = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), rngs=rngs)
        self.gate = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), rngs=rngs)
        self.norm = RMSNorm(V, axes=("state_v",), eps=cfg.norm_eps, affine=cfg.norm_affine, rngs=rngs)
        self.project = Linear((H, V), d_model, axes=("heads", "state_v", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        rope = self.cfg.rope
        o, memory = linear_attention(
            rope.turn(self.q(x), ctx.positions),
            rope.turn(ctx.tap("keys", self.k(x)), ctx.positions),
            ctx.tap("values", self.v(x)),
            log_decay(self.cfg.heads),
            initial_state=None if state is None else state["memory"],
            chunk_size=self.cfg.chunk_size,
            **ctx.rows,
        )
        return self.norm(ctx.tap("reads", o)) * jax.nn.silu(self.gate(x)), {"memory": memory}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        return {"memory": jnp.zeros((batch, cfg.heads, cfg.key_dim, cfg.value_dim), wide(dtype))}


def log_decay(heads: int) -> Array:
    """g [H] = log(1 - 2^(-5-h)) for h = 0 .. H-1."""
    return jnp.asarray(np.log1p(-(2.0 ** (-5 - np.arange(heads)))), jnp.float32)
