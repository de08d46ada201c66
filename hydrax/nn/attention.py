"""What softmax mixers share: their common options, the projections to queries, keys and values, the output gate."""

import dataclasses
import functools
import math
from typing import Annotated, Any, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Check, ConfigError, Positive, PositiveFloat
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Float, Int
from hydrax.nn import kv_cache
from hydrax.nn.kv_cache import Cache, Keys
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.nn.position import Rope
from hydrax.ops.sparse.lifetimes import Pattern

LogBase = Annotated[float, Check("a number > 1", lambda x: x > 1)]


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Options of every softmax mixer."""

    heads: Positive = 4
    kv_heads: Positive | None = None  # a divisor of heads; heads if None
    key_dim: Positive | None = None  # K per head; d_model / heads if None
    value_dim: Positive | None = None  # V per head; key_dim if None
    kv: Literal["own", "shared"] = "own"  # shared: no keys and values of its own, but those another layer lends
    rope: Rope = dataclasses.field(default_factory=Rope)
    qk_norm: Literal["none", "head", "full"] = "none"  # RMSNorm of q and k before RoPE: over K, or over all heads
    out_gate: Literal["none", "elementwise", "headwise"] = "none"  # σ(x W_g) on the heads' outputs (arXiv 2505.06708)
    out_gate_bias: float | None = None  # b of σ(x W_g + b) at first; None: there is no b
    softcap: PositiveFloat | None = None  # scores become c·tanh(z/c)
    scale: PositiveFloat | None = None  # factor on the scores, before that; K^-½ if None
    q_logscale: LogBase | None = None  # a: queries times ln(t + a) / ln(a), t the position in the document
    bias: bool = False  # of the projections to q, k and v
    out_bias: bool = False  # of the output projection

    def __post_init__(self) -> None:
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ConfigError("kv_heads", self.kv_heads, f"expected a divisor of heads = {self.heads}")
        if self.out_gate_bias is not None and self.out_gate == "none":
            raise ConfigError("out_gate_bias", self.out_gate_bias, "needs out_gate = elementwise or headwise")

    def with_head_width(self, width: int) -> Self:
        """The config with key_dim, value_dim and kv_heads filled in for heads of that width."""
        return dataclasses.replace(
            self, kv_heads=self.kv_heads or self.heads, key_dim=width, value_dim=self.value_dim or width
        )

    def init_cache(self, batch: int, slots: int, dtype: jnp.dtype, **kinds: Any) -> Cache:
        """An empty cache of the mixer's keys and values, as `kv_cache.empty`; {} if another layer lends them."""
        if self.kv == "shared":
            return {}
        return kv_cache.empty(batch, slots, self.kv_heads, self.key_dim, self.value_dim, dtype, **kinds)


