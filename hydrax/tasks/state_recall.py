"""State-based recall (arXiv 2604.03444): follow pointers through swaps, then read what one points at.

    bits b_1 .. b_m   INIT   (var address) x 5   OPS   (var var) x n   QUERY var  ->  the bit at the var's address

Five pointers begin at different addresses; each operation swaps the addresses of two. Following them needs a state,
reading the bit needs recall.
"""

import dataclasses

import numpy as np

from hydrax.core.build import ConfigError, NonNegative, Positive
from hydrax.tasks.base import IGNORE, Sample, Task

PAD, INIT, OPS, QUERY, BIT, VAR, ADDRESS = 0, 1, 2, 3, 4, 6, 11  # BIT, VAR, ADDRESS: the first of each
VARS = 5


@dataclasses.dataclass(frozen=True)
class StateRecall(Task):
    """Labels are bits, so chance is 1/2.

    A pointer that ends where it began is answered by its first address alone. So the slices are `moved`, where the
    queried pointer came to another bit (there the shortcut is worth no more than chance), and `stayed`.

    Attributes:
      length: T; rows are padded at the end.
      bits: m.
      swaps: n.
    """

    length: Positive = 112
    bits: Positive = 32
    swaps: NonNegative = 32

    slices = ("moved", "stayed")

    def __post_init__(self) -> None:
        if self.bits < VARS:
            raise ConfigError("bits", self.bits, f"expected at least {VARS}, an address for each pointer")
        if self.length < self._tokens:
            raise ConfigError("length", self.length, f"expected at least {self._tokens} for these bits and swaps")

    def labels(self, split: str) -> int:
        return 1

    @property
    def vocabulary(self) -> int:
        return ADDRESS + self.bits

    @property
    def _tokens(self) -> int:
        return self.bits + 1 + 2 * VARS + 1 + 2 * self.swaps + 2

    def sample(self, rng: np.random.Generator, rows: int, split: str) -> Sample:
        """meta: address int32 [n,2], of the queried pointer before and after the swaps."""
        bits = rng.integers(2, size=(rows, self.bits))
        first = rng.permuted(np.tile(np.arange(self.bits), (rows, 1)), axis=1)[:, :VARS]
        # A swap of two different pointers: one of five, then one of the four others.
        one = rng.integers(VARS, size=(rows, self.swaps))
        other = (one + rng.integers(1, VARS, size=one.shape)) % VARS
        address, row = first.copy(), np.arange(rows)
        for a, b in zip(one.T, other.T, strict=True):
            address[row, a], address[row, b] = address[row, b], address[row, a]
        queried = rng.integers(VARS, size=rows)
        before, after = first[row, queried], address[row, queried]
        order = rng.permuted(np.tile(np.arange(VARS), (rows, 1)), axis=1)  # of the pointers at INIT
        told = np.stack([VAR + order, ADDRESS + np.take_along_axis(first, order, 1)], axis=2).reshape(rows, -1)
        swapped = VAR + np.stack([one, other], axis=2).reshape(rows, -1)
        init, ops, query = (np.full((rows, 1), sign) for sign in (INIT, OPS, QUERY))
        text = np.concatenate([BIT + bits, init, told, ops, swapped, query, VAR + queried[:, None]], axis=1)
        inputs = np.full((rows, self.length), PAD, np.int32)
        inputs[:, : self._tokens] = text
        targets = np.full((rows, self.length), IGNORE, np.int32)
        targets[:, self._tokens - 1] = BIT + bits[row, after]
        return {
            "inputs": inputs,
            "targets": targets,
            "meta": {
                "address": np.stack([before, after], axis=1).astype(np.int32),
                "slice": (before == after).astype(np.int32),
            },
        }
