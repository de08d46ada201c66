"""ListOps (arXiv 1804.06028; as in the Long Range Arena, arXiv 2011.04006): evaluate nested operations on digits.

    [MAX 2 9 [MIN 4 7 ] 0 ] = -> 9

MIN, MAX, MED (the integer part of the median) and SM (the sum modulo 10). A node at a depth below `max_depth`, that of
the root being 1, is an operation with probability 1/4, on 2 to `max_arguments` nodes, and otherwise a digit;
expressions are kept if their length, a token per digit and two per operation, is within bounds.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from hydrax.core.build import ConfigError, Positive
from hydrax.tasks.base import IGNORE, Sample, Task

PAD, DIGIT, MIN, MAX, MED, SM, CLOSE, EQUALS = 0, 1, 11, 12, 13, 14, 15, 16  # DIGIT: that of 0
OPERATION = 0.25
CANDIDATES = 2048  # trees that are drawn at once
ROUNDS = 500  # of them without one to keep before the bounds count as impossible
SLICES = 4


class Level(NamedTuple):
    """The nodes at one depth of many trees, those of a parent side by side, parents in the order of their level."""

    tree: np.ndarray  # int [N]
    arguments: np.ndarray  # int [N], 0 for digits
    symbol: np.ndarray  # int [N], the token of the operation or digit


@dataclasses.dataclass(frozen=True)
class ListOps(Task):
    """The value of an expression is asked for at the sign after it; chance is 1/10.

    Attributes:
      length: T. Expressions have up to length - 1 tokens; the published task has 501 to 1999.
      min_length: tokens of an expression at least.
      max_depth: depth at which every node is a digit.
      max_arguments: of an operation.
    """

    length: Positive = 2000
    min_length: Positive = 501
    max_depth: Positive = 10
    max_arguments: int = 10

    def __post_init__(self) -> None:
        if self.max_arguments < 2:
            raise ConfigError("max_arguments", self.max_arguments, "expected an integer >= 2")
        if self.min_length > self.length - 1:
            raise ConfigError("min_length", self.min_length, f"expected at most length - 1 = {self.length - 1}")

    def labels(self, split: str) -> int:
        return 1

    @property
    def vocabulary(self) -> int:
        return EQUALS + 1

    @functools.cached_property
    def slices(self) -> tuple[str, ...]:
        return tuple(f"length={a}-{b - 1}" for a, b in zip(self._bounds[:-1], self._bounds[1:], strict=True))

    @property
    def _bounds(self) -> np.ndarray:
        """Where slices begin and the last ends: up to four of equal width."""
        return np.unique(np.linspace(self.min_length, self.length, SLICES + 1).astype(int))

    def sample(self, rng: np.random.Generator, rows: int, split: str) -> Sample:
        """meta: length int32 [n], tokens of the expression; value int32 [n]."""
        inputs, values, lengths = (
            np.concatenate(parts)[:rows] for parts in zip(*self._batches(rng, rows), strict=True)
        )
        targets = np.full(inputs.shape, IGNORE, np.int32)
        inputs[np.arange(rows), lengths] = EQUALS
        targets[np.arange(rows), lengths] = DIGIT + values
        meta = {"length": lengths.astype(np.int32), "value": values.astype(np.int32)}
        meta["slice"] = (np.searchsorted(self._bounds, lengths, side="right") - 1).astype(np.int32)
        return {"inputs": inputs, "targets": targets, "meta": meta}

    def _batches(self, rng: np.random.Generator, rows: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Expressions within bounds, `rows` of them or more."""
        found, batches = 0, []
        for _ in range(ROUNDS):
            levels = self._grow(rng)
            sizes = np.sum([np.bincount(v.tree, 1 + (v.arguments > 0), CANDIDATES) for v in levels], axis=0).astype(int)
            kept = np.flatnonzero((sizes >= self.min_length) & (sizes < self.length))
            if not len(kept):
                continue
            batches.append((*write(prune(levels, kept), self.length), sizes[kept]))
            found += len(kept)
            if found >= rows:
                return batches
        allowed = f"fewer than {rows} of {ROUNDS * CANDIDATES} expressions have that many tokens; widen the bounds"
        raise ConfigError("min_length", self.min_length, allowed)

    def _grow(self, rng: np.random.Generator) -> list[Level]:
        """Candidate trees, level by level. Those that are longer than a row already grow no further."""
        levels: list[Level] = []
        tree, sizes = np.arange(CANDIDATES), np.zeros(CANDIDATES)
        while len(tree):
            operation = rng.random(len(tree)) < (OPERATION if len(levels) + 1 < self.max_depth else 0)
            operation &= sizes[tree] < self.length
            arguments = np.where(operation, rng.integers(2, self.max_arguments, len(tree), endpoint=True), 0)
            symbol = np.where(operation, rng.integers(MIN, SM, len(tree), endpoint=True), DIGIT)
            symbol += np.where(operation, 0, rng.integers(10, size=len(tree)))
            levels.append(Level(tree, arguments, symbol))
            sizes += np.bincount(tree, 1 + operation, CANDIDATES)
            tree = np.repeat(tree, arguments)
        return levels


def prune(levels: list[Level], kept: np.ndarray) -> list[Level]:
    """The levels of the trees `kept`, renumbered from 0."""
    number = np.full(CANDIDATES, -1)
    number[kept] = np.arange(len(kept))
    pruned = []
    for level in levels:
        stays = number[level.tree] >= 0
        pruned.append(Level(number[level.tree[stays]], level.arguments[stays], level.symbol[stays]))
    return [level for level in pruned if len(level.tree)]


def write(levels: list[Level], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Trees as rows of tokens int32 [n, length] padded at the end, and their values [n].

    Sizes and values go up from the leaves, positions down from the roots.
    """
    sizes, values = [np.empty(0, int)], [np.empty(0, int)]  # of the level below
    for level in reversed(levels):
        operation = level.arguments > 0
        first = np.cumsum(level.arguments[operation]) - level.arguments[operation]
        size, value = np.ones(len(level.tree), int), level.symbol - DIGIT
        if len(first):
            size[operation] = 2 + np.add.reduceat(sizes[-1], first)
            value[operation] = evaluate(level.symbol[operation], values[-1], level.arguments[operation])
        sizes.append(size)
        values.append(value)
    rows = np.full((len(levels[0].tree), length), PAD, np.int32)
    place = np.zeros(len(levels[0].tree), int)
    for level, size, below in zip(levels, sizes[:0:-1], sizes[-2::-1], strict=True):
        rows[level.tree, place] = level.symbol
        operation = level.arguments > 0
        rows[level.tree[operation], (place + size - 1)[operation]] = CLOSE
        before = np.cumsum(below) - below  # of all nodes to the left in the level below
        arguments = level.arguments[operation]
        first = np.cumsum(arguments) - arguments
        place = np.repeat(place[operation] + 1 - before[first], arguments) + before if len(first) else place[:0]
    return rows, values[-1]


def evaluate(symbols: np.ndarray, digits: np.ndarray, arguments: np.ndarray) -> np.ndarray:
    """Values of operations [N] on digits [sum of arguments], those of each side by side."""
    first = np.cumsum(arguments) - arguments
    ranked = digits[np.lexsort((digits, np.repeat(np.arange(len(arguments)), arguments)))]
    results = {
        MIN: ranked[first],
        MAX: ranked[first + arguments - 1],
        MED: (ranked[first + (arguments - 1) // 2] + ranked[first + arguments // 2]) // 2,
        SM: np.add.reduceat(digits, first) % 10,
    }
    return np.select([symbols == symbol for symbol in results], list(results.values()))
