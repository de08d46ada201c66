"""Linear attention (arXiv 2006.16236): S_t = S_{t-1} + φ(k_t) v_tᵀ,  o_t = S_tᵀφ(q_t) / z_tᵀφ(q_t),  z_t = Σ φ(k_s).

Normalised attention (2405.15731) has o_t = exp(-w·x_t - b) S_tᵀφ(q_t), with a w and a b for every head.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ChunkSize, ConfigError, Positive, PositiveFloat
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn import features
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.parallel.sequence import linear_attention

Normalizer = Literal["sum", "rmsnorm", "learned"]
"""Division by zᵀφ(q), RMSNorm of each head, or the factor exp(-w·x - b), its exponent in ±`LARGEST`."""

LARGEST = 10.0


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 8
    key_dim: Positive | None = None  # K per head, before the feature map; d_model / heads if None
    value_dim: Positive | None = None  # V per head; d_model / heads if None
    feature_map: features.Name = "elu1"  # φ of queries and keys
    normalizer: Normalizer | None = None  # see `Normalizer`; sum where φ(q)·φ(k) >= 0, else rmsnorm, if None
    norm_eps: PositiveFloat = 1e-5  # of that RMSNorm
    bias: bool = False  # of queries, keys, values and outputs
    chunk_size: ChunkSize | None = None  # tokens per chunk of the training form

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "fla": {"feature_map": "hadamard", "normalizer": "rmsnorm"},
        "normalised": {"feature_map": "identity", "normalizer": "learned", "bias": True},
    }

    def __post_init__(self) -> None:
        if self.normalizer == "sum" and not features.TABLE[self.feature_map].nonnegative:
            usable = ", ".join(name for name, row in features.TABLE.items() if row.nonnegative)
            allowed = f"{self.feature_map} can be negative, and so can the sum: expected rmsnorm or learned"
            raise ConfigError("normalizer", "sum", f"{allowed}, or feature_map {usable}")

    def fill(self, d_model: int) -> "Config":
        usual: Normalizer = "sum" if features.TABLE[self.feature_map].nonnegative else "rmsnorm"
        return dataclasses.replace(
            self,
            key_dim=self.key_dim or per_head(d_model, self.heads),
            value_dim=self.value_dim or per_head(d_model, self.heads),
            normalizer=self.normalizer or usual,
        )

    @property
    def map_matrices(self) -> int:
        """Learned K x K matrices that every head applies, to queries and to keys."""
        return features.TABLE[self.feature_map].matrices

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Heads, features of a key, and columns: the values and, if it is needed, z."""
        return (
            self.heads,
            features.TABLE[self.feature_map].width(self.key_dim),
            self.value_dim + (self.normalizer == "sum"),
        )


class LinearAttention(Mixer):
    """y = W_o o."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V = cfg.heads, cfg.key_dim, cfg.value_dim
        make = features.TABLE[cfg.feature_map].make
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), bias=cfg.bias, rngs=rngs)
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), bias=cfg.bias, rngs=rngs)
        self.v = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), bias=cfg.bias, rngs=rngs)
        self.q_map, self.k_map = make(K, rngs), make(K, rngs)
        rms, learned = cfg.normalizer == "rmsnorm", cfg.normalizer == "learned"
        self.norm = RMSNorm(V, axes=("state_v",), eps=cfg.norm_eps, rngs=rngs) if rms else None
        self.size = Linear(d_model, H, axes=("embed", "heads"), bias=True, rngs=rngs) if learned else None
        axes = ("heads", "state_v", "embed")
        self.project = Linear((H, V), d_model, axes=axes, bias=cfg.bias, residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        divides = self.cfg.normalizer == "sum"
        v = ctx.tap("values", self.v(x))
        o, memory = linear_attention(
            self.q_map(self.q(x)),
            self.k_map(ctx.tap("keys", self.k(x))),
            features.with_ones(v) if divides else v,
            scale=None if self.size is None else 1.0,
            initial_state=None if state is None else state["memory"],
            chunk_size=self.cfg.chunk_size,
            **ctx.rows,
        )
        o = ctx.tap("reads", features.divided(o) if divides else o)
        return self._scaled(o, x), {"memory": memory}

    def _scaled(self, o: Array, x: Array) -> Array:
        if self.size is not None:
            exponent = jnp.clip(self.size(x, exact=True), -LARGEST, LARGEST)
            return (fp32(o) * jnp.exp(-exponent)[..., None]).astype(o.dtype)
        return o if self.norm is None else self.norm(o)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return {"memory": jnp.zeros((batch, *self.cfg.state_shape), wide(dtype))}
