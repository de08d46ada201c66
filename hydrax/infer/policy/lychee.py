"""LycheeDecode (arXiv 2602.04541): some heads read everything and choose keys; the others inherit the choice."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from hydrax.core.build import ConfigError, Positive
from hydrax.core.typing import Array, PyTree
from hydrax.infer.policy.base import Choice, Policy, Seen, same_heads
from hydrax.infer.policy.reuse import heaviest
from hydrax.nn.attention import AttentionConfig


@dataclasses.dataclass(frozen=True)
class Lychee(Policy):
    """A retrieval head reads all keys and hands the `count` with the highest weight to the same head of the next layer.
    A sparse head reads what it is handed, and hands it on. In the first layer all heads retrieve.

    `retrieval` has the retrieval heads of every later layer; () of none. `gates.train_gates` finds them.
    """

    ABOUT: ClassVar[str] = "retrieval heads read everything, the others the keys that these weigh most"

    retrieval: tuple[tuple[int, ...], ...] = ()  # retrieval heads of every later layer
    count: Positive = 512  # keys that one hands on

    def check(self, layers: Sequence[AttentionConfig]) -> None:
        same_heads(layers, "lychee")
        heads = layers[0].heads
        if len(self.retrieval) not in (0, len(layers) - 1):
            raise ConfigError("retrieval", self.retrieval, f"expected heads for each of {len(layers) - 1} later layers")
        if any(not 0 <= h < heads for own in self.retrieval for h in own):
            raise ConfigError("retrieval", self.retrieval, f"expected heads below {heads}")

    def select(self, seen: Seen, layer: int, handed: PyTree, memory: PyTree) -> Choice:
        own = heaviest(seen, self.count)
        if layer == 0:
            return Choice(seen.visible(), handed=own)
        heads = self.retrieval[layer - 1] if self.retrieval else ()
        retrieves: Array = jnp.asarray(np.isin(np.arange(seen.q.shape[2]), heads))[:, None, None]
        return Choice(jnp.where(retrieves, seen.visible(), handed), handed=jnp.where(retrieves, own, handed))
