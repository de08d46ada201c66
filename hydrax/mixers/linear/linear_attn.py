"""Linear attention (arXiv 2006.16236): S_t = S_{t-1} + φ(k_t) v_tᵀ,  o_t = S_tᵀφ(q_t) / z_tᵀφ(q_t),  z_t = Σ φ(k_s)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ChunkSize, ConfigError, Positive, PositiveFloat
from hydrax.core.numerics import wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn import features
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.parallel.sequence import linear_attention


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 8
    key_dim: Positive | None = None  # K per head, before the feature map; d_model / heads if None
    value_dim: Positive | None = None  # V per head; d_model / heads if None
    feature_map: features.Name = "elu1"  # φ of queries and keys
    normalise: bool | None = None  # divide by zᵀφ(q), else RMSNorm of each head; if None, where φ(q)·φ(k) >= 0
    norm_eps: PositiveFloat = 1e-5  # of that RMSNorm
    chunk_size: ChunkSize | None = None  # tokens per chunk of the training form

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fla": {"feature_map": "hadamard", "normalise": False},
    }

    def __post_init__(self) -> None:
        if self.normalise and not features.TABLE[self.feature_map].nonnegative:
            usable = ", ".join(name for name, row in features.TABLE.items() if row.nonnegative)
            allowed = f"{self.feature_map} can be negative, and so can the sum: expected false, or feature_map {usable}"
            raise ConfigError("normalise", True, allowed)

    def fill(self, d_model: int) -> "Config":
        return dataclasses.replace(
            self,
            key_dim=self.key_dim or per_head(d_model, self.heads),
            value_dim=self.value_dim or per_head(d_model, self.heads),
            normalise=features.TABLE[self.feature_map].nonnegative if self.normalise is None else self.normalise,
        )

    @property
    def map_matrices(self) -> int:
        """Learned K x K matrices that every head applies, to queries and to keys."""
        return features.TABLE[self.feature_map].matrices

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Heads, features of a key, and columns: the values and, if it is needed, z."""
        return self.heads, features.TABLE[self.feature_map].width(self.key_dim), self.value_dim + self.normalise


class LinearAttention(Mixer):
    """y = W_o o, or W_o RMSNorm_V(S_tᵀφ(q_t)) without the division."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V = cfg.heads, cfg.key_dim, cfg.value_dim
        make = features.TABLE[cfg.feature_map].make
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.v = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), rngs=rngs)
        self.q_map, self.k_map = make(K, rngs), make(K, rngs)
        self.norm = None if cfg.normalise else RMSNorm(V, axes=("state_v",), eps=cfg.norm_eps, rngs=rngs)
        self.project = Linear((H, V), d_model, axes=("heads", "state_v", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        v = ctx.tap("values", self.v(x))
        o, memory = linear_attention(
            self.q_map(self.q(x)),
            self.k_map(ctx.tap("keys", self.k(x))),
            features.with_ones(v) if self.norm is None else v,
            initial_state=None if state is None else state["memory"],
            segment_ids=ctx.segment_ids,
            shards=ctx.shards,
            impl=ctx.impl,
            chunk_size=self.cfg.chunk_size,
        )
        o = ctx.tap("reads", features.divided(o) if self.norm is None else o)
        return o if self.norm is None else self.norm(o), {"memory": memory}

    def out(self, z: Array) -> Array:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return {"memory": jnp.zeros((batch, *self.cfg.state_shape), wide(dtype))}
