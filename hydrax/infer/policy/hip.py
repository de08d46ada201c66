"""HiP (arXiv 2406.09827): a search for the keys of a block of queries that halves ranges of the past."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from hydrax.core.build import ConfigError, NonNegative, Positive
from hydrax.core.numerics import einsum
from hydrax.core.typing import Array, PyTree
from hydrax.infer.policy.base import Choice, Policy, Seen, blocks_of, by_query_head, near
from hydrax.ops.softmax.forms import MASKED


@dataclasses.dataclass(frozen=True)
class HiP(Policy):
    """The past of a block of queries is cut into `nodes` ranges. Each is halved, a half is worth the best score of any
    query with its middle key, and the best `nodes` halves go on, until ranges have at most `leaf` keys: log2 rounds.

    The queries of a block share what they read, so that a prompt is read by blocks and single tokens by themselves.
    """

    ABOUT: ClassVar[str] = "a search that halves ranges of keys, first tokens and a window"

    nodes: Positive = 256  # ranges of keys that go on
    leaf: Positive = 8  # keys of a range at the end
    query_block: Positive = 64  # queries that search together
    window: Positive = 512  # last keys, which are read besides
    sink_tokens: NonNegative = 256  # first keys, which are read besides

    def __post_init__(self) -> None:
        if self.window < self.query_block:
            raise ConfigError("window", self.window, f"expected at least query_block = {self.query_block}")

    def select(self, seen: Seen, layer: int, handed: PyTree, memory: PyTree) -> Choice:
        T, H = seen.q.shape[1:3]
        C = min(self.query_block, T)
        q, real = blocks_of(seen.q, C), blocks_of(seen.real, C)
        past = blocks_of(seen.positions, C)[:, :, 0]  # keys before the block: position of its first query
        keys = by_query_head(seen.k, H)

        def worth(start: Array, end: Array) -> Array:
            """The best score [B,H,N,nodes] of the middle keys of ranges; empty ranges have none."""
            middle = jnp.clip((start + end) // 2, 0, seen.slots - 1)
            own = jax.vmap(jax.vmap(lambda k, at: k[at]))(keys, middle)
            z = einsum("bnchk,bhnik->bhnci", q, own)
            z = jnp.where(real[:, None, :, :, None], z, MASKED).max(3)
            return jnp.where(start < end, z, MASKED)

        edges = jnp.arange(self.nodes + 1) * past[..., None] // self.nodes
        spread = lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], H, *x.shape[1:]))  # noqa: E731
        start, end = spread(edges[..., :-1]), spread(edges[..., 1:])
        widest = -(-seen.slots // self.nodes)
        for _ in range(max(0, math.ceil(math.log2(max(1, widest / self.leaf))))):
            middle = jnp.where(end - start > self.leaf, (start + end) // 2, end)
            start = jnp.concatenate([start, middle], axis=-1)
            end = jnp.concatenate([middle, end], axis=-1)
            best = jax.lax.top_k(worth(start, end), self.nodes)[1]
            start, end = (jnp.take_along_axis(x, best, axis=-1) for x in (start, end))
        found = jnp.repeat(_covered(start, end, seen.slots), C, axis=2)[:, :, :T]
        own = jnp.arange(seen.slots) >= jnp.repeat(past, C, axis=1)[:, None, :T, None]
        return Choice(found | own | near(seen, self.window, self.sink_tokens))


def _covered(start: Array, end: Array, slots: int) -> Array:
    """Which of the slots lie in any of the ranges [..., n]."""
    rows = start.reshape(-1, start.shape[-1]), end.reshape(-1, end.shape[-1])
    opened = jax.vmap(lambda s, e: jnp.zeros(slots + 1, jnp.int32).at[s].add(1).at[e].add(-1))(*rows)
    return (jnp.cumsum(opened, axis=-1)[:, :slots] > 0).reshape(*start.shape[:-1], slots)
