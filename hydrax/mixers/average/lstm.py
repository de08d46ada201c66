"""The LSTM, a layer that is serial by nature: what it does next depends on what it holds, nonlinearly.

No parallel form can follow that (arXiv 2510.06828): training takes as many steps as a row has tokens, one after the
other. It is what such models are compared with on state tracking.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Positive
from hydrax.core.numerics import einsum, wide
from hydrax.core.typing import Array, Float, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn.linear import Linear
from hydrax.nn.param import param
from hydrax.parallel.sequence import lstm

GATES = ("heads", "gates", "state_v")


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 1  # blocks of the recurrent matrix
    value_dim: Positive | None = None  # V per head; d_model / heads if None
    chunk_size: Positive | None = None  # tokens per segment, between which training keeps the state

    def fill(self, d_model: int) -> Any:
        return dataclasses.replace(self, value_dim=self.value_dim or per_head(d_model, self.heads))


class Cell(nnx.Module):
    """h of `ops.lstm` for x [B,T,D]; all weights and biases are uniform in ±V^-½ at first."""

    def __init__(self, d_model: int, cfg: Any, *, rngs: nnx.Rngs):
        H, V = cfg.heads, cfg.value_dim
        self.cfg = cfg
        bound = V**-0.5

        def uniform(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        self.input = param(
            rngs, uniform, (d_model, H, 4, V), ("embed", *GATES), decay=True, matrix=((-4,), (-3, -2, -1)), cast=True
        )
        axes = ("heads", "state_k", "gates", "state_v")
        self.recurrent = param(rngs, uniform, (H, V, 4, V), axes, decay=True, matrix=((-3,), (-2, -1)), cast=True)
        self.bias = param(rngs, uniform, (H, 4, V), GATES)

    def __call__(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Float[Array, "B T H V"], PyTree]:
        into = einsum("btd,dhgv->bthgv", x, self.input[...].astype(x.dtype)).astype(x.dtype)
        h, (short, long) = lstm(
            into + self.bias[...].astype(x.dtype),
            self.recurrent[...],
            initial_state=None if state is None else (state["h"], state["c"]),
            segment_ids=ctx.segment_ids,
            shards=ctx.shards,
            impl=ctx.impl,
            chunk_size=self.cfg.chunk_size,
        )
        return h, {"h": short, "c": long}

    def init_state(self, batch: int, dtype: jnp.dtype) -> PyTree:
        shape = (batch, self.cfg.heads, self.cfg.value_dim)
        return {name: jnp.zeros(shape, wide(dtype)) for name in "hc"}


class LSTM(Mixer):
    """y = W_o h."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.cell = Cell(d_model, cfg, rngs=rngs)
        shape = (cfg.heads, cfg.value_dim)
        self.project = Linear(shape, d_model, axes=("heads", "state_v", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        h, memory = self.cell(x, ctx, None if state is None else state["memory"])
        return h, {"memory": memory}

    def out(self, z: Array) -> Array:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return {"memory": self.cell.init_state(batch, dtype)}
