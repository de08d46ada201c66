"""Token gate: a small MLP-Mixer gates what the layer reads (NiNformer, arXiv 2403.02411), here causal.

    r_t = 1 + x_t + (Q₂ gelu(Q₁ norm(x)))_t,   g_t = r_t + W_b gelu(W_a norm(r_t)),   y_t = W_o (g_t ⊙ (W x_t + b))

x is the input of the layer, normed as in every block. Q₁ and Q₂ look along the row. In the paper, on images, they are
matrices over all positions; here they are causal and restart with every document: depthwise convolutions, or complex
moving averages. The 1 lets a new layer pass on about what it reads; W_o is hydrax's too.
"""

import dataclasses
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, Positive
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig
from hydrax.nn.cema import CEMA
from hydrax.nn.conv import ShortConv
from hydrax.nn.linear import Linear
from hydrax.nn.norm import LayerNorm


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    operator: Literal["conv", "ema"] = "conv"  # what Q₁ and Q₂ are
    taps: Positive = 4  # of each conv; together they see 2 taps - 2 tokens back
    modes: Positive = 16  # exponentials per channel of each ema
    inner_dim: Positive | None = None  # width of the network over channels; 4 d_model if None
    chunk_size: Positive | None = None  # tokens per chunk of the training form of ema
    width: Positive | None = None  # channels: d_model, which is filled in

    def fill(self, d_model: int) -> "Config":
        if self.width not in (None, d_model):
            raise ConfigError("width", self.width, f"expected d_model = {d_model}, or nothing")
        return dataclasses.replace(self, inner_dim=self.inner_dim or 4 * d_model, width=d_model)

    @property
    def tails(self) -> list[int]:
        """How many tokens before its own each convolution sees."""
        return [self.taps - 1 if self.operator == "conv" else 0]

    def state_bytes(self, b: int) -> int:
        """Of one row, with b bytes per number of the compute dtype."""
        assert self.width is not None
        return 2 * self.width * {"conv": b * (self.taps - 1), "ema": 8 * self.modes}[self.operator]

    @property
    def flops(self) -> int:
        """Per token, without matrices."""
        assert self.width is not None
        return 2 * self.width * {"conv": 2 * self.taps, "ema": 14 * self.modes}[self.operator]


class Convolution(nnx.Module):
    """Q as taps by channel."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.conv = ShortConv((cfg.width,), cfg.taps, axes=("inner",), bias=True, activation=None, rngs=rngs)

    def __call__(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        return self.conv(x, state, **ctx.rows)

    def init_state(self, batch: int, dtype: jnp.dtype) -> PyTree:
        return self.conv.init_state(batch, dtype)


class Averages(nnx.Module):
    """Q as moving averages of every channel."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.chunk_size = cfg.chunk_size
        self.averages = CEMA(cfg.width, cfg.modes, skip=True, rngs=rngs)

    def __call__(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        return self.averages(x, ctx, state, self.chunk_size)

    def init_state(self, batch: int, dtype: jnp.dtype) -> PyTree:
        return self.averages.init_state(batch, dtype)


OPERATORS: dict[str, Any] = {"conv": Convolution, "ema": Averages}


class TokenGate(Mixer):
    """One head as wide as the layer; the state is what Q₁ and Q₂ hold."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        inner = ("embed", "inner")
        self.token_norm = LayerNorm(d_model, axes=("embed",), rngs=rngs)
        self.first = OPERATORS[cfg.operator](cfg, rngs=rngs)
        self.second = OPERATORS[cfg.operator](cfg, rngs=rngs)
        self.channel_norm = LayerNorm(d_model, axes=("embed",), rngs=rngs)
        self.up = Linear(d_model, cfg.inner_dim, axes=inner, bias=True, rngs=rngs)
        self.down = Linear(cfg.inner_dim, d_model, axes=inner[::-1], bias=True, rngs=rngs)
        self.value = Linear(d_model, d_model, axes=inner, bias=True, rngs=rngs)
        self.project = Linear(d_model, d_model, axes=inner[::-1], residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = dict.fromkeys(("first", "second")) if state is None else state
        a, first = self.first(self.token_norm(x), ctx, past["first"])
        q, second = self.second(jax.nn.gelu(a), ctx, past["second"])
        r = 1 + fp32(x) + fp32(q)
        g = r + fp32(self.down(jax.nn.gelu(self.up(self.channel_norm(r).astype(x.dtype)))))
        return (g * self.value(x)).astype(x.dtype)[:, :, None], {"first": first, "second": second}

    def out(self, z: Array) -> Array:
        return self.project(z.reshape(*z.shape[:2], -1))

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return {name: getattr(self, name).init_state(batch, dtype) for name in ("first", "second")}
