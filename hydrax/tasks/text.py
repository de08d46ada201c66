"""Tasks in bytes: a context, a question about it, an answer of which every byte is asked for.

A row is  BOS context SEP question answer PAD ...;  what a causal model must say is the answer, each byte after all
before it. Questions hold all that comes before the answer, blanks too, and answers end by themselves (fixed length or
a full stop) so that EOS, which is reserved, need not be asked for: labels that are constants would flatter accuracy.

A text that a model generated after the prompt is scored by whether it holds the reference answers (`score`).
"""

import abc
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hydrax.core.build import ConfigError, NonNegative, Positive
from hydrax.tasks.base import IGNORE, Sample, Task

PAD, BOS, EOS, SEP = 256, 257, 258, 259  # after the 256 bytes
VOCABULARY = 260
DEPTHS = 10  # bins of equal width, from the context's beginning to its end


class Example(NamedTuple):
    """One row before it is packed. Depth is where in the context the answer stands, from 0 to 1, if at one place."""

    context: bytes
    question: bytes
    answer: bytes
    references: tuple[bytes, ...]
    depth: float | None = None

    @property
    def tokens(self) -> int:
        """Those a model reads to say all of the answer: BOS, SEP and all bytes but the last."""
        return len(self.context) + len(self.question) + len(self.answer) + 1


def pack(examples: Sequence[Example], length: int) -> Sample:
    """A sample [n, T = length] of examples of at most `length` tokens.

    meta: prompt_length int32 [n], tokens up to the answer (BOS and SEP too); answer bytes [n]; references bytes [n,R],
    empty where a row has fewer.
    """
    row = np.full((len(examples), length + 1), PAD, np.int32)
    asked = np.zeros(row.shape, bool)
    prompts = np.empty(len(examples), np.int32)
    for i, example in enumerate(examples):
        text = example.context + b"\0" + example.question + example.answer
        row[i, 0] = BOS
        row[i, 1 : len(text) + 1] = np.frombuffer(text, np.uint8)
        row[i, 1 + len(example.context)] = SEP
        prompts[i] = len(text) + 1 - len(example.answer)
        asked[i, prompts[i] : len(text) + 1] = True
    most = max(len(example.references) for example in examples)
    references = [example.references + (b"",) * (most - len(example.references)) for example in examples]
    return {
        "inputs": row[:, :-1],
        "targets": np.where(asked, row, IGNORE)[:, 1:],
        "meta": {
            "prompt_length": prompts,
            "answer": np.array([example.answer for example in examples]),
            "references": np.array(references),
        },
    }


def decode(tokens: Iterable[int]) -> str:
    """Tokens as text: SEP is a line break, other special tokens are nothing."""
    raw = bytes(10 if token == SEP else token for token in tokens if token < 256 or token == SEP)
    return raw.decode(errors="replace")


def score(text: str, references: Iterable[bytes], *, any_of: bool = False) -> float:
    """The fraction of the references which the text contains whatever their case, or whether it has any of them."""
    found = [reference.decode().lower() in text.lower() for reference in references if reference]
    return float(any(found)) if any_of else sum(found) / len(found)


@dataclasses.dataclass(frozen=True)
class TextTask(Task):
    """A task in bytes at chosen lengths: short rows to train on, T to 8T to see what is left of it.

    Training rows have lengths uniform from `min_length`, or the least the task needs, to `length`; evaluation rows
    one of `eval_factors` times `length`, each a slice, divided further by depth where the answer stands at one place.
    A length counts BOS, SEP and all bytes but the last.
    """

    length: Positive = 512
    min_length: NonNegative = 0  # of training rows; 0: the least that the task needs
    eval_factors: tuple[Positive, ...] = (1, 2, 4, 8)  # lengths of evaluation rows over `length`; each is a slice

    def __post_init__(self) -> None:
        if self.length < self.least:
            raise ConfigError("length", self.length, f"expected at least {self.least} for this task")
        if self.min_length > self.length:
            raise ConfigError("min_length", self.min_length, f"expected at most length = {self.length}")
        if not self.eval_factors or len(set(self.eval_factors)) < len(self.eval_factors):
            raise ConfigError("eval_factors", self.eval_factors, "expected one or more different factors of length")

    @property
    @abc.abstractmethod
    def least(self) -> int:
        """The shortest row that any example fits into."""

    @property
    @abc.abstractmethod
    def budget(self) -> int:
        """Bytes to generate for an answer."""

    @property
    def has_depth(self) -> bool:
        """Whether every example's answer stands at one place of its context."""
        return True

    @abc.abstractmethod
    def example(self, rng: np.random.Generator, room: int) -> Example:
        """An example of at most `room` tokens, and not many fewer."""

    def score(self, text: str, references: Iterable[bytes]) -> float:
        """What a generated text is worth, from 0 to 1."""
        return score(text, references)

    @property
    def vocabulary(self) -> int:
        return VOCABULARY

    @functools.cached_property
    def slices(self) -> tuple[str, ...]:
        lengths = [f"length={factor * self.length}" for factor in self.eval_factors]
        if not self.has_depth:
            return tuple(lengths)
        bins = [f"depth={100 * i // DEPTHS}-{100 * (i + 1) // DEPTHS}%" for i in range(DEPTHS)]
        return tuple(f"{length},{depth}" for length in lengths for depth in bins)

    @property
    def longest(self) -> int:
        """Tokens of the longest row of either split."""
        return self.length * max(1, *self.eval_factors)

    def sample(self, rng: np.random.Generator, rows: int, split: str) -> Sample:
        if split == "train":
            rooms = rng.integers(max(self.min_length, self.least), self.length, rows, endpoint=True)
            return pack([self.example(rng, int(room)) for room in rooms], self.length)
        chosen = rng.integers(len(self.eval_factors), size=rows)
        rooms = self.length * np.array(self.eval_factors)[chosen]
        examples = [self.example(rng, int(room)) for room in rooms]
        sample = pack(examples, self.length * max(self.eval_factors))
        if self.has_depth:
            depth = np.array([example.depth for example in examples])
            sample["meta"]["depth"] = depth
            chosen = chosen * DEPTHS + np.minimum((depth * DEPTHS).astype(int), DEPTHS - 1)
        sample["meta"]["slice"] = chosen.astype(np.int32)
        return sample
