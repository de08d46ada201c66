"""State tracking: word problems of finite groups, of which parity is the smallest (arXiv 2411.12537, 2404.08819).

A word x_1 .. x_T of group elements has, after each of its letters, the answer

    p_t = p_{t-1} · x_t,      p_0 = the identity.

Tokens and targets are 1 + the number of the element; 0 is padding. The answer to a word is asked for at its last
letter and, as in the word problems of the paper, at every letter before: the answers to its beginnings. Letters are
drawn independently and uniformly.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import numpy as np

from hydrax.core.build import ConfigError

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


TABLE: Mapping[str, Callable[[], WordProblem]] = {
    "parity": lambda: cyclic(2),
    "mod5": lambda: cyclic(5),
    "s3": lambda: symmetric(3),
    "s5": lambda: symmetric(5),
    "s5_swaps": lambda: symmetric(5, moved=2),
}


def word_problem(name: str) -> WordProblem:
    """The word problem of that name.

    Raises:
      ConfigError: there is none.
    """
    if name not in TABLE:
        raise ConfigError("task", name, f"expected one of {', '.join(TABLE)}")
    return TABLE[name]()
