"""Attention with bounded-memory control (arXiv 2110.02488), M slots that hold running averages weighted by e^{s_i}:

K̃_t = Σ_{i<=t} e^{s_i} k_iᵀ / Σ_{i<=t} e^{s_i},      Ṽ_t alike,      o_t = Ṽ_tᵀ softmax(K^-½ K̃_t q_t)
"""

import dataclasses
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ChunkSize, Positive, PositiveFloat
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.nn.position import Rope
from hydrax.parallel.sequence import slot_attention, softmax_decay

FEATURES = {"none": lambda x: x, "silu": jax.nn.silu}

MAX_LOGIT = 32.0
"""Bound on |s|: sums of e^s over a document stay within fp32."""


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 4
    slots: Positive = 64  # M per head
    key_dim: Positive | None = None  # K per head; d_model / (2 heads) if None
    value_dim: Positive | None = None  # V per head; d_model / heads if None
    feature: Literal["none", "silu"] = "none"  # of q, k and v
    rope: Rope = dataclasses.field(default_factory=Rope)
    norm_affine: bool = True  # a learned weight in the output norm
    norm_eps: PositiveFloat = 1e-5  # of the output norm
    chunk_size: ChunkSize | None = None  # tokens per chunk of the training form

    def fill(self, d_model: int) -> "Config":
        width = self.value_dim or per_head(d_model, self.heads)
        return dataclasses.replace(self, key_dim=self.key_dim or max(1, width // 2), value_dim=width)


class ABC(Mixer):
    """q, k = RoPE(W x), s = W_s x within ±32;  y = W_o (RMSNorm_V(o) ⊙ silu(W_g x)).

    The state has the averages K̃ and Ṽ, and the weight z = Σ_i e^{s_i} behind each slot.
    """

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V, M = cfg.heads, cfg.key_dim, cfg.value_dim, cfg.slots
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.v = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), rngs=rngs)
        self.logits = Linear(d_model, (H, M), axes=("embed", "heads", "slots"), rngs=rngs)
        self.gate = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), rngs=rngs)
        self.norm = RMSNorm(V, axes=("state_v",), eps=cfg.norm_eps, affine=cfg.norm_affine, rngs=rngs)
        self.project = Linear((H, V), d_model, axes=("heads", "state_v", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = None if state is None else state["memory"]
        feature, rope = FEATURES[self.cfg.feature], self.cfg.rope
        g, z = softmax_decay(
            jnp.clip(fp32(self.logits(x)), -MAX_LOGIT, MAX_LOGIT),
            initial_state=None if past is None else past["z"],
            **ctx.rows,
        )
        o, (keys, values) = slot_attention(
            rope.turn(feature(self.q(x)), ctx.positions),
            rope.turn(feature(self.k(x)), ctx.positions),
            ctx.tap("values", feature(self.v(x))),
            -jnp.expm1(g),
            g,
            initial_state=None if past is None else (past["k"], past["v"]),
            chunk_size=self.cfg.chunk_size,
            **ctx.rows,
        )
        return self.norm(ctx.tap("reads", o)) * jax.nn.silu(self.gate(x)), {"memory": {"k": keys, "v": values, "z": z}}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        shapes = {"k": (cfg.slots, cfg.key_dim), "v": (cfg.slots, cfg.value_dim), "z": (cfg.slots,)}
        return {"memory": {name: jnp.zeros((batch, cfg.heads, *s), wide(dtype)) for name, s in shapes.items()}}
