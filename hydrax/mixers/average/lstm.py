"""The LSTM, a layer that is serial by nature: what it does next depends on what it holds, nonlinearly.

No parallel form can follow that (arXiv 2510.06828): training takes as many steps as a row has tokens, one after the
other. It is what such models are compared with on state tracking.

SHA-RNN (arXiv 1911.11423) has one softmax attention on top, in which an LSTM's outputs h are keys and values alike:

    m = LN(h),   n = LN(h),   q = σ(a) ⊙ LN(W_q n + b),   o_t = Σ_{s<=t} softmax_s(V^-½ q_t·(σ(c) ⊙ m_s)) u ⊙ m_s
    y = W (n + o),   u = σ(f) ⊙ tanh(g) with [g, f] = W_u σ(e) + b,   over all channels of all heads: constants

It has no positions. What the published model calls the memory of its past segments are the last keys of the document.
Unlike it, the layer has the output projection of all mixers, and the block adds y to its input.
"""

import dataclasses
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Positive, PositiveFloat
from hydrax.core.numerics import einsum, fp32, wide
from hydrax.core.typing import Array, Float, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn import kv_cache
from hydrax.nn.linear import Linear
from hydrax.nn.norm import LayerNorm
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


@dataclasses.dataclass(frozen=True)
class ShaConfig(Config):
    window: Positive | None = 5000  # tokens that attention sees, the query's own the last; None: the whole document
    norm_eps: PositiveFloat = 1e-5  # of the norms

    def slots(self, tokens: int) -> int:
        """Keys that a document of that many tokens keeps."""
        return tokens if self.window is None else min(tokens, self.window)


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
            chunk_size=self.cfg.chunk_size,
            **ctx.rows,
        )
        return h, {"h": short, "c": long}

    def init_state(self, batch: int, dtype: jnp.dtype) -> PyTree:
        shape = (batch, self.cfg.heads, self.cfg.value_dim)
        return {name: jnp.zeros(shape, wide(dtype)) for name in "hc"}


class LSTM(Mixer):
    """y = W_o h."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Any, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.cell = Cell(d_model, cfg, rngs=rngs)
        shape = (cfg.heads, cfg.value_dim)
        self.project = Linear(shape, d_model, axes=("heads", "state_v", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        h, memory = self.cell(x, ctx, None if state is None else state["memory"])
        return h, {"memory": memory}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        return {"memory": self.cell.init_state(batch, dtype)}


class ShaRNN(LSTM):
    """The state holds that of the LSTM, and its normed outputs."""

    Config: TypeAlias = ShaConfig

    def __init__(self, d_model: int, cfg: Any, *, rngs: nnx.Rngs):
        super().__init__(d_model, cfg, rngs=rngs)
        shape, axes = (cfg.heads, cfg.value_dim), ("heads", "state_v")
        norm = functools.partial(LayerNorm, shape, axes=axes, eps=cfg.norm_eps, rngs=rngs)
        self.key_norm, self.query_norm, self.q_norm = norm(), norm(), norm()
        self.q = Linear(shape, shape, axes=("inner", "state_k", *axes), bias=True, rngs=rngs)
        self.gains = param(rngs, jax.nn.initializers.zeros, (3, *shape), ("kinds", *axes))  # a, c, e
        both = ("inner", "state_k", "gates", *axes)
        self.value_gain = Linear(shape, (2, *shape), axes=both, bias=True, scale=0.1, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        h, new = super().mix(x, ctx, state)
        m, n = self.key_norm(h), self.query_norm(h)
        past = None if state is None else state["cache"]
        facts = ctx.places
        keys = kv_cache.collect(m, None, past, **facts)
        of_queries, of_keys, e = jax.nn.sigmoid(self.gains[...])
        q = (fp32(self.q_norm(self.q(n))) * of_queries * of_keys).astype(h.dtype)  # c scales them as it would the keys
        window, keys = self.cfg.window, keys._replace(v=ctx.tap("values", keys.v))
        o = kv_cache.attend(q, keys, **facts, window=window, shards=ctx.shards, impl=ctx.impl)
        g, f = self.value_gain(e)
        z = fp32(n) + fp32(ctx.tap("reads", o)) * (jax.nn.sigmoid(f) * jnp.tanh(g))
        return z.astype(h.dtype), {**new, "cache": kv_cache.write(past, m, None, **facts, window=window)}

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        cache = kv_cache.empty(batch, cfg.slots(max_len), cfg.heads, cfg.value_dim, None, dtype)
        return {**super().init_state(batch, max_len, dtype), "cache": cache}
