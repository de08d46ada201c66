"""Megalodon: softmax attention within chunks, between which complex moving averages carry features (arXiv 2404.08801).

    n = TimestepNorm(x),   m = RMSNorm(CEMA(n)),   z = RMSNorm(W_z m + b) per head, without a weight
    q = K^-½ (1 + g_q) z + c_q,   k = K^-½ (1 + g_k) z + c_k,   v = silu(W_v n + b),   r = silu(W_r m + b)
    y = W [r ⊙ softmax(q·k) v, m] + b,   over the keys of the query's own chunk

Gecko (arXiv 2601.06463) has a TimestepDecayNorm, keys of two chunks, and a memory of those before: z gives a, b as well

    y = W [r ⊙ softmax(q·k) v + Mᵀ softmax(a), m] + b,   where M has absorbed the keys b and values v of earlier chunks

They read the residual stream themselves: the block has no norm before it. At first q and k are unit vectors, so that
scores are cosines and have no further scale. Chunks count from the start of the document.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, Positive, PositiveFloat
from hydrax.core.numerics import fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn import kv_cache
from hydrax.nn.cema import CEMA
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.nn.param import param
from hydrax.nn.position import Rope
from hydrax.nn.timestep_norm import TimestepNorm, check_groups
from hydrax.ops.sparse.lifetimes import Chunks
from hydrax.parallel.sequence import working_memory


@dataclasses.dataclass(frozen=True)
class Turns(Rope):
    style: Literal["half", "interleaved", "torchscale"] = "interleaved"  # which channels pair up


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 1
    key_dim: Positive | None = None  # K per head; d_model / 4 over the heads if None
    inner_dim: Positive | None = None  # of all heads' values; 2 d_model if None
    chunk: Positive = 2048  # tokens per chunk of the attention
    modes: Positive = 16  # averages of each channel
    groups: Positive | None = None  # of features, that share their statistics over time; about d_model / 32 if None
    rope: Turns = dataclasses.field(default_factory=Turns)
    chunk_size: Positive | None = None  # tokens per chunk of the averages' training form
    width: Positive | None = None  # channels of the averages: d_model, which is filled in

    def fill(self, d_model: int) -> Any:
        if self.width not in (None, d_model):
            raise ConfigError("width", self.width, f"expected d_model = {d_model}, or nothing")
        head = per_head(d_model, self.heads)
        filled = dataclasses.replace(
            self,
            key_dim=self.key_dim or max(1, head // 4),
            inner_dim=self.inner_dim or 2 * d_model,
            groups=self.groups or self.heads * math.gcd(head, max(1, head // 32)),
            width=d_model,
        )
        check_groups(filled.groups, d_model, "groups")
        for name in ("groups", "inner_dim"):
            if getattr(filled, name) % self.heads:
                raise ConfigError(name, getattr(filled, name), f"expected a multiple of heads = {self.heads}")
        return filled

    @property
    def value_dim(self) -> int:
        """V per head."""
        assert self.inner_dim is not None
        return self.inner_dim // self.heads

    @property
    def alive(self) -> Chunks:
        """Until when keys are visible."""
        return Chunks(self.chunk)

    @property
    def fixed_bytes(self) -> int:
        """Of the state beside keys and values: statistics and averages, in fp32."""
        assert self.groups is not None and self.width is not None
        return 4 * 2 * (self.groups + self.width * self.modes)


@dataclasses.dataclass(frozen=True)
class GeckoTurns(Turns):
    theta: PositiveFloat = 500_000.0


@dataclasses.dataclass(frozen=True)
class GeckoConfig(Config):
    heads: Positive = 4
    rope: GeckoTurns = dataclasses.field(default_factory=GeckoTurns)
    rope_heads: Positive | None = None  # heads whose keys have positions, the first ones; all if None

    def fill(self, d_model: int) -> "GeckoConfig":
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


class Megalodon(Mixer):
    """The state holds the statistics of the norm, the averages, and keys and values of the chunk."""

    Config: TypeAlias = Config
    NORMS_INPUT = True
    NORM: ClassVar[str] = "timestep_norm"
    SKIP: ClassVar[bool] = True  # a learned weight of what the averages are of
    KINDS: ClassVar[tuple[str, ...]] = ("query", "key")  # what is made of z

    def __init__(self, d_model: int, cfg: Any, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, V, each = cfg.heads, cfg.key_dim, cfg.value_dim, len(self.KINDS)
        keys, values = ("heads", "state_k"), ("heads", "state_v")
        self.norm = TimestepNorm(d_model, cfg.groups, self.NORM, rngs=rngs)
        self.ema = CEMA(d_model, cfg.modes, skip=self.SKIP, rngs=rngs)
        self.ema_norm = RMSNorm(d_model, axes=("norm",), eps=1e-5, offset=1.0, rngs=rngs)
        self.z = Linear(d_model, (H, K), axes=("embed", *keys), bias=True, rngs=rngs)
        self.z_norm = RMSNorm(K, axes=("state_k",), eps=1e-5, affine=False, rngs=rngs)
        self.gain = param(rngs, jax.nn.initializers.zeros, (each, H, K), ("kinds", *keys))
        self.shift = param(rngs, jax.nn.initializers.zeros, (each, H, K), ("kinds", *keys))
        self.v = Linear(d_model, (H, V), axes=("embed", *values), bias=True, rngs=rngs)
        self.gate = Linear(d_model, (H, V), axes=("embed", *values), bias=True, rngs=rngs)
        shape = (H, V + d_model // H)
        self.project = Linear(shape, d_model, axes=(*values, "embed"), bias=True, residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        memory: dict[str, Any] = {} if state is None else state["memory"]
        n, norm = self.norm(x, ctx, memory.get("norm"))
        y, averages = self.ema(n, ctx, memory.get("averages"), self.cfg.chunk_size)
        m = self.ema_norm(y)
        v = ctx.tap("values", jax.nn.silu(self.v(n)))
        o, more, cache = self._read(m, v, ctx, state)
        heads = m.reshape(*m.shape[:2], self.cfg.heads, -1)
        z = jnp.concatenate([o, heads], axis=-1)
        if state is None:
            return z, None
        return z, {"memory": {"norm": norm, "averages": averages, **more}, "cache": cache}

    def _read(self, m: Array, v: Array, ctx: Context, state: PyTree | None) -> tuple[Array, dict[str, Any], PyTree]:
        """What is read of the values, what else is kept in fp32, and the cache."""
        q, k = self._kinds(m)
        places = ctx.positions % self.cfg.chunk
        q, k = (self.cfg.rope.turn(a, places) for a in (q, k))
        o, cache = self._attend(q, k, v, ctx, None if state is None else state["cache"])
        return ctx.tap("reads", o) * jax.nn.silu(self.gate(m)), {}, cache

    def _kinds(self, m: Array) -> list[Array]:
        """Queries, keys and the like: affine maps of z that are diagonal."""
        z = fp32(self.z_norm(self.z(m))) * self.cfg.key_dim**-0.5
        gain, shift = 1 + self.gain[...], self.shift[...]
        return [(z * gain[i] + shift[i]).astype(m.dtype) for i in range(len(self.KINDS))]

    def _attend(
        self, q: Array, k: Array, v: Array, ctx: Context, cache: kv_cache.Cache | None, **facts: Any
    ) -> tuple[Array, kv_cache.Cache | None]:
        """Attention to the keys that are alive, and the cache, in which `facts` of tokens are kept as well."""
        where = ctx.places
        alive, window = self.cfg.alive, self.cfg.alive.reach
        keys = kv_cache.collect(k, v, cache, **where)
        positions = ctx.positions if keys.positions is None else keys.positions
        o = kv_cache.attend(
            q,
            keys,
            **where,
            scale=1.0,
            window=window,
            ends=alive.ends(positions, ctx.layer_index),
            shards=ctx.shards,
            impl=ctx.impl,
            tap_lse=ctx.taps.get("lse"),
        )
        return o, kv_cache.write(cache, k, v, **where, window=window, **facts)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        slots = min(max_len, cfg.alive.reach)
        return {
            "memory": {"norm": self.norm.init_state(batch, dtype), "averages": self.ema.init_state(batch, dtype)},
            "cache": kv_cache.empty(batch, slots, cfg.heads, cfg.key_dim, cfg.value_dim, dtype),
        }


class Gecko(Megalodon):
    """The state of Megalodon for two chunks, with keys for the memory, and the memory."""

    Config: TypeAlias = GeckoConfig
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
            **ctx.rows,
        )
        o = ctx.tap("reads", o) * jax.nn.silu(self.gate(m)) + recalled
        return o, {"values": M, "weights": L}, cache

    def _turned(self, x: Array, positions: Array) -> Array:
        n = self.cfg.rope_heads
        return jnp.concatenate([self.cfg.rope.turn(x[:, :, :n], positions), x[:, :, n:]], axis=2)

    def _past(self, cache: kv_cache.Cache, position: Array) -> tuple[Array, Array]:
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
