"""RAT (arXiv 2507.04416): gated averages within chunks of L tokens, softmax attention to what chunks end with.

    f_t = σ(x_t W_g + b_g),   s_t = f_t ⊙ s_{t-1} + (1 - f_t) ⊙ u_t,   κ_t = f_t ⊙ κ_{t-1} + (1 - f_t) ⊙ k_t

from s = κ = 0 at the start of each chunk, and o_t by a softmax of d^-½ RoPE(q_t)·RoPE(κ) over (κ_t, s_t) itself and the
last (κ, s) of every chunk before. RoPE turns by the number of the chunk. With L = 1 it is attention with gated keys and
values, with L as long as the document a gated recurrence. Chunks count from the start of the document.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, Positive
from hydrax.core.numerics import einsum, fp32, wide
from hydrax.core.typing import Array, PyTree
from hydrax.mixers.base import Context, Mixer, MixerConfig, per_head
from hydrax.nn import kv_cache
from hydrax.nn.linear import Linear
from hydrax.nn.param import param
from hydrax.nn.position import Rope
from hydrax.ops.softmax import attention, merge
from hydrax.parallel.sequence import linear_scan, over_all_keys

NOWHERE = 2**30
"""Position of what no cache keeps."""


@dataclasses.dataclass(frozen=True)
class Config(MixerConfig):
    heads: Positive = 4
    groups: Positive = 2  # of queries and keys; head h uses group h mod groups
    width: Positive | None = None  # d per head; d_model / heads if None
    chunk: Positive = 16  # L
    rope: Rope = dataclasses.field(default_factory=Rope)  # of the numbers of chunks
    chunk_size: Positive | None = None  # tokens at a time in the recurrence's training form

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise ConfigError("groups", self.groups, f"expected a divisor of heads = {self.heads}")

    def fill(self, d_model: int) -> "Config":
        return dataclasses.replace(self, width=self.width or per_head(d_model, self.heads))

    def slots(self, max_len: int) -> int:
        """Whole chunks in so many tokens, one at least."""
        return max(1, max_len // self.chunk)


class Rat(Mixer):
    """y = W_o (σ(x W_z) ⊙ o); the state holds s and κ, and those of the ends of chunks, turned."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        heads, groups = (cfg.heads, cfg.width), (cfg.groups, cfg.width)
        axes, shared = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.q = Linear(d_model, groups, axes=shared, rngs=rngs)
        self.k = Linear(d_model, groups, axes=shared, rngs=rngs)
        self.v = Linear(d_model, heads, axes=axes, rngs=rngs)
        self.forget = Linear(d_model, heads, axes=axes, rngs=rngs)
        self.forget_bias = param(rngs, _spread(cfg.chunk), heads, axes[1:])
        self.gate = Linear(d_model, heads, axes=axes, rngs=rngs)
        self.project = Linear(heads, d_model, axes=(*axes[1:], "embed"), residual=True, rngs=rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg, cache = self.cfg, None if state is None else state["cache"]
        tiles = (1, 1, cfg.heads // cfg.groups, 1)
        number = ctx.positions // cfg.chunk
        q = cfg.rope.turn(jnp.tile(self.q(x), tiles), number)
        k, u = jnp.tile(ctx.tap("keys", self.k(x)), tiles), ctx.by_channel("values", self.v(x))
        f = jax.nn.sigmoid(fp32(self.forget(x)) + self.forget_bias[...])
        first = (ctx.positions % cfg.chunk == 0)[..., None, None]
        h, memory = linear_scan(
            jnp.tile(jnp.where(first, 0, f), 2),
            jnp.tile(1 - f, 2) * fp32(jnp.concatenate([k, u], axis=-1)),
            initial_state=None if state is None else state["memory"],
            chunk_size=cfg.chunk_size,
            **ctx.rows,
        )
        k, s = (a.astype(x.dtype) for a in jnp.split(h, 2, axis=-1))
        k = cfg.rope.turn(k, number)
        ids = jnp.ones_like(number) if ctx.segment_ids is None else ctx.segment_ids
        ends = ctx.positions % cfg.chunk == cfg.chunk - 1
        own = {"k": k, "s": s, "number": number, "ids": ids, "ends": ends}

        def read(rows: dict[str, Array], keys: dict[str, Array]) -> Array:
            most = -(-keys["k"].shape[1] // cfg.chunk)  # a call may begin within a chunk
            return self._read(rows, _ends_of_chunks(keys, most, cache), ctx.impl)

        o = over_all_keys(read, {"q": q, **own}, own, ctx.shards)
        o = ctx.by_channel("reads", o) * jax.nn.sigmoid(self.gate(x))
        place = jnp.where(ends, number, NOWHERE)
        return o, {"memory": memory, "cache": kv_cache.write(cache, k, s, place, ctx.segment_ids)}

    def _read(self, rows: dict[str, Array], keys: kv_cache.Keys, impl: str | None) -> Array:
        """o of queries by the ends of chunks before theirs, and by themselves."""
        q, k, s = (rows[name] for name in ("q", "k", "s"))
        far = attention(
            q,
            keys.k,
            keys.v,
            positions=rows["number"] - 1,
            segment_ids=rows["ids"],
            kv_positions=keys.positions,
            kv_segment_ids=keys.segment_ids,
            return_lse=True,
            impl=impl,
        )
        score = einsum("bthk,bthk->bth", q, k) * self.cfg.width**-0.5
        return merge(far, (s, score))[0]

    def init_state(self, batch: int, max_len: int, dtype: jnp.dtype) -> PyTree:
        H, d = self.cfg.heads, self.cfg.width
        return {
            "memory": jnp.zeros((batch, H, 2 * d), wide(dtype)),
            "cache": kv_cache.empty(batch, self.cfg.slots(max_len), H, d, d, dtype),
        }


def _ends_of_chunks(tokens: dict[str, Array], most: int, cache: kv_cache.Cache | None) -> kv_cache.Keys:
    """The last tokens of whole chunks, of which there are `most` at most, after those of a cache."""
    order = jnp.argsort(~tokens["ends"], axis=1, stable=True)[:, :most]

    def take(x: Array) -> Array:
        return jax.vmap(lambda row, i: row[i])(x, order)

    ids = jnp.where(take(tokens["ends"]), take(tokens["ids"]), 0)
    new = kv_cache.Keys(take(tokens["k"]), take(tokens["s"]), take(tokens["number"]), ids)
    if cache is None:
        return new
    old = jnp.where(cache["segment_ids"] != 0, tokens["ids"][:, :1], 0)
    before = kv_cache.Keys(cache["k"], cache["v"], cache["positions"], old)
    return kv_cache.Keys(*(jnp.concatenate([a, b.astype(a.dtype)], axis=1) for a, b in zip(before, new, strict=True)))


def _spread(chunk: int) -> Any:
    """log U(1, L - 1), so that averages reach back 1 to L - 1 tokens; 0 where chunks are too short."""
    if chunk < 3:
        return jax.nn.initializers.zeros
    return lambda key, shape, dtype: jnp.log(jax.random.uniform(key, shape, dtype, 1, chunk - 1))
