"""Softmax attention whose exponential is its Taylor polynomial (arXiv 2510.11602), and so a linear attention:

o_t = Σ_{j<=t} w_tj v_j / Σ_{j<=t} w_tj,      w_tj = 1 + s + s²/2 = φ(q_t)·φ(k_j),      s = K^-½ q_t·k_j
"""

import dataclasses
from typing import TypeAlias

import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Positive
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn.features import divided, taylor2, taylor2_width, with_ones
from hydrax.nn.linear import Linear
from hydrax.nn.position import Rope
from hydrax.parallel.sequence import linear_attention


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 4
    key_dim: Positive = 16  # K per head; the state has 1 + K + K (K + 1) / 2 rows
    value_dim: Positive | None = None  # V per head; d_model / heads if None
    rope: Rope = dataclasses.field(default_factory=Rope)
    chunk_size: Positive | None = None  # tokens per chunk of the training form

    def fill(self, d_model: int) -> "Config":
        return dataclasses.replace(self, value_dim=self.value_dim or per_head(d_model, self.heads))

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(heads, features, V and the normaliser)."""
        return self.heads, taylor2_width(self.key_dim), self.value_dim + 1


class Taylor(Mixer):
    """q, k = RoPE(W x);  y = W_o o.

    In fp32 from the features on: w >= ½ is the sum of products of features that may be far larger and cancel.
    """

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V = cfg.heads, cfg.key_dim, cfg.value_dim
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.v = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), rngs=rngs)
        self.project = Linear((H, V), d_model, axes=("heads", "state_v", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        rope = self.cfg.rope
        o, memory = linear_attention(
            self.features(rope.turn(self.q(x), ctx.positions)),
            self.features(rope.turn(ctx.tap("keys", self.k(x)), ctx.positions)),
            with_ones(fp32(ctx.tap("values", self.v(x)))),
            scale=1.0,
            initial_state=None if state is None else state["memory"],
            segment_ids=ctx.segment_ids,
            shards=ctx.shards,
            impl=ctx.impl,
            chunk_size=self.cfg.chunk_size,
        )
        return ctx.tap("reads", divided(o).astype(x.dtype)), {"memory": memory}

    def features(self, x: Array) -> Array:
        """φ of queries and keys [B,T,H,K], in fp32."""
        return taylor2(fp32(x))

    def out(self, z: Array) -> Array:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return {"memory": jnp.zeros((batch, *self.cfg.state_shape), wide(dtype))}