class QKV(nnx.Module):
    """q = s_t RoPE(norm(x W_q)), k = RoPE(norm(x W_k)), v = x W_v; k and v are None where another layer lends them.

    s_t = 1, or ln(t + a) / ln(a) with `q_logscale` a (arXiv 2601.22156). All three W may have biases. With a `source`
    e [B,T,D] of their own, q and k are made of e instead of x (arXiv 2510.11602). `kv_heads` may be others than those
    of the config.
    """

    def __init__(self, d_model: int, cfg: AttentionConfig, *, rngs: nnx.Rngs, kv_heads: int | None = None):
        H, G, K, V = cfg.heads, kv_heads or cfg.kv_heads, cfg.key_dim, cfg.value_dim
        queries, keys = ("heads", "head_dim"), ("kv_heads", "head_dim")
        own = cfg.kv == "own"
        self.rope, self.q_logscale = cfg.rope, cfg.q_logscale
        self.q = Linear(d_model, (H, K), axes=("embed", *queries), bias=cfg.bias, rngs=rngs)
        self.k = Linear(d_model, (G, K), axes=("embed", *keys), bias=cfg.bias, rngs=rngs) if own else None
        self.v = Linear(d_model, (G, V), axes=("embed", *keys), bias=cfg.bias, rngs=rngs) if own else None
        self.q_norm = _norm(cfg.qk_norm, (H, K), queries, rngs)
        self.k_norm = _norm(cfg.qk_norm, (G, K), keys, rngs) if own else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        source: Float[Array, "B T D"] | None = None,
        *,
        exact: bool = False,
        placed: bool = True,
    ) -> tuple[Array, Array | None, Array | None]:
        """q, k and v.

        `exact`: q and k in fp32, not rounded to the dtype of x, to rank by. Without `placed`, q is that before `place`.
        """
        e = x if source is None else source
        q = self.q(e, exact=exact)
        q = q if self.q_norm is None else self.q_norm(q)
        q = self.place(q, positions) if placed else q
        if self.k is None:
            return q, None, None
        k = self.k(e, exact=exact)
        k = self.rope.turn(k if self.k_norm is None else self.k_norm(k), positions)
        return q, k, self.v(x)

    def place(self, q: Float[Array, "B T H K"], positions: Int[Array, "B T"]) -> Float[Array, "B T H K"]:
        """s_t RoPE(q): queries as keys see them."""
        q = self.rope.turn(q, positions)
        if self.q_logscale is None:
            return q
        grown = jnp.log(positions + self.q_logscale) / math.log(self.q_logscale)
        return (fp32(q) * grown[..., None, None]).astype(q.dtype)

    def see(
        self,
        x: Float[Array, "B T D"],
        ctx: Any,
        cache: Cache | None,
        source: Float[Array, "B T D"] | None = None,
        window: int | None = None,
        sink_tokens: int = 0,
        pattern: Pattern | None = None,
        placed: bool = True,
    ) -> tuple[Array, Keys, Cache | None]:
        """The queries, all that they may see, and the cache after these tokens.

        Args:
          ctx: the context of the mixer (`mixers.Context`): it gives positions and documents, takes a record of own
            keys or lends those of another layer, and taps the values.
          source: what queries and keys are made of, x if None.
          window, sink_tokens: what the cache keeps, see `kv_cache.write`.
          pattern: the same by lifetimes, see `kv_cache.evict`.
          placed: whether the queries are.
        """
        facts = ctx.places
        q, k, v = self(x, ctx.positions, source, placed=placed)
        if k is None:
            keys = kv_cache.shared(ctx.keys)
            return q, keys._replace(v=ctx.tap("values", keys.v)), cache
        v = ctx.tap("values", v)
        keys = kv_cache.collect(k, v, cache, **facts)
        ctx.record("keys", keys)
        if pattern is not None and cache is not None:
            ends, old = (pattern.ends(p, ctx.layer_index) for p in (ctx.positions, cache["positions"]))
            return q, keys, kv_cache.evict(cache, {"k": k, "v": v}, **facts, ends=ends, old_ends=old)
        return q, keys, kv_cache.write(cache, k, v, **facts, window=window, sink_tokens=sink_tokens)


class OutGate(nnx.Module):
    """o ⊙ σ(x W_g + b), per channel (elementwise) or per head (headwise)."""

    def __init__(self, d_model: int, cfg: AttentionConfig, *, rngs: nnx.Rngs):
        H, V = cfg.heads, cfg.value_dim
        shapes = {
            "none": None,
            "elementwise": ((H, V), ("embed", "heads", "head_dim")),
            "headwise": ((H,), ("embed", "heads")),
        }
        shape = shapes[cfg.out_gate]
        biased, b = cfg.out_gate_bias is not None, cfg.out_gate_bias or 0.0
        linear = functools.partial(Linear, d_model, bias=biased, bias_init=b, rngs=rngs)
        self.gate = None if shape is None else linear(shape[0], axes=shape[1])

    def __call__(self, o: Float[Array, "B T H V"], x: Float[Array, "B T D"]) -> Float[Array, "B T H V"]:
        if self.gate is None:
            return o
        gate = jax.nn.sigmoid(self.gate(x))
        return o * gate.reshape(*o.shape[:3], -1)


def _norm(kind: str, shape: tuple[int, int], axes: tuple[str, str], rngs: nnx.Rngs) -> RMSNorm | None:
    dims = {"none": 0, "head": 1, "full": 2}[kind]
    return RMSNorm(shape[-dims:], axes=axes[-dims:], rngs=rngs) if dims else None
