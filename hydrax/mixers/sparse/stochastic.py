"""Stochastic attention (arXiv 2604.00754): a sliding window, and a window in a random order of the tokens.

    z = g ⊙ SWA(q, k, v) + (1 - g) ⊙ SA(q, k, v),    g = σ(W_g x) per head,
    SA: s <= t with |π(t) - π(s)| <= width / 2, π a permutation of the positions, the layer's own

Both read the same queries, keys and values. A training step draws its permutations; all else (validation, prefill,
decoding) reads the fixed ones of `seed`, which is also what training reads with `resample` = False. Beyond `table`
positions, each further stretch of as many is permuted within itself. The paper's abstract fixes no details: these are
hydrax's own.
"""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from hydrax.core.build import ConfigError, NonNegative, Positive
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, Int, PyTree
from hydrax.mixers.base import Context, SoftmaxConfig, SoftmaxMixer
from hydrax.nn import kv_cache
from hydrax.nn.attention import QKV
from hydrax.nn.linear import Linear
from hydrax.parallel.sequence import permuted_window


@dataclasses.dataclass(frozen=True)
class Config(SoftmaxConfig):
    window: Positive = 128  # visible keys of the sliding window, the query's own included
    width: Positive | None = None  # ranks around a query's, half of whose tokens are behind it on average; 2 window
    table: Positive = 2048  # positions that a permutation covers: the length of the training rows
    resample: bool = True  # permutations of their own for every training step
    seed: NonNegative = 0  # of the fixed ones

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.softcap is not None:
            raise ConfigError("softcap", self.softcap, "expected None: scores of far keys are masked by a bias")
        if self.kv != "own":
            raise ConfigError("kv", self.kv, "expected own: a window's cache lacks keys that are near by rank")

    def fill(self, d_model: int) -> "Config":
        return dataclasses.replace(super().fill(d_model), width=self.width or 2 * self.window)


class StochasticAttention(SoftmaxMixer):
    """y = W_o (z ⊙ σ(W_o' x)); the state holds the keys and values of the whole document."""

    Config: TypeAlias = Config

    def __init__(self, d_model: int, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.qkv = QKV(d_model, cfg, rngs=rngs)
        self.share = Linear(d_model, cfg.heads, axes=("embed", "heads"), bias=True, rngs=rngs)
        self.read_out(d_model, rngs)

    def mix(self, x: Array, ctx: Context, state: PyTree | None) -> tuple[Array, PyTree]:
        cfg = self.cfg
        q, keys, state = self.qkv.see(x, ctx, state)
        near = self.attend(q, keys, ctx, window=cfg.window)
        table = self._table(ctx)
        own = {} if keys.positions is None else {"kv_ranks": ranks(table, keys.positions)}
        anywhere = permuted_window(
            q,
            keys.k,
            keys.v,
            ranks=ranks(table, ctx.positions),
            width=cfg.width,
            scale=cfg.scale,
            impl=ctx.impl,
            **own,
            **kv_cache.sides(keys, ctx.positions, ctx.segment_ids, ctx.shards),
        )
        g = jax.nn.sigmoid(fp32(self.share(x)))[..., None]
        o = ctx.tap("reads", (g * fp32(near) + (1 - g) * fp32(anywhere)).astype(x.dtype))
        return self.gate(o, x), state

    def _table(self, ctx: Context) -> Int[Array, "L"]:
        """π of the first positions, in this layer and step."""
        drawn = self.cfg.resample and ctx.noise is not None
        key = ctx.noise if drawn else jax.random.key(self.cfg.seed)
        return jax.random.permutation(jax.random.fold_in(key, ctx.layer_index), self.cfg.table).astype(jnp.int32)


def ranks(table: Int[Array, "L"], positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """π of any position."""
    L = table.shape[0]
    return positions // L * L + table[positions % L]
