"""Multi-head latent attention (arXiv 2405.04434): keys and values of every head are made of one latent c per token.

    k_h = [c U_h, k_r],   v_h = c V_h,   o_h = Σ_{s<=t} softmax_s((K_n + K_r)^-½ q_h·k_hs) v_hs

The state holds c and the rotated k_r. Since [q_n, q_r]·[c U_h, k_r] = [q_n U_hᵀ, q_r]·[c, k_r], queries that absorb U_h
can attend to the latents themselves, with one key for all heads, and V_h acts on what they read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Positive, PositiveFloat
from hydrax.core.numerics import einsum
from hydrax.core.typing import Array, Float, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn import kv_cache
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.nn.position import Rope


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 4
    q_rank: Positive | None = None  # width of a latent of the queries; None: they are made of x itself
    kv_rank: Positive | None = None  # r, width of the latent of keys and values; 4 nope_dim if None
    nope_dim: Positive | None = None  # K_n, channels of queries and keys made of latents; d_model / heads if None
    rope_dim: Positive | None = None  # K_r, channels that turn, in one key for all heads; nope_dim / 2 if None
    value_dim: Positive | None = None  # V per head; nope_dim if None
    rope: Rope = dataclasses.field(default_factory=Rope)  # of these channels; with fraction = 0 they do not turn
    norm_eps: PositiveFloat = 1e-6  # of the latents' norms

    # DeepSeek-V2 and V3 (d_model 5120, 7168; without their extension to long contexts), Kimi-Linear 48B (2304).
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "deepseek": {
            "heads": 128,
            "q_rank": 1536,
            "kv_rank": 512,
            "nope_dim": 128,
            "rope_dim": 64,
            "value_dim": 128,
            "rope": {"style": "interleaved"},
        },
        "kimi": {
            "heads": 32,
            "kv_rank": 512,
            "nope_dim": 128,
            "rope_dim": 64,
            "value_dim": 128,
            "rope": {"fraction": 0.0},
        },
    }

    def fill(self, d_model: int) -> "Config":
        K = self.nope_dim or per_head(d_model, self.heads)
        return dataclasses.replace(
            self,
            nope_dim=K,
            rope_dim=self.rope_dim or max(1, K // 2),
            kv_rank=self.kv_rank or 4 * K,
            value_dim=self.value_dim or K,
        )

    def absorbs(self, tokens: int) -> bool:
        """Whether that many queries are cheaper to widen than the latents of all keys are to expand: FLOPs per key."""
        made = self.nope_dim + self.value_dim
        return tokens * (2 * self.kv_rank - made) < self.kv_rank * made


class LatentAttention(Mixer):
    """c = norm(W_c x), k_r = RoPE(W_r x), [q_n, q_r] = W_q x or W_q norm(W_a x), q_r turned as well;  y = W_o o."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, r, heads = cfg.heads, cfg.kv_rank, ("heads", "head_dim")
        self.q_latent = Latent(d_model, cfg.q_rank, cfg.norm_eps, rngs=rngs) if cfg.q_rank else None
        source = (d_model, "embed") if cfg.q_rank is None else (cfg.q_rank, "rank")
        self.q = Linear(source[0], (H, cfg.nope_dim + cfg.rope_dim), axes=(source[1], *heads), rngs=rngs)
        self.latent = Latent(d_model, r, cfg.norm_eps, rngs=rngs)
        self.k_rope = Linear(d_model, (1, cfg.rope_dim), axes=("embed", "kv_heads", "head_dim"), rngs=rngs)
        self.k = Linear(r, (H, cfg.nope_dim), axes=("rank", *heads), rngs=rngs)
        self.v = Linear(r, (H, cfg.value_dim), axes=("rank", *heads), rngs=rngs)
        self.project = Linear((H, cfg.value_dim), d_model, axes=(*heads, "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        facts = ctx.places
        q = self.q(x if self.q_latent is None else self.q_latent(x))
        q_n, q_r = jnp.split(q, [self.cfg.nope_dim], axis=-1)
        q_r, k_r = (self.cfg.rope.turn(part, ctx.positions) for part in (q_r, self.k_rope(x)))
        c = self.latent(x)[:, :, None]
        keys = kv_cache.collect(k_r, c, state, **facts)
        # Training forms the values of all tokens, as does a tap that wants to see them.
        absorb = state is not None and self.cfg.absorbs(x.shape[1]) and "values" not in ctx.taps
        o = (self._absorbed if absorb else self._expanded)(q_n, q_r, keys, ctx, facts)
        return ctx.tap("reads", o), kv_cache.write(state, k_r, c, **facts)

    def _expanded(self, q_n: Array, q_r: Array, keys: kv_cache.Keys, ctx: Context, facts: dict[str, Any]) -> Array:
        """Attention of every head to its own keys and values, made of the latents here."""
        c = keys.v[:, :, 0]
        k_n, v = self.k(c), self.v(c)
        k_r = jnp.broadcast_to(keys.k, (*k_n.shape[:-1], self.cfg.rope_dim))
        keys = keys._replace(k=jnp.concatenate([k_n, k_r], axis=-1), v=ctx.tap("values", v))
        return kv_cache.attend(jnp.concatenate([q_n, q_r], axis=-1), keys, **facts, shards=ctx.shards, impl=ctx.impl)

    def _absorbed(self, q_n: Array, q_r: Array, keys: kv_cache.Keys, ctx: Context, facts: dict[str, Any]) -> Array:
        """The same, by attention of all heads to the latents."""
        up, down = (weight.kernel[...].astype(q_n.dtype) for weight in (self.k, self.v))
        q = jnp.concatenate([einsum("bthn,rhn->bthr", q_n, up).astype(q_r.dtype), q_r], axis=-1)
        scale = (self.cfg.nope_dim + self.cfg.rope_dim) ** -0.5
        keys = keys._replace(k=jnp.concatenate([keys.v, keys.k], axis=-1))
        o = kv_cache.attend(q, keys, **facts, shards=ctx.shards, scale=scale, impl=ctx.impl)
        return einsum("bthr,rhv->bthv", o, down).astype(q.dtype)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return kv_cache.empty(batch, max_len, 1, self.cfg.rope_dim, self.cfg.kv_rank, dtype)


class Latent(nnx.Module):
    """RMSNorm(W x) of a low rank."""

    def __init__(self, d_model: int, rank: int, eps: float, *, rngs: nnx.Rngs):
        self.down = Linear(d_model, rank, axes=("embed", "rank"), rngs=rngs)
        self.norm = RMSNorm(rank, axes=("rank",), eps=eps, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T R"]:
        return self.norm(self.down(x))
