"""RULER in bytes (arXiv 2404.06654): needles in haystacks, chains of variables, common and frequent words.

The tasks, numbers of needles and counts of words are the paper's; the wording is this project's own and short. The
paper's budgets, 128, 30, 120 and 50 tokens of generation, are bytes here, and hold every answer.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from hydrax.core.build import ConfigError, Positive
from hydrax.tasks import haystack, words
from hydrax.tasks.text import Example, TextTask

SHORTEST = len("red-oak -> 1234567. ")  # the fewest bytes of a needle
Draw = Callable[[np.random.Generator, int], list[str]]


def numbers(rng: np.random.Generator, count: int) -> list[str]:
    """Different numbers of seven digits."""
    return [str(i) for i in rng.choice(9 * 10**6, count, replace=False) + 10**6]


def ids(rng: np.random.Generator, count: int) -> list[str]:
    """Numbers of 128 bits, in hexadecimal."""
    raw = rng.bytes(16 * count).hex()
    return [raw[32 * i : 32 * i + 32] for i in range(count)]


WIDTH: Mapping[Draw, int] = {  # bytes of the longest
    words.keys: 1 + max(map(len, words.ADJECTIVES)) + max(map(len, words.NOUNS)),
    numbers: 7,
    ids: 32,
}


class Variant(NamedTuple):
    """What the haystack is made of, how keys and values are drawn, and how many there are."""

    hay: Literal["noise", "essay", "needles"]
    key: Draw
    value: Draw
    keys: int = 1  # needles of different keys; as many as fit where the hay is needles
    values: int = 1  # needles of each key
    queries: int = 1  # keys that are asked for


VARIANTS: Mapping[str, Variant] = {
    "single_1": Variant("noise", words.keys, numbers),
    "single_2": Variant("essay", words.keys, numbers),
    "single_3": Variant("essay", words.keys, ids),
    "multikey_1": Variant("essay", words.keys, numbers, keys=4),
    "multikey_2": Variant("needles", words.keys, numbers),
    "multikey_3": Variant("needles", ids, ids),
    "multivalue": Variant("essay", words.keys, numbers, values=4),
    "multiquery": Variant("essay", words.keys, numbers, keys=4, queries=4),
}


@dataclasses.dataclass(frozen=True)
class Needle(TextTask):
    """Needles `key -> value.` in a haystack; the question `key -> ` is answered by the value.

    Several values of a key are answered in the order of the text, several keys (`a, b -> `) in that of the question.
    In an essay needles stand at different ones of 40 depths from 0 to 100 %, in noise anywhere, and needles which are
    all of the haystack are in random order.

    Attributes:
      essay: paths of the text files that the essay is made of; none: the standard library's documentation.
    """

    variant: Literal[
        "single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery"
    ] = "single_1"
    essay: tuple[str, ...] = ()

    @property
    def budget(self) -> int:
        return 128

    def __post_init__(self) -> None:
        super().__post_init__()
        pool = len(words.ADJECTIVES) * len(words.NOUNS)
        if self._variant.hay == "needles" and self._variant.key is words.keys and self.longest // SHORTEST > pool:
            most = SHORTEST * pool
            raise ConfigError("length", self.length, f"expected at most {most} with the largest of eval_factors")
        if self._variant.hay == "essay":
            haystack.essay(self.essay, self.longest)  # files are read now, so that they fail now

    @property
    def _variant(self) -> Variant:
        return VARIANTS[self.variant]

    @property
    def has_depth(self) -> bool:
        return self._variant.values == self._variant.queries == 1

    def labels(self, split: str) -> int:
        return self._variant.values * self._variant.queries * (WIDTH[self._variant.value] + 1) - 1

    @property
    def _question(self) -> int:
        """Bytes of the longest question and answer."""
        v = self._variant
        return v.queries * (WIDTH[v.key] + 2) + 2 + self.labels("train")

    @property
    def least(self) -> int:
        v = self._variant
        needle = WIDTH[v.key] + WIDTH[v.value] + len(" -> . ")
        return 1 + v.keys * v.values * needle + self._question

    def example(self, rng: np.random.Generator, room: int) -> Example:
        v = self._variant
        names = v.key(rng, room // SHORTEST if v.hay == "needles" else v.keys)
        order = [names[i // v.values] for i in rng.permutation(len(names) * v.values)]
        pairs = list(zip(order, v.value(rng, len(order)), strict=True))
        context, depths = self._bury(rng, pairs, room - 1 - self._question)
        pairs = pairs[: len(depths)]
        kept = list(dict.fromkeys(key for key, _ in pairs))
        asked = [kept[i] for i in rng.permutation(len(kept))[: v.queries]]
        replies = [value.encode() for name in asked for key, value in pairs if key == name]
        place = next(i for i, (key, _) in enumerate(pairs) if key == asked[0])
        question = (", ".join(asked) + " -> ").encode()
        return Example(context, question, b" ".join(replies), tuple(replies), float(depths[place]))

    def _bury(self, rng: np.random.Generator, pairs: Sequence[tuple[str, str]], room: int) -> tuple[bytes, np.ndarray]:
        """A context of at most `room` bytes with needles in the order given, and the depth of each that is in it."""
        needles = [f"{key} -> {value}.".encode() for key, value in pairs]
        if self._variant.hay == "needles":
            ends = np.cumsum([len(needle) + 1 for needle in needles])
            fits = int(np.searchsorted(ends, room + 1, side="right"))
            return b" ".join(needles[:fits]), np.arange(fits) / fits
        if self._variant.hay == "essay":
            hay, depths = haystack.essay(self.essay, self.longest), rng.choice(40, len(needles), replace=False) / 39
        else:
            hay, depths = haystack.noise(self.longest), rng.random(len(needles))
        return hay.around(rng, needles, np.sort(depths), room)


@dataclasses.dataclass(frozen=True)
class Variables(TextTask):
    """Chains `VAR A = 12345.`, `VAR B = VAR A.` and so on, in noise: which variables have the value?

    The answer is the names of that chain in its order, which is the order of the text.

    Attributes:
      chains: chains of different names and values, of which one is asked for.
      hops: assignments after the first in each chain.
    """

    chains: Positive = 1
    hops: Positive = 4

    @property
    def budget(self) -> int:
        return 6 * (self.hops + 1)

    def labels(self, split: str) -> int:
        return self.budget - 1

    @property
    def has_depth(self) -> bool:
        return False

    @property
    def least(self) -> int:
        statements = self.chains * (self.hops + 1) * len("VAR ABCDE = VAR FGHIJ. ")
        return 1 + statements + len("Variables with the value 12345: ") + self.labels("train")

    def example(self, rng: np.random.Generator, room: int) -> Example:
        names = _names(rng, self.chains * (self.hops + 1)).reshape(self.chains, -1)
        values = rng.choice(90_000, self.chains, replace=False) + 10_000
        heads = np.array([f"{value}" for value in values])[:, None]
        sources = np.concatenate([heads, np.char.add("VAR ", names[:, :-1])], axis=1)
        places = np.sort(rng.random(names.shape), axis=1)  # each chain in its order, chains mixed
        order = np.argsort(places, axis=None)
        needles = [f"VAR {names.flat[i]} = {sources.flat[i]}.".encode() for i in order]
        question = f"Variables with the value {values[0]}: ".encode()
        answer = " ".join(names[0]).encode()
        left = room - 1 - len(question) - len(answer)
        context, _ = haystack.noise(self.longest).around(rng, needles, places.flat[order], left)
        return Example(context, question, answer, tuple(answer.split()))


def _names(rng: np.random.Generator, count: int) -> np.ndarray:
    """Different names of five capital letters."""
    codes = rng.choice(26**5, count, replace=False)[:, None] // 26 ** np.arange(5) % 26
    return np.array([bytes(code + ord("A")).decode() for code in codes.astype(np.uint8)])


@dataclasses.dataclass(frozen=True)
class CommonWords(TextTask):
    """A numbered list in which some words come up often and all others seldom: which are the former?

    Often and seldom are 30 and 3 times; 6 times and once in rows below 4096, or too short for so many. The answer has
    the common words in the order of their first appearance.
    """

    length: Positive = 1024
    common: Positive = 10  # words that come up often

    @property
    def budget(self) -> int:
        return 12 * self.common

    def labels(self, split: str) -> int:
        return 7 * self.common - 1

    @property
    def has_depth(self) -> bool:
        return False

    @property
    def least(self) -> int:
        entries = 6 * self.common + self.common  # as many words that are not common, at least
        return 1 + int(_ends(entries)[-1]) - 1 + self._question

    @property
    def _question(self) -> int:
        return len(self._ask) + self.labels("train")

    @property
    def _ask(self) -> bytes:
        return f"The {self.common} most common words: ".encode()

    def example(self, rng: np.random.Generator, room: int) -> Example:
        often, seldom = (30, 3) if room >= 4096 and self._fits(room) > 33 * self.common else (6, 1)
        others = (self._fits(room) - often * self.common) // seldom
        chosen = words.coined(rng, self.common + others)
        listed = np.repeat(chosen, [often] * self.common + [seldom] * others)
        listed = rng.permutation(listed).tolist()
        context = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)).encode()
        common = set(chosen[: self.common])
        answer = " ".join(word for word in dict.fromkeys(listed) if word in common).encode()
        return Example(context, self._ask, answer, tuple(answer.split()))

    def _fits(self, room: int) -> int:
        """Entries in a row of `room` tokens."""
        return int(np.searchsorted(_ends(room), room - 1 - self._question + 1, side="right"))


@functools.cache
def _ends(count: int) -> np.ndarray:
    """Where entries of the numbered list end, each with a space after it."""
    return np.cumsum([len(f"{i}. ") + 7 for i in range(1, count + 1)])


@dataclasses.dataclass(frozen=True)
class FrequentWords(TextTask):
    """Coined words in random order, the k-th of them floor(N k^-2 / ζ(2)) times of N: which lead?

    The first is written `...` and does not count; the answer is the second, third and fourth. The vocabulary has a
    word per 50 tokens of the row.
    """

    ask: ClassVar[bytes] = b"The three most frequent words: "

    @property
    def budget(self) -> int:
        return 50

    def labels(self, split: str) -> int:
        return 20  # three words of six letters

    @property
    def has_depth(self) -> bool:
        return False

    @property
    def least(self) -> int:
        return next(room for room in range(250, 1000) if len(set(self._counts(room)[:5])) == 5)

    def example(self, rng: np.random.Generator, room: int) -> Example:
        counts = self._counts(room)
        coined = words.coined(rng, len(counts))
        listed = np.repeat(["...", *coined[1:]], counts)
        context = " ".join(rng.permutation(listed).tolist()).encode()
        answer = " ".join(coined[1:4]).encode()
        return Example(context, self.ask, answer, tuple(answer.split()))

    def _counts(self, room: int) -> np.ndarray:
        """How often each word comes, most frequent first, in the most words that fit into a row of `room` tokens."""
        rank = np.arange(1, max(5, room // 50) + 1)
        share = 6 / (np.pi * rank) ** 2
        size = np.where(rank == 1, 4, 7)
        left = room - 1 - len(self.ask) - self.labels("train") + 1
        most = bisect.bisect_right(range(room), left, key=lambda n: int((n * share).astype(int) @ size)) - 1
        return (most * share).astype(int)
