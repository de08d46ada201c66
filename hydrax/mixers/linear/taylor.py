"""Softmax attention whose exponential is a polynomial, and so a linear attention: `taylor` (arXiv 2510.11602), `based`
and `fastmax`.

o_t = Σ_{j<=t} w_tj v_j / Σ_{j<=t} w_tj,      w_tj = 1 + s + s²/2 = φ(q_t)·φ(k_j),      s = K^-½ q_t·k_j
"""

import dataclasses
from typing import Any, Literal, Self, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ChunkSize, Positive
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn.features import divided, taylor2, taylor2_width, with_ones
from hydrax.nn.linear import Linear
from hydrax.nn.param import param
from hydrax.nn.position import Rope
from hydrax.parallel.sequence import linear_attention

LONGEST = 0.999
"""c of fastmax at most, with degree 1: weights 1 + s stay positive."""

EPS = 1e-6
"""Added by fastmax to the squared length of a query or key."""


@dataclasses.dataclass(frozen=True)
class TaylorConfig(MixerConfig):
    heads: Positive = 4
    key_dim: Positive = 16  # K per head; the state has 1 + K + K (K + 1) / 2 rows
    value_dim: Positive | None = None  # V per head; d_model / heads if None
    rope: Rope = dataclasses.field(default_factory=Rope)
    chunk_size: ChunkSize | None = None  # tokens per chunk of the training form

    def fill(self, d_model: int) -> Self:
        return dataclasses.replace(self, value_dim=self.value_dim or per_head(d_model, self.heads))

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(heads, features, V and the normaliser)."""
        return self.heads, taylor2_width(self.key_dim), self.value_dim + 1


class Taylor(Mixer):
    """q, k = RoPE(W x);  y = W_o o.

    In fp32 from the features on: w >= ½ is the sum of products of features that may be far larger and cancel.
    """

    Config: TypeAlias = TaylorConfig

    def __init__(self, d_model: int, cfg: TaylorConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V = cfg.heads, cfg.key_dim, cfg.value_dim
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.v = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), rngs=rngs)
        self.project = Linear((H, V), d_model, axes=("heads", "state_v", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        o, memory = linear_attention(
            self.features(self.q(x), ctx.positions),
            self.features(ctx.tap("keys", self.k(x)), ctx.positions),
            with_ones(fp32(ctx.tap("values", self.v(x)))),
            scale=1.0,
            initial_state=None if state is None else state["memory"],
            chunk_size=self.cfg.chunk_size,
            **ctx.rows,
        )
        return ctx.tap("reads", divided(o).astype(x.dtype)), {"memory": memory}

    def features(self, x: Array, positions: Array) -> Array:
        """φ of queries and keys [B,T,H,K], turned to their positions, in fp32."""
        return taylor2(fp32(self.cfg.rope.turn(x, positions)))

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return {"memory": jnp.zeros((batch, *self.cfg.state_shape), wide(dtype))}


@dataclasses.dataclass(frozen=True)
class BasedConfig(TaylorConfig):
    rope: Rope = dataclasses.field(default_factory=lambda: Rope(fraction=0.0))


class Based(Taylor):
    """Based (arXiv 2402.18668): linear attention whose features make the exponential's Taylor polynomial of degree 2.

        o_t = Σ_{j<=t} w_tj v_j / Σ_{j<=t} w_tj,      w_tj = 1 + s + s²/2,      s = K^-½ q_t·k_j

    It is `taylor` without positions: in the paper's models short convolutions and windows of attention, layers of their
    own, tell the order (configs/recipes/based.py).
    """

    Config: TypeAlias = BasedConfig


@dataclasses.dataclass(frozen=True)
class FastmaxConfig(TaylorConfig):
    degree: Literal[1, 2] = 2  # of the polynomial
    rope: Rope = dataclasses.field(default_factory=lambda: Rope(fraction=0.0))

    @property
    def state_shape(self) -> tuple[int, int, int]:
        width = 1 + self.key_dim if self.degree == 1 else taylor2_width(self.key_dim)
        return self.heads, width, self.value_dim + 1


class Fastmax(Taylor):
    """Fastmax (arXiv 2402.07901): attention with a polynomial of the scores in place of the exponential.

        o_t = Σ_{j<=t} w_tj v_j / Σ_{j<=t} w_tj,      w_tj = 1 + s (+ s²/2),      s = q̂_t·k̂_j

    q̂ and k̂ are of zero mean and of length c, one per head, so that |s| <= c². The statistics are those of a token: the
    public code takes them over the whole input, and so looks ahead.
    """

    Config: TypeAlias = FastmaxConfig
    cfg: FastmaxConfig

    def __init__(self, d_model: int, cfg: Any, *, rngs: nnx.Rngs):
        super().__init__(d_model, cfg, rngs=rngs)
        self.length = param(rngs, jax.nn.initializers.ones, (cfg.heads,), ("heads",))

    def features(self, x: Array, positions: Array) -> Array:
        y = fp32(x)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y**2).sum(-1, keepdims=True) + EPS)
        y = self.cfg.rope.turn(y, positions)  # not before: scores would no longer depend on distances alone
        c = self.length[...]
        if self.cfg.degree == 1:
            c = jnp.clip(c, -LONGEST, LONGEST)
            return jnp.concatenate([jnp.ones_like(y[..., :1]), c[:, None] * y], axis=-1)
        return taylor2(y * (c * x.shape[-1] ** 0.25)[:, None])
