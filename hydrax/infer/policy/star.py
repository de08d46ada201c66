"""Star Attention (arXiv 2411.17116): blocks of a long context are read beside its first block alone."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from hydrax.core.build import NonNegative, Positive
from hydrax.core.typing import Array, Float, PyTree
from hydrax.infer.policy.base import Choice, Policy, Seen
from hydrax.ops.softmax import merge
from hydrax.ops.sparse import masked_attention


@dataclasses.dataclass(frozen=True)
class Star(Policy):
    """Tokens of the context read their own block and the first one, the anchor. What follows the context reads all.

    Attention is computed for each block of keys and merged by its log-sum-exp, as it would be where every block lives
    on a host of its own.
    """

    ABOUT: ClassVar[str] = "tokens of the context read their own block and the first"

    block: Positive = 1024  # tokens per block
    context: NonNegative = 2**30  # tokens of the context; by default nothing follows it

    def select(self, seen: Seen, layer: int, handed: PyTree, memory: PyTree) -> Choice:
        at = seen.positions[:, None, :, None]
        own = jnp.arange(seen.slots) // self.block
        return Choice((own == 0) | (own == at // self.block) | (at >= self.context))

    def attend(self, seen: Seen, choice: Choice) -> Float[Array, "B T H V"]:
        kept = choice.kept & seen.visible()

        def host(start: int) -> tuple[Array, Array]:
            own = slice(start, start + self.block)
            return masked_attention(
                seen.q,
                seen.k[:, own],
                seen.v[:, own],
                kept[..., own],
                return_lse=True,
                **{**seen.facts(), "positions": seen.positions - start},
            )

        return merge(*(host(start) for start in range(0, seen.slots, self.block)))[0]
