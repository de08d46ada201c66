"""Gated linear attention (arXiv 2312.06635):  S_t = diag(exp g_t) S_{t-1} + k_t v_tᵀ,   o_t = K^-1/2 S_tᵀ q_t."""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ChunkSize, Positive, PositiveFloat
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.parallel.sequence import linear_attention


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 4
    key_dim: Positive | None = None  # K per head; d_model / (2 heads) if None
    value_dim: Positive | None = None  # V per head; d_model / heads if None
    gate_rank: Positive = 16  # low-rank width of the decay projection
    gate_divisor: PositiveFloat = 16.0  # g = log sigmoid(.) / gate_divisor
    chunk_size: ChunkSize | None = None  # tokens per chunk of the training form

    def fill(self, d_model: int) -> "Config":
        width = self.value_dim or per_head(d_model, self.heads)
        return dataclasses.replace(self, key_dim=self.key_dim or max(1, width // 2), value_dim=width)


class GLA(Mixer):
    """g = log σ(W₂W₁x + b) / 16 per key channel;  y = W_o (RMSNorm_V(o) ⊙ silu(W_g x))."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V = cfg.heads, cfg.key_dim, cfg.value_dim
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.v = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), rngs=rngs)
        self.decay_down = Linear(d_model, cfg.gate_rank, axes=("embed", "rank"), rngs=rngs)
        self.decay_up = Linear(cfg.gate_rank, (H, K), axes=("rank", "heads", "state_k"), bias=True, rngs=rngs)
        self.gate = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), rngs=rngs)
        self.norm = RMSNorm(V, axes=("state_v",), rngs=rngs)
        self.project = Linear((H, V), d_model, axes=("heads", "state_v", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        g = jax.nn.log_sigmoid(fp32(self.decay_up(self.decay_down(x)))) / self.cfg.gate_divisor
        o, memory = linear_attention(
            self.q(x),
            ctx.tap("keys", self.k(x)),
            ctx.tap("values", self.v(x)),
            g,
            initial_state=None if state is None else state["memory"],
            chunk_size=self.cfg.chunk_size,
            **ctx.rows,
        )
        return self.norm(ctx.tap("reads", o)) * jax.nn.silu(self.gate(x)), {"memory": memory}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        return {"memory": jnp.zeros((batch, cfg.heads, cfg.key_dim, cfg.value_dim), wide(dtype))}
