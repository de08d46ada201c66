"""State tracking: word problems of finite groups, of which parity is the smallest (arXiv 2411.12537, 2404.08819).

A word x_1 .. x_T of group elements has, after each of its letters, the answer

    p_t = p_{t-1} · x_t,      p_0 = the identity.

Tokens and targets are 1 + the number of the element; 0 is padding. The answer to a word is asked for at its last
letter and, as in the word problems of the paper, at every letter before: the answers to its beginnings. Letters are
drawn independently and uniformly.
"""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np

from hydrax.core.build import ConfigError, NonNegative, Positive
from hydrax.tasks.base import IGNORE, Sample, Task

QUARTERS = 4

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class WordProblem:
    """A group by its Cayley table [G,G], element 0 the identity, and the elements that words are made of."""

    product: np.ndarray
    letters: np.ndarray

    @property
    def order(self) -> int:
        """Number of elements, and of possible answers."""
        return len(self.product)

    @property
    def vocabulary(self) -> int:
        """Tokens: the elements and padding."""
        return self.order + 1

    def batch(self, rows: int, lengths: tuple[int, int], *, seed: int, step: int) -> Batch:
        """Words with lengths uniform in the closed range, one per row; a pure function of the arguments.

        Returns tokens, targets, segment_ids, positions int32 [B,T], weights fp32 [B,T] (1 at letters) and bytes fp32
        [B] (their number: an answer counts as one byte), T the upper length.
        """
        rng = np.random.default_rng((seed, step))
        words = rng.choice(self.letters, (rows, lengths[1]))
        index = np.arange(lengths[1], dtype=np.int32)
        real = index < rng.integers(lengths[0], lengths[1], (rows, 1), endpoint=True)
        return {
            "tokens": np.where(real, words + 1, 0).astype(np.int32),
            "targets": np.where(real, self.answers(words) + 1, 0).astype(np.int32),
            "segment_ids": real.astype(np.int32),
            "positions": np.where(real, index, 0),
            "weights": real.astype(np.float32),
            "bytes": real.sum(1).astype(np.float32),
        }

    def answers(self, words: np.ndarray) -> np.ndarray:
        """The running products of words [B,T]."""
        steps = itertools.accumulate(words.T, lambda p, x: self.product[p, x])
        return np.stack(list(steps), axis=1)


def cyclic(n: int) -> WordProblem:
    """Z_n: addition modulo n. Z_2 is parity."""
    elements = np.arange(n)
    return WordProblem((elements[:, None] + elements) % n, elements)


def symmetric(n: int, *, moved: int | None = None) -> WordProblem:
    """S_n, (p · x)(i) = p(x(i)), in lexicographic order; letters move at most `moved` points (2: swaps)."""
    elements = np.array(list(itertools.permutations(range(n))))
    number = {tuple(p): i for i, p in enumerate(elements.tolist())}
    product = np.array([[number[tuple(p[x])] for x in elements] for p in elements])
    moves = (elements != np.arange(n)).sum(1)
    return WordProblem(product, np.flatnonzero(moves <= (n if moved is None else moved)))


def alternating(n: int) -> WordProblem:
    """A_n, the even permutations of S_n, in lexicographic order."""
    whole = symmetric(n)
    elements = np.array(list(itertools.permutations(range(n))))
    before, after = np.triu_indices(n, 1)
    even = np.flatnonzero((elements[:, before] > elements[:, after]).sum(1) % 2 == 0)
    number = np.zeros(whole.order, int)
    number[even] = np.arange(len(even))
    return WordProblem(number[whole.product[np.ix_(even, even)]], np.arange(len(even)))


TABLE: Mapping[str, Callable[[], WordProblem]] = {
    "parity": lambda: cyclic(2),
    "mod5": lambda: cyclic(5),
    "s3": lambda: symmetric(3),
    "a5": lambda: alternating(5),
    "s5": lambda: symmetric(5),
    "s5_swaps": lambda: symmetric(5, moved=2),
    "s5_three": lambda: symmetric(5, moved=3),
}


def word_problem(name: str) -> WordProblem:
    """The word problem of that name.

    Raises:
      ConfigError: there is none.
    """
    if name not in TABLE:
        raise ConfigError("task", name, f"expected one of {', '.join(TABLE)}")
    return TABLE[name]()


