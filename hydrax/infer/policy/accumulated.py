"""Cascade pruning of tokens by accumulated attention (SpAtten, arXiv 2012.09852): what is little read is forgotten."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from hydrax.core.build import Fraction, Positive
from hydrax.core.numerics import fp32
from hydrax.core.typing import Array, PyTree
from hydrax.infer.policy.base import Choice, Policy, Seen
from hydrax.nn.attention import AttentionConfig


@dataclasses.dataclass(frozen=True)
class Accumulated(Policy):
    """The importance of key j to layer l is Σ p_tj over earlier layers, all heads and all queries so far.

    As tokens come, layer l forgets the least important until ⌈(1 - fraction · l/(L-1)) · n⌉ of n are left. The last
    `recent` stay.

    What is forgotten never comes back, and is forgotten by later layers too. The first layer reads everything.
    """

    ABOUT: ClassVar[str] = "keys of low accumulated attention are forgotten, more of them in later layers"

    fraction: Fraction = 0.5  # of the keys that the last layer forgets
    recent: Positive = 32  # last keys, which stay

    def start(self, layers: Sequence[AttentionConfig], batch: int, slots: int) -> PyTree:
        return {
            "importance": jnp.zeros((batch, slots), jnp.float32),
            "forgotten": jnp.zeros((batch, slots), bool),
        }

    def select(self, seen: Seen, layer: int, handed: PyTree, memory: PyTree) -> Choice:
        before, forgotten = (0.0, jnp.zeros(seen.visible().shape, bool)[:, 0]) if handed is None else handed
        gone, final = self._forget(seen, layer, before, forgotten, memory)
        kept = ~gone[:, None]
        p = seen.probabilities(kept & seen.visible()).sum(1)  # [B,T,S]
        own = memory["importance"][:, None] + jnp.cumsum(p, axis=1)
        remembered = {"importance": own[:, -1], "forgotten": final}
        return Choice(kept, handed=(before + own, gone), memory=remembered)

    def _forget(
        self, seen: Seen, layer: int, importance: Any, forgotten: Array, memory: dict[str, Array]
    ) -> tuple[Array, Array]:
        """What each query no longer reads [B,T,S], and the last of it."""
        share = self.fraction * layer / max(seen.layers - 1, 1)
        importance = jnp.broadcast_to(importance, forgotten.shape)
        index = jnp.arange(seen.slots)

        def one(gone: Array, xs: tuple) -> tuple[Array, Array]:
            worth, inherited, position, real = xs
            past = index <= position[:, None]
            later = gone | (inherited & past)
            allowed = jnp.ceil((1 - share) * fp32(position + 1)).astype(jnp.int32)
            worth = jnp.where(index > position[:, None] - self.recent, jnp.inf, worth)
            worth = jnp.where(past & ~later, worth, -jnp.inf)
            rank = jnp.argsort(jnp.argsort(-worth, axis=-1, stable=True), axis=-1)
            later |= past & (rank >= allowed[:, None]) & (worth < jnp.inf)
            gone = jnp.where(real[:, None], later, gone)
            return gone, gone

        rows = (importance, forgotten, seen.positions, seen.real)
        final, gone = jax.lax.scan(one, memory["forgotten"], jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), rows))
        return jnp.moveaxis(gone, 0, 1), final
