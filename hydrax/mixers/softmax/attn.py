"""Softmax attention (arXiv 1706.03762, grouped heads 2305.13245):  o_t = Σ_{s<=t} softmax_s(K^-1/2 q_t·k_s) v_s.

With n hops (end-to-end memory networks, arXiv 1503.08895) what is read joins the query, which reads again:

    u⁰ = q,   u^(h+1) = R u^h + o(u^h),   and u^n is in the place of o

Keys and values are those of one pass over the tokens. R is the identity, or one learned matrix per head for all hops.
u is what the query is before RoPE: every hop turns it to the position of its token.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, Positive
from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, Float, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn import kv_cache
from hydrax.nn.attention import QKV, AttentionConfig, OutGate
from hydrax.nn.linear import Linear
from hydrax.nn.param import param


@dataclasses.dataclass(frozen=True)
class Config(AttentionConfig, MixerConfig):
    hops: Positive | None = None  # how often a query reads, each time with what it has read; None: once, without u
    hop_map: Literal["identity", "learned"] = "identity"  # R

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hop_map != "identity" and self.hops is None:
            raise ConfigError("hop_map", self.hop_map, "needs hops")

    def fill(self, d_model: int) -> "Config":
        filled = self.with_head_width(self.key_dim or per_head(d_model, self.heads))
        if self.hops is not None and filled.value_dim != filled.key_dim:
            raise ConfigError(
                "hops", self.hops, f"expected value_dim = key_dim = {filled.key_dim}, and it is {filled.value_dim}"
            )
        return filled

    def flops(self, tokens: int) -> float:
        """Forward FLOPs per token beside the projections."""
        read = 2 * self.heads * (self.key_dim + self.value_dim) * (tokens + 1) / 2
        turned = 2 * self.heads * self.key_dim**2 if self.hop_map == "learned" else 0
        return read + (read + turned) * ((self.hops or 1) - 1)  # the parameters of R count once


class HopMap(nnx.Module):
    """R u, a matrix per head, in fp32; as published it is of standard deviation 0.05 at first."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        shape, axes = (cfg.heads, cfg.key_dim, cfg.value_dim), ("heads", "head_dim", "head_dim")
        normal = jax.nn.initializers.normal(0.05)
        self.kernel = param(rngs, normal, shape, axes, decay=True, matrix=((-2,), (-1,)), cast=True)

    def __call__(self, u: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
        return einsum("bthk,hkv->bthv", u, self.kernel[...].astype(u.dtype))


class Attention(Mixer):
    """y = W_o (attention(q, k, v) ⊙ σ(W_g x)); the state holds the keys and values of the whole document."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.qkv = QKV(d_model, cfg, rngs=rngs)
        self.gate = OutGate(d_model, cfg, rngs=rngs)
        axes = ("heads", "head_dim", "embed")
        shape = (cfg.heads, cfg.value_dim)
        self.project = Linear(shape, d_model, axes=axes, bias=cfg.out_bias, residual=True, rngs=rngs)
        self.hop = HopMap(cfg, rngs=rngs) if cfg.hop_map == "learned" else None

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg = self.cfg
        q, keys, state = self.qkv.see(x, ctx, state, placed=cfg.hops is None)
        attend = functools.partial(
            ctx.attend or kv_cache.attend,
            keys=keys,
            positions=ctx.positions,
            segment_ids=ctx.segment_ids,
            scale=cfg.scale,
            softcap=cfg.softcap,
            shards=ctx.shards,
            impl=ctx.impl,
        )
        if cfg.hops is None:
            o = ctx.tap("reads", attend(q, tap_lse=ctx.taps.get("lse")))
        else:  # no linear map from values to what is read: nothing is tapped
            o = self._again(q, lambda u: attend(self.qkv.place(u, ctx.positions)))
        return self.gate(o, x), state

    def _again(self, q: Float[Array, "B T H K"], read: Callable[[Array], Array]) -> Float[Array, "B T H K"]:
        """u^n, summed in fp32."""
        u = q
        for _ in range(self.cfg.hops):
            o = fp32(read(u.astype(q.dtype)))
            u = o + (fp32(u) if self.hop is None else self.hop(u.astype(q.dtype)))
        return u.astype(q.dtype)

    def out(self, z: Array) -> Array:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return self.cfg.init_cache(batch, max_len, dtype)
