"""Phonebook (arXiv 2402.01032): look up a number by a name after two examples of doing so."""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np

from hydrax.core.build import ConfigError, Positive
from hydrax.tasks.base import Sample, Task
from hydrax.tasks.text import VOCABULARY, Example, pack
from hydrax.tasks.words import FIRST_NAMES, LAST_NAMES

SHOTS = 2
LINE = max(map(len, FIRST_NAMES)) + max(map(len, LAST_NAMES)) + len(" : 6123456789\n")  # bytes of the longest


@dataclasses.dataclass(frozen=True)
class Phonebook(Task):
    """Lines `Name: d1...d10` of different names, two of them again, then `Name: ` of a third.

    Numbers have ten digits of which the first is 6 to 9. A blank line stands on either side of the two examples. The
    book has a number of entries drawn from `entries`, or `eval_entries`, each of which is a slice of evaluation.

    Attributes:
      length: T of training rows.
    """

    length: Positive = 1024
    entries: tuple[Positive, ...] = (20,)  # lines of training books
    eval_entries: tuple[Positive, ...] = (20, 50, 100, 200, 500)  # of evaluation books; each is a slice

    def __post_init__(self) -> None:
        names = len(FIRST_NAMES) * len(LAST_NAMES)
        for key, sizes in (("entries", self.entries), ("eval_entries", self.eval_entries)):
            if not sizes or min(sizes) <= SHOTS or max(sizes) > names or len(set(sizes)) < len(sizes):
                raise ConfigError(key, sizes, f"expected one or more different numbers from {SHOTS + 1} to {names}")
        if self.length < _tokens(max(self.entries)):
            raise ConfigError("length", self.length, f"expected at least {_tokens(max(self.entries))} for the entries")

    def labels(self, split: str) -> int:
        return self.budget

    @property
    def vocabulary(self) -> int:
        return VOCABULARY

    @property
    def budget(self) -> int:
        """Bytes to generate for an answer."""
        return 10

    @functools.cached_property
    def slices(self) -> tuple[str, ...]:
        return tuple(f"entries={size}" for size in self.eval_entries)

    def sample(self, rng: np.random.Generator, rows: int, split: str) -> Sample:
        sizes = self.entries if split == "train" else self.eval_entries
        chosen = rng.integers(len(sizes), size=rows)
        length = self.length if split == "train" else _tokens(max(sizes))
        sample = pack([_example(rng, sizes[i]) for i in chosen], length)
        sample["meta"]["entries"] = np.array(sizes, np.int32)[chosen]
        if split == "eval":
            sample["meta"]["slice"] = chosen.astype(np.int32)
        return sample

    def score(self, text: str, references: Iterable[bytes]) -> float:
        """Whether a generated text begins with the number."""
        return float(text.lstrip().startswith(tuple(reference.decode() for reference in references)))


def _tokens(entries: int) -> int:
    """Tokens of the longest row with so many entries: BOS, the book, two shots, two blank lines, the question."""
    return 1 + (entries + SHOTS + 1) * LINE + 2


def _example(rng: np.random.Generator, entries: int) -> Example:
    names = rng.choice(len(FIRST_NAMES) * len(LAST_NAMES), entries, replace=False).tolist()
    numbers = rng.integers(6 * 10**9, 10**10, entries).tolist()
    book = [
        b"%s %s: %d\n" % (FIRST_NAMES[i // len(LAST_NAMES)].encode(), LAST_NAMES[i % len(LAST_NAMES)].encode(), number)
        for i, number in zip(names, numbers, strict=True)
    ]
    *shots, asked = rng.choice(entries, SHOTS + 1, replace=False)
    question, answer = book[asked][:-11], book[asked][-11:-1]
    return Example(b"".join(book) + b"\n" + b"".join(book[i] for i in shots), question, answer, (answer,))
