"""Softmax attention (arXiv 1706.03762, grouped heads 2305.13245):  o_t = Σ_{s<=t} softmax_s(K^-1/2 q_t·k_s) v_s.

With n hops (end-to-end memory networks, arXiv 1503.08895) what is read joins the query, which reads again:

    u⁰ = q,   u^(h+1) = R u^h + o(u^h),   and u^n is in the place of o

Keys and values are those of one pass over the tokens. R is the identity, or one learned matrix per head for all hops.
u is what the query is before RoPE: every hop turns it to the position of its token.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
from flax import nnx

from hydrax.core.build import ConfigError, Positive
from hydrax.core.numerics import einsum, fp32
from hydrax.core.typing import Array, Float, PyTree
from hydrax.mixers.base import Context, SoftmaxConfig, SoftmaxMixer
from hydrax.nn.param import param


@dataclasses.dataclass(frozen=True)
class Config(SoftmaxConfig):
    hops: Positive | None = None  # how often a query reads, each time with what it has read; None: once, without u
    hop_map: Literal["identity", "learned"] = "identity"  # R

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hop_map != "identity" and self.hops is None:
            raise ConfigError("hop_map", self.hop_map, "needs hops")

    def fill(self, d_model: int) -> "Config":
        filled = super().fill(d_model)
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


class Attention(SoftmaxMixer):
    """y = W_o (attention(q, k, v) ⊙ σ(W_g x)); the state holds the keys and values of the whole document."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        super().__init__(d_model, cfg, rngs=rngs)
        self.hop = HopMap(cfg, rngs=rngs) if cfg.hop_map == "learned" else None

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg = self.cfg
        q, keys, state = self.qkv.see(x, ctx, state, placed=cfg.hops is None)
        if cfg.hops is None:
            o = ctx.tap("reads", self.attend(q, keys, ctx, by=ctx.attend, tap_lse=ctx.taps.get("lse")))
        else:  # no linear map from values to what is read: nothing is tapped
            o = self._again(q, lambda u: self.attend(self.qkv.place(u, ctx.positions), keys, ctx, by=ctx.attend))
        return self.gate(o, x), state

    def _again(self, q: Float[Array, "B T H K"], read: Callable[[Array], Array]) -> Float[Array, "B T H K"]:
        """u^n, summed in fp32."""
        u = q
        for _ in range(self.cfg.hops):
            o = fp32(read(u.astype(q.dtype)))
            u = o + (fp32(u) if self.hop is None else self.hop(u.astype(q.dtype)))
        return u.astype(q.dtype)
