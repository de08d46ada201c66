"""What delta-rule mixers share: their common options, and the way from x to queries, keys, values and β."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ChunkSize, ConfigError, Positive, PositiveFloat
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float
from hydrax.nn.conv import ShortConv
from hydrax.nn.linear import Linear
from hydrax.nn.norm import l2_norm, sum_norm
from hydrax.nn.position import Rope


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
    """Options of every delta-rule mixer."""

    heads: Positive | None = None  # query/key heads; the largest divisor of d_model up to d_model / 128 if None
    key_dim: Positive | None = None  # K per head; d_model / heads if None
    value_dim: Positive | None = None  # V per value head; key_dim if None
    conv_width: Positive = 4  # taps of the convolutions on q, k, v; 1 keeps tokens apart and costs much quality
    conv_init: Literal["uniform", "normal"] = "uniform"  # of their weights: ±1/sqrt(conv_width), or N(0, 0.02²)
    qk_activation: Literal["silu", "relu", "elu1", "identity"] = "silu"  # after these convolutions; v has silu
    qk_norm: Literal["l2", "sum"] = "l2"  # what is 1 for every query and key: the L2 norm, or the sum
    rope: Rope | None = None  # of q and k after their norm; None: no positions but those of convolution and decay
    allow_neg_eigval: bool = False  # β in (0, 2) instead of (0, 1): transitions with eigenvalues down to -1
    beta_bias: bool = False  # β = σ(W_b x + b)
    out_gate: Literal["none", "silu", "sigmoid"] = "silu"  # of W_g x, on the normalised outputs
    norm_eps: PositiveFloat = 1e-5  # of the output norm; outputs are small at initialisation
    chunk_size: ChunkSize | None = None  # tokens per chunk of the training form

    def __post_init__(self) -> None:
        if self.qk_norm == "sum" and self.qk_activation not in ("relu", "elu1"):
            allowed = f"expected l2, since a sum of {self.qk_activation} may vanish, or qk_activation relu or elu1"
            raise ConfigError("qk_norm", self.qk_norm, allowed)


class DeltaInputs(nnx.Module):
    """q, k = RoPE(norm(act(conv(W x)))), v = silu(conv(W x)), β = σ(W_b x) or 2σ(W_b x) in fp32.

    The state is the last inputs of the three convolutions. Without `rope` nothing turns.
    """

    def __init__(self, d_model: int, cfg: DeltaConfig, value_heads: int, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, Hv, K, V, W = cfg.heads, value_heads, cfg.key_dim, cfg.value_dim, cfg.conv_width
        keys, values = ("heads", "state_k"), ("heads", "state_v")
        act = None if cfg.qk_activation == "identity" else cfg.qk_activation
        self.q = Linear(d_model, (H, K), axes=("embed", *keys), rngs=rngs)
        self.k = Linear(d_model, (H, K), axes=("embed", *keys), rngs=rngs)
        self.v = Linear(d_model, (Hv, V), axes=("embed", *values), rngs=rngs)
        self.q_conv = ShortConv((H, K), W, axes=keys, activation=act, init=cfg.conv_init, rngs=rngs)
        self.k_conv = ShortConv((H, K), W, axes=keys, activation=act, init=cfg.conv_init, rngs=rngs)
        self.v_conv = ShortConv((Hv, V), W, axes=values, init=cfg.conv_init, rngs=rngs)
        self.beta = Linear(d_model, Hv, axes=("embed", "heads"), bias=cfg.beta_bias, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        ctx: Any,
        state: Mapping[str, Array] | None,
    ) -> tuple[tuple[Array, Array, Array, Array], dict[str, Array]]:
        """(q, k, v, β) as `delta_rule` takes them, and the new state.

        `ctx` is the context of the mixer (`mixers.Context`): it gives positions and documents, and taps "keys" before
        their norm and "values".
        """
        past = dict.fromkeys("qkv") if state is None else state
        facts = {"segment_ids": ctx.segment_ids, "shards": ctx.shards, "impl": ctx.impl}
        q, q_tail = self.q_conv(self.q(x), past["q"], **facts)
        k, k_tail = self.k_conv(self.k(x), past["k"], **facts)
        v, v_tail = self.v_conv(self.v(x), past["v"], **facts)
        q, k = self._placed(q, ctx), self._placed(ctx.tap("keys", k), ctx)
        beta = jax.nn.sigmoid(fp32(self.beta(x))) * (2 if self.cfg.allow_neg_eigval else 1)
        return (q, k, ctx.tap("values", v), beta), {"q": q_tail, "k": k_tail, "v": v_tail}

    def _placed(self, x: Array, ctx: Any) -> Array:
        """Queries or keys, normed and turned to their positions."""
        x = sum_norm(x) if self.cfg.qk_norm == "sum" else l2_norm(x, impl=ctx.impl)
        return x if self.cfg.rope is None else self.cfg.rope.turn(x, ctx.positions)

    def init_state(self, batch: int, dtype: jnp.dtype) -> dict[str, Array]:
        """The inputs before token 0: zeros."""
        convs = {"q": self.q_conv, "k": self.k_conv, "v": self.v_conv}
        return {name: conv.init_state(batch, dtype) for name, conv in convs.items()}
