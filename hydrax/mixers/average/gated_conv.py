"""Gated convolution:  y_t = W_o (act(W_z x_t) ⊙ act(b + Σ_{i<W} w_i ⊙ u_{t-W+1+i})),   u = W_u x.

It sees W tokens and nothing else: what a recurrence adds is the difference to this mixer. After MambaOut (arXiv
2405.07992) and the gated convolutions of BASED (2402.18668). Other kernels:

lka: y = W_o (f(u) ⊙ u), f few taps side by side, then few taps apart, then a matrix: the Visual Attention Network
(2202.09741), here causal. It sees w - 1 + d (w' - 1) tokens back.

long: to the W taps a kernel is added that reaches back to the start of the document (`nn.long_conv`), as in the long
convolutions of Zoology (2312.04927). Then there is a recurrence, or whole rows are transformed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Positive
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig
from hydrax.nn import long_conv
from hydrax.nn.conv import ShortConv
from hydrax.nn.linear import Linear

Activation = Literal["none", "silu"]


@dataclasses.dataclass(frozen=True)
class LargeKernel:
    width: Positive = 5  # taps side by side
    spaced_width: Positive = 7  # taps apart, which see what those make
    dilation: Positive = 3  # tokens from one of these to the next


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    inner_dim: Positive | None = None  # width of u and of the gate; 2 d_model if None
    kernel: Literal["short", "long", "lka"] = "short"  # what u meets: taps, taps and a filter, or see `lka`
    conv_width: Positive = 7  # taps: the tokens an output depends on
    conv_activation: Activation = "none"  # of the convolution
    gate_activation: Activation = "silu"  # of the gate W_z x
    lka: LargeKernel = dataclasses.field(default_factory=LargeKernel)  # large kernel attention
    filter: long_conv.Name = "ema"  # of kernel long; implicit: whole rows, no documents, no decoding
    modes: Positive = 16  # exponentials per channel of filter ema
    horizon: Positive = 2048  # T₀ of filter implicit, in which its kernels change and decay
    chunk_size: Positive | None = None  # tokens per chunk of the training form of filter ema

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "based": {"conv_width": 3, "conv_activation": "silu", "gate_activation": "none"},
        "mambaout": {"conv_width": 7, "conv_activation": "none", "gate_activation": "silu"},
    }

    def fill(self, d_model: int) -> "Config":
        return dataclasses.replace(self, inner_dim=self.inner_dim or 2 * d_model)

    @property
    def tails(self) -> list[int]:
        """How many tokens before its own each convolution by taps sees."""
        if self.kernel != "lka":
            return [self.conv_width - 1]
        return [self.lka.width - 1, self.lka.dilation * (self.lka.spaced_width - 1)]

    def state_bytes(self, b: int) -> int:
        """Of one row, with b bytes per number of the compute dtype."""
        assert self.inner_dim is not None
        return self.inner_dim * (b * sum(self.tails) + (long_conv.HELD[self.filter](self) if self.long else 0))

    def flops(self, n: int) -> float:
        """Per token, without projections."""
        assert self.inner_dim is not None
        taps = self.lka.width + self.lka.spaced_width if self.kernel == "lka" else self.conv_width
        return self.inner_dim * (2 * taps + (long_conv.FLOPS[self.filter](self, n) if self.long else 0))

    @property
    def long(self) -> bool:
        return self.kernel == "long"

    @property
    def restarts(self) -> bool:
        return not self.long or self.filter != "implicit"


class GatedConv(Mixer):
    """One head as wide as u; the state is the last of what taps see, and that of a filter."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        E, large = cfg.inner_dim, cfg.kernel == "lka"
        act = None if cfg.conv_activation == "none" or cfg.long else cfg.conv_activation
        taps: dict[str, Any] = {"axes": ("inner",), "bias": True, "activation": act, "rngs": rngs}
        self.u = Linear(d_model, E, axes=("embed", "inner"), rngs=rngs)
        self.conv = LKA(E, cfg.lka, rngs=rngs) if large else ShortConv((E,), cfg.conv_width, **taps)
        self.filter = long_conv.FILTERS[cfg.filter](E, cfg, rngs) if cfg.long else None
        self.gate = None if large else Linear(d_model, E, axes=("embed", "inner"), rngs=rngs)
        self.project = Linear(E, d_model, axes=("inner", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = dict.fromkeys(("conv", "memory")) if state is None else state
        u = self.u(x)
        c, new = self.conv(u, past["conv"], **ctx.rows)
        state = {"conv": new}
        if self.filter is not None:
            far, state["memory"] = self.filter(u, ctx, past["memory"], self.cfg.chunk_size)
            c = (ACTIVATIONS[self.cfg.conv_activation](c + far)).astype(x.dtype)
        z = u if self.gate is None else ACTIVATIONS[self.cfg.gate_activation](self.gate(x))
        return (z * c)[:, :, None], state

    def out(self, z: Array) -> Array:
        return self.project(z.reshape(*z.shape[:2], -1))

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        state = {"conv": self.conv.init_state(batch, dtype)}
        return state if self.filter is None else state | {"memory": self.filter.init_state(batch, dtype)}


class LKA(nnx.Module):
    """f above; its state is what each of its two convolutions last saw."""

    def __init__(self, width: int, cfg: LargeKernel, *, rngs: nnx.Rngs):
        taps: dict[str, Any] = {"axes": ("inner",), "bias": True, "activation": None, "rngs": rngs}
        self.near = ShortConv((width,), cfg.width, **taps)
        self.far = ShortConv((width,), cfg.spaced_width, dilation=cfg.dilation, **taps)
        self.channels = Linear(width, width, axes=("inner", "inner_out"), bias=True, rngs=rngs)

    def __call__(self, u: Array, state: PyTree | None, **facts: Any) -> tuple[Array, PyTree]:
        past = dict.fromkeys(("near", "far")) if state is None else state
        f, near = self.near(u, past["near"], **facts)
        f, far = self.far(f, past["far"], **facts)
        return self.channels(f), {"near": near, "far": far}

    def init_state(self, batch: int, dtype: jnp.dtype) -> PyTree:
        return {"near": self.near.init_state(batch, dtype), "far": self.far.init_state(batch, dtype)}


ACTIVATIONS: dict[Activation, Any] = {"none": lambda y: y, "silu": jax.nn.silu}
