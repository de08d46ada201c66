"""Attention whose keys have a last query, and the table of patterns that are nothing but such lifetimes.

    s is visible to t   <=>   same document, p_s <= p_t <= end_s        (p: positions inside the document)

One number per key and head of keys describes the mask. A key that left never returns, so that a cache may forget it:
decoding needs no more slots than there are keys alive at once. `Pattern`s are static: end is a function of position,
head and layer alone.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import numpy as np

from hydrax.core.typing import Array, ArrayLike, Float, Int
from hydrax.ops.softmax import attention

FOREVER = 2**30
"""End of a key that stays visible; above every position."""


def lifetime_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S Hk K"],
    v: Float[Array, "B S Hk V"],
    ends: Int[Array, "#B S #Hk"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    key_bias: Float[Array, "#B S #Hk"] | None = None,
    sinks: Float[Array, "H"] | None = None,
    **options: Any,
) -> Any:
    """`ops.softmax.attention` to the keys that are alive.

    Args:
      ends: position of the last query that sees the key; below the key's own position no query does.
      key_bias: added to all scores of a key; it has a gradient, `ends` have none.
      options: others of `attention`, which also says what is returned and raised.
    """
    facts: dict[str, Any] = {"segment_ids": segment_ids, "positions": positions, "sinks": sinks}
    return attention(q, k, v, ends=jax.lax.stop_gradient(ends), key_bias=key_bias, **facts, **options)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A static pattern of lifetimes.

    Attributes:
      sink_tokens: first tokens of each document that stay visible.
      dilation: only queries at a multiple of so many tokens after a key see it.
    """

    sink_tokens: int = dataclasses.field(default=0, kw_only=True)
    dilation: int = dataclasses.field(default=1, init=False)

    @property
    def first(self) -> int:
        """Tokens of each document that stay visible to all heads."""
        return self.sink_tokens

    @property
    def reach(self) -> int | None:
        """Distance below which all visible keys lie, but for the `first`; None: there is none."""
        return None

    @property
    def rows(self) -> int:
        """Number of heads of keys whose ends differ; 1 if they are the same for all."""
        return 1

    @property
    def layers(self) -> int:
        """Number of layers whose ends differ; 1 if they are the same for all."""
        return 1

    def lives(self, p: Any, layer: Any) -> Any:
        """Ends [...,rows] of keys at positions [...,rows or 1]."""
        raise NotImplementedError

    def ends(self, positions: ArrayLike, layer: int | Array = 0) -> Any:
        """Ends int32 [B,S,rows] of keys at positions [B,S], or [B,S,rows] where a cache evicts by head."""
        p = positions.reshape(*positions.shape[:2], -1)
        where = p.__array_namespace__().where
        return where(p < self.first, FOREVER, self.lives(p, layer))

    def slots(self, n: int) -> int:
        """Most keys of a document of n tokens that are alive at once, in any head and layer."""
        return max(alive for _, alive in _counts(self, n))

    def visible(self, n: int) -> float:
        """Mean number of keys that a query of a document of n tokens sees, over heads and layers."""
        seen = [seen for seen, _ in _counts(self, n)]
        return sum(seen) / len(seen)


@functools.lru_cache(maxsize=256)
def _counts(pattern: Pattern, n: int) -> list[tuple[float, int]]:
    """Of a document of n tokens, for every layer: the mean number of visible keys, and the most that live at once."""
    return [_count(pattern, np.arange(n, dtype=np.int64)[:, None], layer) for layer in range(pattern.layers)]


def _count(pattern: Pattern, p: np.ndarray, layer: int) -> tuple[float, int]:
    n = len(p)
    ends = np.minimum(pattern.ends(p[None], layer)[0], n - 1)  # no pattern ends before its own query
    queries = (ends - p) // pattern.dilation + 1
    left = np.stack([np.bincount(row + 1, minlength=n + 1)[:n] for row in ends.T], axis=1)
    return float(queries.sum() / queries.size), int(np.max(p + 1 - np.cumsum(left, 0), initial=0))


@dataclasses.dataclass(frozen=True)
class Window(Pattern):
    """The last `window` keys, the query's own included (arXiv 2309.17453)."""

    window: int

    @property
    def reach(self) -> int:
        return self.window

    def slots(self, n: int) -> int:
        return min(n, self.window + self.sink_tokens)

    def visible(self, n: int) -> float:
        w = min(n, self.window)
        beyond = n - w  # queries that have keys outside their window; the first of them see fewer sink tokens than all
        few = min(beyond, self.sink_tokens)
        return w - w * (w - 1) / (2 * n) + (few * (few + 1) / 2 + (beyond - few) * self.sink_tokens) / n

    def lives(self, p: Any, layer: Any) -> Any:
        return p + self.window - 1


