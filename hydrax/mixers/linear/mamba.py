"""Mamba (arXiv 2312.00752):  h_t = exp(Δ_t A) ⊙ h_{t-1} + (Δ_t x_t) b_tᵀ,   y_t = h_t c_t + D x_t,   A < 0 [V,K]."""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Positive, PositiveFloat
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig
from hydrax.nn.conv import ShortConv
from hydrax.nn.decay import MAX_LOG_RATE, inverse_softplus_steps
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.nn.param import param
from hydrax.parallel.sequence import selective_scan


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    value_dim: Positive | None = None  # V, inner channels; 2 d_model if None
    key_dim: Positive = 16  # K, states per channel, N of the paper
    dt_rank: Positive | None = None  # low-rank width of the step sizes; d_model / 16, rounded up, if None
    conv_width: Positive = 4  # taps of the convolution on x
    bcdt_norm: bool = False  # RMSNorm of W_b x, W_c x and W_down x (Jamba, arXiv 2403.19887)
    norm_eps: PositiveFloat = 1e-6  # of these norms
    chunk_size: Positive | None = None  # tokens whose states exist at a time in the training form

    def fill(self, d_model: int) -> "Config":
        return dataclasses.replace(
            self, value_dim=self.value_dim or 2 * d_model, dt_rank=self.dt_rank or -(-d_model // 16)
        )


class Mamba(Mixer):
    """x = silu(conv(W_x u) + bias); b, c = W_b x, W_c x; Δ = softplus(W_up W_down x + b_dt); W_o (y ⊙ silu(W_z u))."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        V, K, R = cfg.value_dim, cfg.key_dim, cfg.dt_rank
        self.x = Linear(d_model, V, axes=("embed", "inner"), rngs=rngs)
        self.x_conv = ShortConv((V,), cfg.conv_width, axes=("inner",), bias=True, rngs=rngs)
        self.b = Linear(V, K, axes=("inner", "state_k"), rngs=rngs)
        self.c = Linear(V, K, axes=("inner", "state_k"), rngs=rngs)
        self.step_down = Linear(V, R, axes=("inner", "rank"), rngs=rngs)
        self.step_up = Linear(R, V, axes=("rank", "inner"), scale=3**-0.5, rngs=rngs)  # the spread of U(±R^-½)
        self.b_norm, self.c_norm, self.step_norm = (
            RMSNorm(width, axes=(axis,), eps=cfg.norm_eps, rngs=rngs) if cfg.bcdt_norm else None
            for width, axis in ((K, "state_k"), (K, "state_k"), (R, "rank"))
        )
        self.dt_bias = param(rngs, inverse_softplus_steps, (V,), ("inner",))
        self.A_log = param(rngs, _log_counts, (V, K), ("inner", "state_k"))
        self.skip = param(rngs, jax.nn.initializers.ones, (V,), ("inner",))
        self.gate = Linear(d_model, V, axes=("embed", "inner"), rngs=rngs)
        self.project = Linear(V, d_model, axes=("inner", "embed"), residual=True, rngs=rngs)

    def mix(self, u: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = dict.fromkeys(("memory", "x")) if state is None else state
        facts: dict[str, Any] = {"segment_ids": ctx.segment_ids, "shards": ctx.shards, "impl": ctx.impl}
        x, tail = self.x_conv(self.x(u), past["x"], **facts)
        low = _normed(self.step_down(x), self.step_norm)
        o, memory = selective_scan(
            ctx.tap("values", x),
            jax.nn.softplus(fp32(self.step_up(low)) + self.dt_bias[...]),
            -jnp.exp(jnp.minimum(self.A_log[...], MAX_LOG_RATE)),
            _normed(self.b(x), self.b_norm),
            _normed(self.c(x), self.c_norm),
            initial_state=past["memory"],
            chunk_size=self.cfg.chunk_size,
            **facts,
        )
        y = (fp32(ctx.tap("reads", o)) + self.skip[...] * fp32(x)) * jax.nn.silu(fp32(self.gate(u)))
        return y.astype(u.dtype)[:, :, None], {"memory": memory, "x": tail}

    def out(self, z: Array) -> Array:
        return self.project(z[:, :, 0])

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return {
            "memory": jnp.zeros((batch, self.cfg.value_dim, self.cfg.key_dim), wide(dtype)),
            "x": self.x_conv.init_state(batch, dtype),
        }


def _normed(x: Array, norm: RMSNorm | None) -> Array:
    return x if norm is None else norm(x)


def _log_counts(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """log 1, log 2, ... log K for every channel."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)
