"""Two ways to read one memory: every token by the recurrence of a mixer, or by softmax attention (arXiv 2605.28769).

    keys k̃ and values ṽ of the recurrence;    attention: o_t = Σ_{s<=t} softmax_s(K^-½ q^a_t·RoPE(norm k̃_s)) ṽ_s
Both states advance at every token whatever its mode; only what is read differs. Gate, norm and output projection are
those of the recurrence, so that attention costs one projection to queries.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import PositiveFloat
from hydrax.core.typing import Array, PyTree
from hydrax.mixers import Context, Mixer
from hydrax.models.mix import Mix, Single
from hydrax.nn import kv_cache
from hydrax.nn.linear import Linear
from hydrax.nn.norm import RMSNorm
from hydrax.nn.position import Rope

READABLE = ("deltanet", "gdn", "gla", "kda", "lightning", "linear_attn", "mamba2", "retention")
"""Mixers that tap their keys, values and reads, per head."""


@dataclasses.dataclass(frozen=True)
class ModesOptions:
    """Options of `modes(...)`."""

    default: Literal["attn", "linear"] = "attn"  # of tokens whose mode nobody says
    qk_norm: Literal["none", "head"] = "head"  # RMSNorm of attention's queries and keys over K, before RoPE
    rope: Rope = dataclasses.field(default_factory=Rope)  # of these
    softcap: PositiveFloat | None = None  # scores become c·tanh(z/c)


@dataclasses.dataclass(frozen=True)
class Modes(Mix):
    """The description; `members` is the one mixer whose recurrence it is."""

    members: tuple[Single]
    options: ModesOptions

    @property
    def label(self) -> str:
        return f"modes({self.members[0].label})"

    def build(self, d_model: int, *, rngs: nnx.Rngs) -> Mixer:
        return ModesMixer(d_model, self, rngs=rngs)

    def heads(self) -> tuple[int, int, int]:
        """Heads, K and V of attention: those of the values."""
        options: Any = self.members[0].options
        return getattr(options, "value_heads", None) or options.heads, options.key_dim, options.value_dim

    def nbytes(self, max_len: int, itemsize: int) -> tuple[int, int]:
        fixed, _ = self.members[0].nbytes(max_len, itemsize)
        H, K, V = self.heads()
        return fixed, max_len * (H * (K + V) * itemsize + 8)

    def flops(self, seq_len: int) -> float:
        """Of both: what a training step computes."""
        H, K, V = self.heads()
        return self.members[0].flops(seq_len) + 2 * H * (K + V) * (seq_len + 1) / 2


class ModesMixer(Mixer):
    """The module of `Modes`. The recurrence runs as it is; taps take its keys and values and replace what it reads."""

    def __init__(self, d_model: int, cfg: Modes, *, rngs: nnx.Rngs):
        self.cfg = cfg
        H, K, _ = cfg.heads()
        normed = cfg.options.qk_norm == "head"
        self.linear = cfg.members[0].build(d_model, rngs=rngs)
        self.project, self.linear.project = self.linear.project, None
        self.q = Linear(d_model, (H, K), axes=("embed", "heads", "head_dim"), rngs=rngs)
        self.q_norm, self.k_norm = (RMSNorm(K, axes=("head_dim",), rngs=rngs) if normed else None for _ in range(2))

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        taken: dict[str, Any] = {}

        def take(name: str) -> Any:
            def tap(z: Array) -> Array:
                taken[name] = ctx.tap(name, z)
                return taken[name]

            return tap

        def read(o: Array) -> Array:
            o = ctx.tap("reads", o)
            attended, taken["cache"] = self._attend(x, taken["keys"], taken["values"], ctx, state)
            own = self.cfg.options.default == "attn"
            if ctx.modes is None:
                return attended.astype(o.dtype) if own else o
            chosen = jnp.where(ctx.modes < 0, own, ctx.modes == 1)
            return jnp.where(chosen[:, :, None, None], attended.astype(o.dtype), o)

        taps = {**ctx.taps, "keys": take("keys"), "values": take("values"), "reads": read}
        past = None if state is None else state["linear"]
        z, linear = self.linear.mix(x, dataclasses.replace(ctx, taps=taps), past)
        return z, {"linear": linear, "cache": taken["cache"]}

    def _attend(self, x: Array, k: Array, v: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        options = self.cfg.options
        q, k = self.q(x), jnp.repeat(k, v.shape[2] // k.shape[2], axis=2)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = options.rope.turn(q, ctx.positions), options.rope.turn(k, ctx.positions)
        facts = ctx.places
        cache = None if state is None else state["cache"]
        keys = kv_cache.collect(k, v, cache, **facts)
        o = kv_cache.attend(q, keys, softcap=options.softcap, shards=ctx.shards, impl=ctx.impl, **facts)
        return o, None if cache is None else kv_cache.write(cache, k, v, **facts)

    def out(self, z: Array) -> Array:
        return self.project(z)

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        H, K, V = self.cfg.heads()
        return {
            "linear": self.linear.init_state(batch, max_len, dtype),
            "cache": kv_cache.empty(batch, max_len, H, K, V, dtype),
        }
