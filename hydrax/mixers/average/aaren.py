"""Attention whose queries are parameters, as a recurrence (Aaren, arXiv 2405.13956):

o_t = Σ_m p_tm Σ_{j<=t} e^{s_jm} v_j / Σ_{j<=t} e^{s_jm},      s_jm = K^-½ a_m·k_j,      p_t = softmax(W_r x_t)

The paper has one query a per head, so that p = 1. What is read does not depend on the order of the past: only a
convolution or another mixer before it can tell one order from another.
"""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Positive
from hydrax.core.numerics import einsum, fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn.linear import Linear
from hydrax.nn.param import param
from hydrax.parallel.sequence import slot_softmax


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 4
    slots: Positive = 1  # M learned queries per head, mixed by each token if more than one
    key_dim: Positive | None = None  # K per head; d_model / heads if None
    value_dim: Positive | None = None  # V per head; d_model / heads if None
    chunk_size: Positive | None = None  # tokens per chunk of the training form

    def fill(self, d_model: int) -> "Config":
        return dataclasses.replace(
            self,
            key_dim=self.key_dim or per_head(d_model, self.heads),
            value_dim=self.value_dim or per_head(d_model, self.heads),
        )


class Aaren(Mixer):
    """y = W_o o; the state holds, per slot, the largest score, rounded to an integer, and both sums over it."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V, M = cfg.heads, cfg.key_dim, cfg.value_dim, cfg.slots
        self.query = param(rngs, jax.nn.initializers.normal(K**-0.5), (H, M, K), ("heads", "slots", "state_k"))
        self.k = Linear(d_model, (H, K), axes=("embed", "heads", "state_k"), rngs=rngs)
        self.v = Linear(d_model, (H, V), axes=("embed", "heads", "state_v"), rngs=rngs)
        self.read = Linear(d_model, (H, M), axes=("embed", "heads", "slots"), rngs=rngs) if M > 1 else None
        self.project = Linear((H, V), d_model, axes=("heads", "state_v", "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = None if state is None else state["memory"]
        k = fp32(ctx.tap("keys", self.k(x)))
        scores = einsum("hmk,bthk->bthm", fp32(self.query[...]), k) * self.cfg.key_dim**-0.5
        o, (top, numerator, denominator) = slot_softmax(
            jnp.ones_like(scores) if self.read is None else jax.nn.softmax(fp32(self.read(x)), axis=-1),
            scores,
            ctx.tap("values", self.v(x)),
            initial_state=None if past is None else (state["max"], past["numerator"], past["denominator"]),
            segment_ids=ctx.segment_ids,
            shards=ctx.shards,
            impl=ctx.impl,
            chunk_size=self.cfg.chunk_size,
        )
        return ctx.tap("reads", o), {"max": top, "memory": {"numerator": numerator, "denominator": denominator}}

    def out(self, z: Array) -> Array:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        slots = (batch, self.cfg.heads, self.cfg.slots)
        sums = {"numerator": (*slots, self.cfg.value_dim), "denominator": slots}
        memory = {name: jnp.zeros(shape, wide(dtype)) for name, shape in sums.items()}
        return {"max": jnp.zeros(slots, jnp.int32), "memory": memory}