@dataclasses.dataclass(frozen=True)
class GroupWords(Task):
    """A word problem, its answer asked for at every letter. Evaluation words are longer, each length a slice."""

    length: Positive = 32  # T of training rows
    group: str = "s5"  # a name in the table above
    spacing: NonNegative = 0  # padding behind every letter, with the answer at the last of it: time to think
    eval_factors: tuple[Positive, ...] = (1, 2, 4, 8)  # letters of evaluation words over those of training

    def __post_init__(self) -> None:
        if self.group not in TABLE:
            raise ConfigError("group", self.group, f"expected one of {', '.join(TABLE)}")
        if self.length % (self.spacing + 1):
            raise ConfigError("length", self.length, f"expected a multiple of spacing + 1 = {self.spacing + 1}")
        if not self.eval_factors or len(set(self.eval_factors)) < len(self.eval_factors):
            raise ConfigError("eval_factors", self.eval_factors, "expected one or more different factors of length")

    @functools.cached_property
    def problem(self) -> WordProblem:
        return TABLE[self.group]()

    @property
    def vocabulary(self) -> int:
        return self.problem.vocabulary

    @functools.cached_property
    def slices(self) -> tuple[str, ...]:
        return tuple(f"length={factor * self.length}" for factor in self.eval_factors)

    def sample(self, rng: np.random.Generator, rows: int, split: str) -> Sample:
        """meta: letters int32 [n], of each word."""
        factors = self.eval_factors if split == "eval" else (1,)
        each, chosen = self.spacing + 1, rng.integers(len(factors), size=rows)
        letters = np.array(factors)[chosen] * (self.length // each)
        words = rng.choice(self.problem.letters, (rows, max(factors) * (self.length // each)))
        real = np.arange(words.shape[1]) < letters[:, None]
        inputs = np.zeros((rows, words.shape[1] * each), np.int32)
        targets = np.full_like(inputs, IGNORE)
        inputs[:, ::each] = np.where(real, words + 1, 0)
        targets[:, each - 1 :: each] = np.where(real, self.problem.answers(words) + 1, IGNORE)
        meta = {"letters": letters.astype(np.int32), "slice": chosen.astype(np.int32)}
        return {"inputs": inputs, "targets": targets, "meta": meta}


@dataclasses.dataclass(frozen=True)
class Ending(Task):
    """Rows of different lengths that ask for one answer at their last token; padding is 0.

    Lengths are uniform over those that are allowed, in evaluation from that of training rows on. Each quarter of these
    is a slice.
    """

    length: Positive = 40  # T of training rows
    min_length: Positive = 2  # tokens of a training row at least
    eval_length: Positive = 256  # T of evaluation rows

    every: ClassVar[int] = 1  # allowed lengths are multiples of it

    def __post_init__(self) -> None:
        if self.min_length > self.length or not len(self._lengths("train")):
            allowed = f"expected at most length = {self.length}, with a multiple of {self.every} between"
            raise ConfigError("min_length", self.min_length, allowed)
        if len(self._lengths("eval")) < QUARTERS:
            allowed = f"expected length + {QUARTERS * self.every} = {self.length + QUARTERS * self.every} or more"
            raise ConfigError("eval_length", self.eval_length, allowed)

    def _lengths(self, split: str) -> np.ndarray:
        first, last = (self.length, self.eval_length) if split == "eval" else (self.min_length, self.length)
        return np.arange(-(-first // self.every) * self.every, last + 1, self.every)

    @functools.cached_property
    def slices(self) -> tuple[str, ...]:
        return tuple(f"length={part[0]}-{part[-1]}" for part in np.array_split(self._lengths("eval"), QUARTERS))

    def labels(self, split: str) -> int:
        return 1

    @abc.abstractmethod
    def write(self, rng: np.random.Generator, lengths: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [n, most], of which the first `lengths` count, and answers [n]."""

    def sample(self, rng: np.random.Generator, rows: int, split: str) -> Sample:
        """meta: length int32 [n]."""
        allowed, most = self._lengths(split), self.eval_length if split == "eval" else self.length
        chosen = rng.integers(len(allowed), size=rows)
        lengths = allowed[chosen]
        tokens, answers = self.write(rng, lengths, most)
        inputs = np.where(np.arange(most) < lengths[:, None], tokens, 0).astype(np.int32)
        targets = np.full_like(inputs, IGNORE)
        targets[np.arange(rows), lengths - 1] = answers
        meta = {"length": lengths.astype(np.int32)}
        if split == "eval":
            parts = [len(part) for part in np.array_split(allowed, QUARTERS)]
            meta["slice"] = np.repeat(np.arange(QUARTERS), parts)[chosen].astype(np.int32)
        return {"inputs": inputs, "targets": targets, "meta": meta}


@dataclasses.dataclass(frozen=True)
class Parity(Ending):
    """Tokens 1 and 2; asked for is 1 + the number of 2s modulo 2."""

    @property
    def vocabulary(self) -> int:
        return 3

    def write(self, rng: np.random.Generator, lengths: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        bits = rng.integers(2, size=(len(lengths), most))
        return 1 + bits, 1 + (bits * (np.arange(most) < lengths[:, None])).sum(1) % 2