@dataclasses.dataclass(frozen=True)
class Neighbourhood(Pattern):
    """`stride` queries in a row share the window that ends at the last of them (arXiv 2504.16922, one dimension).

    t sees max(ℓ - window + 1, 0) .. t with ℓ = ⌊t/stride⌋·stride + stride - 1; with a dilation δ the tokens of each
    remainder mod δ do so by themselves. The leader ℓ may lie beyond the row: clamped, the last group would depend on T.
    """

    window: int
    stride: int = 1
    dilation: int = dataclasses.field(default=1, kw_only=True)

    @property
    def reach(self) -> int:
        return (self.window - 1) * self.dilation + 1

    def lives(self, p: Any, layer: Any) -> Any:
        last = (p // self.dilation + self.window) // self.stride * self.stride - 1
        return last * self.dilation + p % self.dilation


@dataclasses.dataclass(frozen=True)
class Strided(Pattern):
    """S2-Attention (arXiv 2407.17678): `local` blocks, and every `stride`-th block of all, another one in each head.

    Head h keeps the blocks c with (c + h·step + offset) mod stride = 0; the last `dense` heads keep everything. Blocks
    count from the document's start.
    """

    block: int
    local: int
    stride: int
    heads: int
    step: int = 1
    offset: int = 0
    dense: int = 0

    @property
    def rows(self) -> int:
        return self.heads

    def lives(self, p: Any, layer: Any) -> Any:
        head, c = np.arange(self.heads), p // self.block
        kept = ((c + head * self.step + self.offset) % self.stride == 0) | (head >= self.heads - self.dense)
        return p.__array_namespace__().where(kept, FOREVER, (c + self.local) * self.block - 1)


@dataclasses.dataclass(frozen=True)
class ShiftedGroups(Pattern):
    """Causal attention inside groups of `group` tokens, which start `offsets[h]` tokens later in head h.

    LongLoRA's S2-Attn (arXiv 2309.12307) without its roll, which let the first tokens of a row see its end.
    """

    group: int
    offsets: tuple[int, ...]

    @property
    def reach(self) -> int:
        return self.group

    @property
    def rows(self) -> int:
        return len(self.offsets)

    def lives(self, p: Any, layer: Any) -> Any:
        offsets = np.asarray(self.offsets)
        return ((p - offsets) // self.group + 1) * self.group - 1 + offsets


@dataclasses.dataclass(frozen=True)
class Chunks(Pattern):
    """Queries see what is not after them of their own chunk of tokens and of the `seen` - 1 before it (2404.08801)."""

    chunk: int
    seen: int = 1

    @property
    def reach(self) -> int:
        return self.chunk * self.seen

    def lives(self, p: Any, layer: Any) -> Any:
        return (p // self.chunk + self.seen) * self.chunk - 1


@dataclasses.dataclass(frozen=True)
class Spans(Pattern):
    """Head h of layer l sees its own block and those before it, `blocks[l][h]` in all, and block 0 (arXiv 2406.14909).

    Layers beyond the list are as its last row.
    """

    block: int
    blocks: tuple[tuple[int, ...], ...]

    @property
    def first(self) -> int:
        return max(self.sink_tokens, self.block)

    @property
    def reach(self) -> int:
        return self.block * max(max(row) for row in self.blocks)

    @property
    def rows(self) -> int:
        return len(self.blocks[0])

    @property
    def layers(self) -> int:
        return len(self.blocks)

    def lives(self, p: Any, layer: Any) -> Any:
        xp = p.__array_namespace__()
        own = xp.asarray(self.blocks)[xp.minimum(layer, self.layers - 1)]
        return (p // self.block + own) * self.block - 1


@dataclasses.dataclass(frozen=True)
class LogBands(Pattern):
    """The key at position p lives window · (largest power of two that divides p) tokens, the first one for ever.

    Density halves each time the distance doubles: a causal form of Radial Attention (arXiv 2506.19852).
    """

    window: int
    LONGEST: ClassVar[int] = 2**20  # powers of two count no further

    def lives(self, p: Any, layer: Any) -> Any:
        xp = p.__array_namespace__()
        power = xp.minimum(p & -p, min(self.LONGEST, FOREVER // self.window))
        return xp.where(p == 0, FOREVER, xp.minimum(p + self.window * power - 1, FOREVER))


@dataclasses.dataclass(frozen=True)
class AnchoredBlocks(Pattern):
    """Own block and first block: the first phase of Star Attention (arXiv 2411.17116)."""

    block: int

    @property
    def first(self) -> int:
        return max(self.sink_tokens, self.block)

    @property
    def reach(self) -> int:
        return self.block

    def lives(self, p: Any, layer: Any) -> Any:
        return (p // self.block + 1) * self.block - 1
