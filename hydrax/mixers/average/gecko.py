"""Gecko: Megalodon with a norm that forgets, attention to two chunks, and a memory of those before (2601.06463).

    n = TimestepDecayNorm(x),   m = RMSNorm(CEMA(n)),   q, k, a, b affine in z as in `megalodon`
    y = W [r ⊙ softmax(q·k) v + Mᵀ softmax(a), m] + b,   over the keys of the query's own chunk and the one before it

M has absorbed the keys b and values v of all earlier chunks of the document, see `ops.slots.working_memory`.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from hydrax.core.build import ConfigError, Positive, PositiveFloat
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.average import megalodon
from hydrax.mixers.base import Context
from hydrax.nn.kv_cache import Cache
from hydrax.ops.sparse.lifetimes import Chunks
from hydrax.parallel.sequence import working_memory


@dataclasses.dataclass(frozen=True)
class Turns(megalodon.Turns):
    theta: PositiveFloat = 500_000.0


@dataclasses.dataclass(frozen=True)
class Config(megalodon.Config):
    heads: Positive = 4
    groups: Positive = 64  # of features, that share their statistics over time
    rope: Turns = dataclasses.field(default_factory=Turns)
    rope_heads: Positive | None = None  # heads whose keys have positions, the first ones; all if None

    def fill(self, d_model: int) -> "Config":
        filled = super().fill(d_model)
        if self.rope_heads is not None and self.rope_heads > self.heads:
            raise ConfigError("rope_heads", self.rope_heads, f"expected at most heads = {self.heads}")
        return dataclasses.replace(filled, rope_heads=self.rope_heads or self.heads)

    @property
    def alive(self) -> Chunks:
        """Until when keys are visible."""
        return Chunks(self.chunk, seen=2)

    @property
    def fixed_bytes(self) -> int:
        """Of the state beside keys and values: statistics, averages and memory, in fp32."""
        return super().fixed_bytes + 4 * self.heads * self.key_dim * (self.value_dim + 1)


class Gecko(megalodon.Megalodon):
    """The state of Megalodon for two chunks, with keys for the memory, and the memory."""

    Config: TypeAlias = Config
    NORM = "timestep_decay_norm"
    SKIP = False
    KINDS = ("query", "key", "memory query", "memory key")

    def _read(self, m: Array, v: Array, ctx: Context, state: PyTree | None) -> tuple[Array, dict[str, Any], PyTree]:
        q, k, a, b = self._kinds(m)
        q, k = self._turned(q, ctx.positions), self._turned(k, ctx.positions)
        before = None if state is None else state["cache"]
        o, cache = self._attend(q, k, v, ctx, before, b=b)
        memory = None if state is None else state["memory"]
        recalled, (M, L) = working_memory(
            jax.nn.softmax(fp32(a), axis=-1),
            b,
            v,
            ctx.positions,
            chunk=self.cfg.chunk,
            past=None if before is None else self._past(before, ctx.positions[:, 0]),
            initial_state=None if memory is None else (memory["values"], memory["weights"]),
            segment_ids=ctx.segment_ids,
            shards=ctx.shards,
            impl=ctx.impl,
        )
        o = ctx.tap("reads", o) * jax.nn.silu(self.gate(m)) + recalled
        return o, {"values": M, "weights": L}, cache

    def _turned(self, x: Array, positions: Array) -> Array:
        n = self.cfg.rope_heads
        return jnp.concatenate([self.cfg.rope.turn(x[:, :, :n], positions), x[:, :, n:]], axis=2)

    def _past(self, cache: Cache, position: Array) -> tuple[Array, Array]:
        """Memory keys and values of the tokens before that position, in their order."""
        reach = self.cfg.alive.reach
        slots = (position[:, None] + jnp.arange(reach)) % reach  # a short cache lacks slots that no one reads
        slots = jnp.minimum(slots, cache["b"].shape[1] - 1)[..., None, None]
        b, v = (jnp.take_along_axis(cache[name], slots, axis=1) for name in "bv")
        return b, v

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg, state = self.cfg, super().init_state(batch, max_len, dtype)
        H, K, V = cfg.heads, cfg.key_dim, cfg.value_dim
        shapes = {"values": (batch, H, K, V), "weights": (batch, H, K)}
        memory = {name: jnp.zeros(shape, wide(dtype)) for name, shape in shapes.items()}
        cache = {**state["cache"], "b": jnp.zeros_like(state["cache"]["k"])}
        return {"memory": {**state["memory"], **memory}, "cache": cache}
