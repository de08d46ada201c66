"""Softmax attention without queries that meet other tokens' keys (arXiv 2510.11602): a score belongs to one token,

o_t = Σ_{j<=t} e^{s_j} v_j / Σ_{j<=t} e^{s_j},      s_j = K^-½ q_j·k_j,      q = silu(W_q x)

Nothing bounds s: layers of it alone reach scores of thousands, unless q and k are normed.
"""

import dataclasses
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ChunkSize, Positive
from hydrax.core.numerics import einsum, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.parallel.sequence import slot_softmax


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 4
    key_dim: Positive | None = None  # K per head; d_model / heads if None
    value_dim: Positive | None = None  # V per head; d_model / heads if None
    qk_norm: Literal["none", "head"] = "none"  # RMSNorm of silu(W_q x) and of k over K
    chunk_size: ChunkSize | None = None  # tokens per chunk of the training form

    def fill(self, d_model: int) -> "Config":
        return dataclasses.replace(
            self,
            key_dim=self.key_dim or per_head(d_model, self.heads),
            value_dim=self.value_dim or per_head(d_model, self.heads),
        )


class NonApprox(Mixer):
    """y = W_o o; the state holds the largest score, rounded to an integer, and both sums over its exponential."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V = cfg.heads, cfg.key_dim, cfg.value_dim
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.v = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), rngs=rngs)
        normed = cfg.qk_norm == "head"
        self.q_norm = RMSNorm(K, axes=("state_k",), rngs=rngs) if normed else None
        self.k_norm = RMSNorm(K, axes=("state_k",), rngs=rngs) if normed else None
        self.project = Linear((H, V), d_model, axes=("heads", "state_v", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = None if state is None else state["memory"]
        scores = self._scores(x)[..., None]  # one slot
        o, (top, numerator, denominator) = slot_softmax(
            jnp.ones_like(scores),
            scores,
            ctx.tap("values", self.v(x)),
            initial_state=None if past is None else (state["max"], past["numerator"], past["denominator"]),
            chunk_size=self.cfg.chunk_size,
            **ctx.rows,
        )
        memory = {"numerator": numerator, "denominator": denominator}
        return ctx.tap("reads", o), {"max": top, "memory": memory}

    def _scores(self, x: Array) -> Array:
        """s [B,T,H], in fp32."""
        q, k = jax.nn.silu(self.q(x)), self.k(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return einsum("bthk,bthk->bth", q, k) * self.cfg.key_dim**-0.5

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        slot = (batch, self.cfg.heads, 1)
        sums = {"numerator": (*slot, self.cfg.value_dim), "denominator": slot}
        memory = {name: jnp.zeros(shape, wide(dtype)) for name, shape in sums.items()}
        return {"max": jnp.zeros(slot, jnp.int32), "memory": memory}
