"""What softmax mixers share: their common options, the projections to queries, keys and values, the output gate."""

import dataclasses
from typing import Literal, Self

import jax
from flax import nnx

from hydrax.core.build import ConfigError, Positive, PositiveFloat
from hydrax.core.typing import Array, Float, Int
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.nn.position import Rope


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Options of every softmax mixer."""

    heads: Positive = 4
    kv_heads: Positive | None = None  # a divisor of heads; heads if None
    key_dim: Positive | None = None  # K per head; d_model / heads if None
    value_dim: Positive | None = None  # V per head; key_dim if None
    rope: Rope = dataclasses.field(default_factory=Rope)
    qk_norm: Literal["none", "head", "full"] = "none"  # RMSNorm of q and k before RoPE: over K, or over all heads
    out_gate: Literal["none", "elementwise", "headwise"] = "none"  # σ(x W_g) on the heads' outputs (arXiv 2505.06708)
    softcap: PositiveFloat | None = None  # scores become c·tanh(z/c)

    def __post_init__(self) -> None:
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ConfigError("kv_heads", self.kv_heads, f"expected a divisor of heads = {self.heads}")

    def with_head_width(self, width: int) -> Self:
        """The config with key_dim, value_dim and kv_heads filled in for heads of that width."""
        return dataclasses.replace(
            self, kv_heads=self.kv_heads or self.heads, key_dim=width, value_dim=self.value_dim or width
        )


class QKV(nnx.Module):
    """q = RoPE(norm(x W_q)), k = RoPE(norm(x W_k)), v = x W_v."""

    def __init__(self, d_model: int, cfg: AttentionConfig, *, rngs: nnx.Rngs):
        H, G, K, V = cfg.heads, cfg.kv_heads, cfg.key_dim, cfg.value_dim
        self.rope = cfg.rope
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "head_dim"), rngs=rngs)
        self.k = Linear(d_model, (G, K), axes=("embed", "kv_heads", "head_dim"), rngs=rngs)
        self.v = Linear(d_model, (G, V), axes=("embed", "kv_heads", "head_dim"), rngs=rngs)
        self.q_norm = _norm(cfg.qk_norm, (H, K), ("heads", "head_dim"), rngs)
        self.k_norm = _norm(cfg.qk_norm, (G, K), ("kv_heads", "head_dim"), rngs)

    def __call__(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> tuple[Array, Array, Array]:
        q, k = self.q(x), self.k(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.rope.turn(q, positions), self.rope.turn(k, positions), self.v(x)


class OutGate(nnx.Module):
    """o ⊙ σ(x W_g), per channel (elementwise) or per head (headwise)."""

    def __init__(self, d_model: int, cfg: AttentionConfig, *, rngs: nnx.Rngs):
        H, V = cfg.heads, cfg.value_dim
        shapes = {
            "none": None,
            "elementwise": ((H, V), ("embed", "heads", "head_dim")),
            "headwise": ((H,), ("embed", "heads")),
        }
        shape = shapes[cfg.out_gate]
        self.gate = None if shape is None else Linear(d_model, shape[0], axes=shape[1], rngs=rngs)

    def __call__(self, o: Float[Array, "B T H V"], x: Float[Array, "B T D"]) -> Float[Array, "B T H V"]:
        if self.gate is None:
            return o
        gate = jax.nn.sigmoid(self.gate(x))
        return o * gate.reshape(*o.shape[:3], -1)


def _norm(kind: str, shape: tuple[int, int], axes: tuple[str, str], rngs: nnx.Rngs) -> RMSNorm | None:
    dims = {"none": 0, "head": 1, "full": 2}[kind]
    return RMSNorm(shape[-dims:], axes=axes[-dims:], rngs=rngs) if dims else None
