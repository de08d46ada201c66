"""Gated slot attention (arXiv 2409.07146), a memory of M slots that forget, and take up as much as they forget:

K̃_t = diag(e^g_t) K̃_{t-1} + (1 - e^g_t) k_tᵀ,      Ṽ_t = diag(e^g_t) Ṽ_{t-1} + (1 - e^g_t) v_tᵀ,
o_t = Ṽ_tᵀ softmax(K̃_t q_t)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ChunkSize, Positive, PositiveFloat
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.parallel.sequence import slot_attention

FEATURES = {"silu": jax.nn.silu, "relu": jax.nn.relu}


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 4
    slots: Positive = 64  # M per head
    key_dim: Positive | None = None  # K per head; d_model / heads if None
    value_dim: Positive | None = None  # V per head; d_model / heads if None
    feature: Literal["silu", "relu"] = "silu"  # of q and k
    gate_divisor: PositiveFloat = 8.0  # g = log sigmoid(.) / gate_divisor
    scale: PositiveFloat = 1.0  # factor on the scores of the slots
    norm_affine: bool = True  # a learned weight in the output norm
    norm_eps: PositiveFloat = 1e-5  # of the output norm
    chunk_size: ChunkSize | None = None  # tokens per chunk of the training form

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "flame_340m": {"gate_divisor": 4.0, "norm_affine": False},
        "flame_1p3b": {"norm_affine": False},
    }

    def fill(self, d_model: int) -> "Config":
        return dataclasses.replace(
            self,
            key_dim=self.key_dim or per_head(d_model, self.heads),
            value_dim=self.value_dim or per_head(d_model, self.heads),
        )


class GSA(Mixer):
    """q, k = φ(W x), v = silu(W_v x), g = log σ(W_f x) / 8 per slot;  y = W_o RMSNorm_HV(silu(o))."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V, M = cfg.heads, cfg.key_dim, cfg.value_dim, cfg.slots
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.v = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), rngs=rngs)
        self.forget = Linear(d_model, (H, M), axes=("embed", "heads", "slots"), rngs=rngs)
        self.norm = RMSNorm((H, V), axes=("heads", "state_v"), eps=cfg.norm_eps, affine=cfg.norm_affine, rngs=rngs)
        self.project = Linear((H, V), d_model, axes=("heads", "state_v", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        feature = FEATURES[self.cfg.feature]
        g = jax.nn.log_sigmoid(fp32(self.forget(x))) / self.cfg.gate_divisor
        o, (keys, values) = slot_attention(
            feature(self.q(x)),
            feature(self.k(x)),
            ctx.tap("values", jax.nn.silu(self.v(x))),
            -jnp.expm1(g),  # 1 - e^g has no digits where little is forgotten
            g,
            scale=self.cfg.scale,
            initial_state=None if state is None else (state["memory"]["k"], state["memory"]["v"]),
            chunk_size=self.cfg.chunk_size,
            **ctx.rows,
        )
        return self.norm(jax.nn.silu(ctx.tap("reads", o))), {"memory": {"k": keys, "v": values}}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        shape = (batch, self.cfg.heads, self.cfg.slots)
        widths = {"k": self.cfg.key_dim, "v": self.cfg.value_dim}
        return {"memory": {name: jnp.zeros((*shape, width), wide(dtype)) for name, width in widths.items()}}
