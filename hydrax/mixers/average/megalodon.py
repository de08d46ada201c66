"""Megalodon: softmax attention within chunks, between which complex moving averages carry features (arXiv 2404.08801).

    n = TimestepNorm(x),   m = RMSNorm(CEMA(n)),   z = RMSNorm(W_z m + b) per head, without a weight
    q = K^-½ (1 + g_q) z + c_q,   k = K^-½ (1 + g_k) z + c_k,   v = silu(W_v n + b),   r = silu(W_r m + b)
    y = W [r ⊙ softmax(q·k) v, m] + b,   over the keys of the query's own chunk

It reads the residual stream itself: the block has no norm before it. At first q and k are unit vectors, so that scores
are cosines and have no further scale. Chunks count from the start of the document.
"""

import dataclasses
from typing import Any, ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, Positive
from hydrax.core.numerics import fp32
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


@dataclasses.dataclass(frozen=True)
class Turns(Rope):
    style: Literal["half", "interleaved", "torchscale"] = "interleaved"  # which channels pair up


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 1
    key_dim: Positive | None = None  # K per head; d_model / 4 over the heads if None
    value_dim: Positive | None = None  # V per head; 2 d_model over the heads if None
    chunk: Positive = 2048  # tokens per chunk of the attention
    modes: Positive = 16  # averages of each channel
    groups: Positive = 32  # of features, that share their statistics over time
    rope: Turns = dataclasses.field(default_factory=Turns)
    chunk_size: Positive | None = None  # tokens per chunk of the averages' training form
    width: Positive | None = None  # channels of the averages: d_model, which is filled in

    def fill(self, d_model: int) -> Any:
        if self.width not in (None, d_model):
            raise ConfigError("width", self.width, f"expected d_model = {d_model}, or nothing")
        check_groups(self.groups, d_model, "groups")
        head = per_head(d_model, self.heads)
        if self.groups % self.heads:
            raise ConfigError("groups", self.groups, f"expected a multiple of heads = {self.heads}")
        key_dim, value_dim = self.key_dim or max(1, head // 4), self.value_dim or 2 * head
        return dataclasses.replace(self, key_dim=key_dim, value_dim=value_dim, width=d_model)

    @property
    def alive(self) -> Chunks:
        """Until when keys are visible."""
        return Chunks(self.chunk)

    @property
    def fixed_bytes(self) -> int:
        """Of the state beside keys and values: statistics and averages, in fp32."""
        assert self.width is not None
        return 4 * 2 * (self.groups + self.width * self.modes)


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
        where: dict[str, Any] = {"positions": ctx.positions, "segment_ids": ctx.segment_ids}
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

    def out(self, z: Array) -> Array:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        cfg = self.cfg
        slots = min(max_len, cfg.alive.reach)
        return {
            "memory": {"norm": self.norm.init_state(batch, dtype), "averages": self.ema.init_state(batch, dtype)},
            "cache": kv_cache.empty(batch, slots, cfg.heads, cfg.key_dim, cfg.value_dim, dtype),
        }
