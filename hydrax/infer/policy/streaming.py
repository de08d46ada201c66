"""StreamingLLM (arXiv 2309.17453): the first tokens and a window; positions are those inside of the cache."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from hydrax.core.build import NonNegative, Positive
from hydrax.core.typing import Array, Float, PyTree
from hydrax.infer.policy.base import Choice, Policy, Seen, near
from hydrax.ops.softmax import merge
from hydrax.ops.sparse import masked_attention


@dataclasses.dataclass(frozen=True)
class Streaming(Policy):
    """The query reads `sink_tokens` first tokens and the last `window`, its own included.

    With `relative`, keys are at 0, 1, 2, ... in the order of the cache, so that no distance is larger than the cache.
    Distances inside of the window stay as they are. To the first tokens they shrink: for them the query turns back to
    min(t, sink_tokens + window - 1). Keys that are cached after RoPE serve, since rotations add up.
    """

    ABOUT: ClassVar[str] = "first tokens and a window, positions inside of the cache"

    window: Positive = 1024  # last keys, the own one included
    sink_tokens: NonNegative = 4  # first keys
    relative: bool = True  # positions count inside of the cache

    def select(self, seen: Seen, layer: int, handed: PyTree, memory: PyTree) -> Choice:
        return Choice(near(seen, self.window, self.sink_tokens))

    def attend(self, seen: Seen, choice: Choice) -> Float[Array, "B T H V"]:
        if not self.relative:
            return super().attend(seen, choice)
        first = (jnp.arange(seen.slots) < self.sink_tokens) & (seen.distance() >= self.window)
        back = jnp.minimum(seen.positions, self.sink_tokens + self.window - 1) - seen.positions
        turned = seen.options.rope.turn(seen.q, back)
        kept = choice.kept & seen.visible()

        def part(q: Array, kept: Array) -> tuple[Array, Array]:
            return masked_attention(q, seen.k, seen.v, kept, return_lse=True, **seen.facts())

        return merge(part(seen.q, kept & ~first), part(turned, kept & first))[0]
