"""Multi-query associative recall (arXiv 2312.04927): pairs of a key and a value, then the keys again, much later.

    k_1 v_1 .. k_n v_n   0 0 k_i 0 0 0 k_j 0 ..       asked for at each k_i of the second part: v_i

Keys are different tokens of 1 .. V/2-1, values of V/2 .. V-1. Behind the context of C tokens there are
S = (T-C)/2 slots; n of them, drawn one after another without replacement with p_j ∝ a j^(a-1), hold the first, second,
.. key, so that keys seen first tend to be asked for soonest.

forgetting     u of the keys get another value behind the first pairs; the last one counts
compositional  n = r² triples k k' v of r first and r second keys, from thirds of the vocabulary; the query is k k'
repeats        the context stands p times (arXiv 2407.05483)
"""

import dataclasses
import functools
import math
from typing import Literal

import numpy as np

from hydrax.core.build import ConfigError, NonNegative, Positive, PositiveFloat
from hydrax.tasks.base import IGNORE, Sample, Task, distinct


@dataclasses.dataclass(frozen=True)
class MQAR(Task):
    """Each row has one of the numbers of pairs, all equally likely; in evaluation each is a slice."""

    length: Positive = 64  # T
    pairs: tuple[Positive, ...] = (4,)  # n, mixed over rows
    eval_length: Positive | None = None  # T of evaluation rows; None: length
    eval_pairs: tuple[Positive, ...] = ()  # n of evaluation rows; none: pairs
    vocabulary: Positive = 8192  # V
    power: PositiveFloat = 0.01  # a; 1: slots are equally likely
    fill_random: bool = False  # random tokens, not 0, between the queries
    variant: Literal["recall", "forgetting", "compositional"] = "recall"
    updates: NonNegative = 0  # u of forgetting
    repeats: Positive = 1  # p, of the context

    def __post_init__(self) -> None:
        for name in ("pairs", "eval_pairs"):
            counts = getattr(self, name)
            if len(set(counts)) < len(counts) or not (counts or name == "eval_pairs"):
                raise ConfigError(name, counts, "expected one or more different numbers")
        if (self.updates > 0) != (self.variant == "forgetting"):
            expected = "expected 1 or more" if self.variant == "forgetting" else "expected 0 without forgetting"
            raise ConfigError("updates", self.updates, f"{expected} (variant {self.variant})")
        self._check("pairs", "length", "train")
        self._check(
            "eval_pairs" if self.eval_pairs else "pairs", "eval_length" if self.eval_length else "length", "eval"
        )

    def _check(self, name: str, key: str, split: str) -> None:
        """Whether the rows of a split, whose options are `name` and `key`, can be made."""
        counts, length = self._counts(split), self._length(split)
        for n in counts:
            if self.updates > n:
                raise ConfigError("updates", self.updates, f"expected at most the pairs, {n}")
            if self.variant == "compositional" and math.isqrt(n) ** 2 != n:
                raise ConfigError(name, counts, "expected squares with variant compositional")
            least = self._context(n) + self._width * n
            if length < least:
                raise ConfigError(key, length, f"expected at least {least}, the context and as many slots as pairs")
            if self._third(0) - 1 < n:
                allowed = f"expected at least {self._width * (n + 1)} for {n} different keys and values"
                raise ConfigError("vocabulary", self.vocabulary, allowed)

    @functools.cached_property
    def slices(self) -> tuple[str, ...]:
        return tuple(f"pairs={n}" for n in self._counts("eval"))

    def labels(self, split: str) -> int:
        return max(self._counts(split))

    @property
    def _width(self) -> int:
        """Tokens of a pair, and of a slot."""
        return 3 if self.variant == "compositional" else 2

    def _counts(self, split: str) -> tuple[int, ...]:
        return (split == "eval" and self.eval_pairs) or self.pairs

    def _length(self, split: str) -> int:
        return (split == "eval" and self.eval_length) or self.length

    def _context(self, n: int) -> int:
        return self.repeats * self._width * (n + self.updates)

    def _third(self, i: int) -> int:
        """Where part i of the vocabulary ends, of as many as a pair has tokens."""
        return self.vocabulary * (i + 1) // self._width

    def sample(self, rng: np.random.Generator, rows: int, split: str) -> Sample:
        """meta: pairs and context int32 [n], n and C of each row."""
        counts, length = self._counts(split), self._length(split)
        chosen = rng.integers(len(counts), size=rows)
        inputs = np.zeros((rows, length), np.int32)
        targets = np.full((rows, length), IGNORE, np.int32)
        for i, n in enumerate(counts):
            self._fill(rng, n, inputs, targets, np.flatnonzero(chosen == i))
        if self.fill_random:
            filler = rng.integers(self.vocabulary, size=inputs.shape, dtype=np.int32)
            inputs = np.where(inputs == 0, filler, inputs)  # no key or value is 0
        context = np.array([self._context(n) for n in counts], np.int32)[chosen]
        meta = {"pairs": np.array(counts, np.int32)[chosen], "context": context, "slice": chosen.astype(np.int32)}
        return {"inputs": inputs, "targets": targets, "meta": meta}

    def _fill(
        self, rng: np.random.Generator, n: int, inputs: np.ndarray, targets: np.ndarray, rows: np.ndarray
    ) -> None:
        """Writes rows of n pairs in place."""
        pairs = self._pairs(rng, len(rows), n)
        context, answers = pairs, pairs[..., -1]
        if self.updates:
            context, answers = self._update(rng, pairs)
        written = np.tile(context.reshape(len(rows), -1), (1, self.repeats))
        C, width = written.shape[1], self._width
        inputs[rows, :C] = written
        slots = (inputs.shape[1] - C) // width
        at = C + width * gaps(rng, len(rows), n, slots, self.power)
        for i in range(width - 1):
            inputs[rows[:, None], at + i] = pairs[..., i]
        targets[rows[:, None], at + width - 2] = answers

    def _pairs(self, rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
        """[rows, n, width]: keys, and a value last."""
        keys = math.isqrt(n) if self.variant == "compositional" else n
        first = 1 + distinct(rng, rows, keys, self._third(0) - 1)
        value = self._third(self._width - 2)
        values = value + distinct(rng, rows, n, self.vocabulary - value)
        if self.variant != "compositional":
            return np.stack([first, values], axis=2)
        second = self._third(0) + distinct(rng, rows, keys, self._third(1) - self._third(0))
        cell = distinct(rng, rows, n, n)  # the order of the grid's cells
        columns = np.take_along_axis(first, cell // keys, 1), np.take_along_axis(second, cell % keys, 1), values
        return np.stack(columns, axis=2)

    def _update(self, rng: np.random.Generator, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pairs and the new ones behind them; and the last value of every key."""
        rows, n, _ = pairs.shape
        value = self._third(0)
        forgotten = distinct(rng, rows, self.updates, n)
        new = np.take_along_axis(pairs, forgotten[..., None], 1)
        others = self.vocabulary - value  # any value but the key's own
        new[..., 1] = value + (new[..., 1] - value + rng.integers(1, others, size=forgotten.shape)) % others
        answers = pairs[..., 1].copy()
        np.put_along_axis(answers, forgotten, new[..., 1], 1)
        return np.concatenate([pairs, new], axis=1), answers


def gaps(rng: np.random.Generator, rows: int, count: int, slots: int, power: float) -> np.ndarray:
    """int64 [rows, count]: numbers below `slots` drawn one after another without replacement, p_j ∝ j^(power - 1).

    The order of log p + Gumbel noise is that of such draws.
    """
    noisy = (power - 1) * np.log(np.arange(1, slots + 1)) + rng.gumbel(size=(rows, slots))
    return np.argsort(-noisy, axis=1)[:, :count]
