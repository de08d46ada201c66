"""What mixers of running softmax averages share: M slots per head, each the average of the values so far under weights
of its own, and a mixture of the slots for every token.

    o_t = Σ_m p_tm Σ_{j<=t} e^{s_jm} v_j / Σ_{j<=t} e^{s_jm}

Weights of values sum to 1 for every token if the p do. What is read does not depend on the order of the past: only a
convolution or another mixer before it can tell one order from another.
"""

import dataclasses
from typing import Any, Self

import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import Positive
from hydrax.core.numerics import wide
from hydrax.core.typing import Array, Float, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn.conv import ShortConv
from hydrax.nn.linear import Linear
from hydrax.parallel.sequence import slot_softmax


@dataclasses.dataclass(frozen=True)
class SlotConfig(MixerConfig):
    heads: Positive = 4
    key_dim: Positive | None = None  # K per head; d_model / heads if None
    value_dim: Positive | None = None  # V per head; d_model / heads if None
    chunk_size: Positive | None = None  # tokens per chunk of the training form

    def fill(self, d_model: int) -> Self:
        return dataclasses.replace(
            self,
            key_dim=self.key_dim or per_head(d_model, self.heads),
            value_dim=self.value_dim or per_head(d_model, self.heads),
        )


class SlotAverages(Mixer):
    """y = W_o o; the state holds, per slot, the largest score, rounded to an integer, and both sums over it.

    Subclasses say what p and s are, with M = `slots`. With `width`, o_t also gets a causal convolution of the values.
    """

    def __init__(self, d_model: int, cfg: Any, slots: int, *, rngs: nnx.Rngs, width: int = 0):
        self.cfg, self.slots = cfg, slots
        H, V = cfg.heads, cfg.value_dim
        axes = ("heads", "state_v")
        self.v = Linear(d_model, (H, V), axes=("embed", *axes), rngs=rngs)
        self.v_conv = ShortConv((H, V), width, axes=axes, activation=None, rngs=rngs) if width else None
        self.project = Linear((H, V), d_model, axes=(*axes, "embed"), residual=True, rngs=rngs)

    def weights(self, x: Array, ctx: Context) -> tuple[Float[Array, "B T H M"], Float[Array, "B T H M"]]:
        """p and s, in fp32."""
        raise NotImplementedError

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        past = None if state is None else state["memory"]
        facts: dict[str, Any] = {"segment_ids": ctx.segment_ids, "shards": ctx.shards, "impl": ctx.impl}
        p, s = self.weights(x, ctx)
        v = ctx.tap("values", self.v(x))
        o, (top, numerator, denominator) = slot_softmax(
            p,
            s,
            v,
            initial_state=None if past is None else (state["max"], past["numerator"], past["denominator"]),
            chunk_size=self.cfg.chunk_size,
            **facts,
        )
        o, new = ctx.tap("reads", o), {"max": top, "memory": {"numerator": numerator, "denominator": denominator}}
        if self.v_conv is None:
            return o, new
        near, tail = self.v_conv(v, None if state is None else state["v"], **facts)
        return o + near, {**new, "v": tail}

    def out(self, z: Array) -> Array:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        slots = (batch, self.cfg.heads, self.slots)
        sums = {"numerator": (*slots, self.cfg.value_dim), "denominator": slots}
        memory = {name: jnp.zeros(shape, wide(dtype)) for name, shape in sums.items()}
        state = {"max": jnp.zeros(slots, jnp.int32), "memory": memory}
        return state if self.v_conv is None else {**state, "v": self.v_conv.init_state(batch, dtype)}
