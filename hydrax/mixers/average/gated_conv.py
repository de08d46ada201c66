"""Gated short convolution:  y_t = W_o (act(W_z x_t) ⊙ act(b + Σ_{i<W} w_i ⊙ u_{t-W+1+i})),   u = W_u x.

It sees W tokens and nothing else: what a recurrence adds is the difference to this mixer. After MambaOut (arXiv
2405.07992) and the gated convolutions of BASED (2402.18668).
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
from hydrax.nn.conv import ShortConv
from hydrax.nn.linear import Linear

Activation = Literal["none", "silu"]


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    inner_dim: Positive | None = None  # width of u and of the gate; 2 d_model if None
    conv_width: Positive = 7  # taps: the tokens an output depends on
    conv_activation: Activation = "none"  # of the convolution
    gate_activation: Activation = "silu"  # of the gate W_z x

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "based": {"conv_width": 3, "conv_activation": "silu", "gate_activation": "none"},
        "mambaout": {"conv_width": 7, "conv_activation": "none", "gate_activation": "silu"},
    }

    def fill(self, d_model: int) -> "Config":
        return dataclasses.replace(self, inner_dim=self.inner_dim or 2 * d_model)


class GatedConv(Mixer):
    """One head as wide as u; the state is the last W - 1 of u."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        E = cfg.inner_dim
        act = None if cfg.conv_activation == "none" else cfg.conv_activation
        self.u = Linear(d_model, E, axes=("embed", "inner"), rngs=rngs)
        self.conv = ShortConv((E,), cfg.conv_width, axes=("inner",), bias=True, activation=act, rngs=rngs)
        self.gate = Linear(d_model, E, axes=("embed", "inner"), rngs=rngs)
        self.project = Linear(E, d_model, axes=("inner", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = None if state is None else state["conv"]
        c, tail = self.conv(self.u(x), past, segment_ids=ctx.segment_ids, shards=ctx.shards, impl=ctx.impl)
        z = self.gate(x)
        z = jax.nn.silu(z) if self.cfg.gate_activation == "silu" else z
        return (z * c)[:, :, None], {"conv": tail}

    def out(self, z: Array) -> Array:
        return self.project(z.reshape(*z.shape[:2], -1))

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return {"conv": self.conv.init_state(batch, dtype)}
