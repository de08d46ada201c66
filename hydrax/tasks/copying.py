"""Copying and lookup of strings of letters (arXiv 2402.01032).

    copy    $ x | x .
    prefix  $ g | x | y .      g three letters in a row that occur once in x, y the letters of x that follow them
    suffix  $ x | g y .        likewise, g after x

Asked for is what no earlier token decides: the second x, y, and the full stop after them. Training rows are packed
with as many examples as fit; the one that the row's end cuts off is not asked for. Evaluation rows hold one example.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from hydrax.core.build import ConfigError, Positive
from hydrax.tasks.base import IGNORE, Sample, Task


class Part(NamedTuple):
    """A stretch of an example: one of the signs, or letters of the string."""

    source: Literal["begin", "bar", "stop", "string", "gram", "rest"]
    asked: bool = False


X, G, BEGIN, BAR = Part("string"), Part("gram"), Part("begin"), Part("bar")
LAYOUTS: Mapping[str, tuple[Part, ...]] = {
    "copy": (BEGIN, X, BAR, Part("string", True), Part("stop", True)),
    "prefix": (BEGIN, G, BAR, X, BAR, Part("rest", True), Part("stop", True)),
    "suffix": (BEGIN, X, BAR, G, Part("rest", True), Part("stop", True)),
}


@dataclasses.dataclass(frozen=True)
class Copying(Task):
    """Tokens are the letters from 0 on, then `$`, `|`, `.` and `*`, which pads.

    Attributes:
      form: copy, prefix or suffix, as above.
      length: T of training rows.
      shortest, longest: letters of a training string, uniform from the one to the other.
      eval_factors: letters of an evaluation string over `longest`; each is a slice.
      alphabet: letters there are.
      gram: letters of g.
      answer: letters of y at most; none: all that follow.
    """

    form: Literal["copy", "prefix", "suffix"] = "copy"
    length: Positive = 220
    shortest: Positive = 5
    longest: Positive = 20
    eval_factors: tuple[Positive, ...] = (1, 2, 4, 10)
    alphabet: Positive = 26
    gram: Positive = 3
    answer: Positive | None = None

    def __post_init__(self) -> None:
        least = 1 if self.form == "copy" else self.gram + 1
        if not least <= self.shortest <= self.longest:
            raise ConfigError("shortest", self.shortest, f"expected {least} to longest = {self.longest} letters")
        if not self.eval_factors or len(set(self.eval_factors)) < len(self.eval_factors):
            raise ConfigError("eval_factors", self.eval_factors, "expected one or more different factors of longest")
        if self.form != "copy" and self.alphabet**self.gram < self._longest("eval"):
            allowed = f"expected as many grams as letters in the longest string, {self._longest('eval')}, or more"
            raise ConfigError("gram", self.gram, allowed)
        if self.length < self._tokens(self.longest) - 1:
            raise ConfigError("length", self.length, f"expected at least {self._tokens(self.longest) - 1} for longest")

    @property
    def vocabulary(self) -> int:
        return self.alphabet + 4

    @functools.cached_property
    def slices(self) -> tuple[str, ...]:
        return tuple(f"letters={factor * self.longest}" for factor in self.eval_factors)

    def sample(self, rng: np.random.Generator, rows: int, split: str) -> Sample:
        """meta: letters int32 [n,E], of each example in a row, and where its g begins, start int32 [n,E]."""
        if split == "train":
            tokens = self.length + 1
            examples = -(-tokens // self._tokens(self.shortest, short=True))
            letters = rng.integers(self.shortest, self.longest, (rows, examples), endpoint=True)
        else:
            tokens = self._tokens(self._longest(split))
            chosen = rng.integers(len(self.eval_factors), size=rows)
            letters = self.longest * np.array(self.eval_factors)[chosen][:, None]
        strings, start = self._strings(rng, letters)
        row, asked = self._lay_out(strings, letters, start, tokens)
        meta = {"letters": letters.astype(np.int32), "start": start.astype(np.int32)}
        if split != "train":
            meta["slice"] = chosen.astype(np.int32)
        return {"inputs": row[:, :-1], "targets": np.where(asked, row, IGNORE)[:, 1:], "meta": meta}

    def _longest(self, split: str) -> int:
        return self.longest * (1 if split == "train" else max(self.eval_factors))

    def _tokens(self, letters: int, *, short: bool = False) -> int:
        """Tokens of an example, with the longest answer it can have or the shortest."""
        answer = 1 if short else min(self.answer or letters, letters - self.gram)
        size = {"string": letters, "gram": self.gram, "rest": answer}
        return sum(size.get(part.source, 1) for part in LAYOUTS[self.form])

    def _strings(self, rng: np.random.Generator, letters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Random strings [n,E,longest], and where in each a gram begins that occurs once and is followed by letters."""
        strings = rng.integers(self.alphabet, size=(*letters.shape, int(letters.max())))
        start = np.zeros(letters.shape, int)
        again = np.full(letters.shape, self.form != "copy")
        while again.any():  # a string without such a gram is drawn anew
            fits = np.arange(strings.shape[2] - self.gram) < letters[again][:, None] - self.gram
            once = occurring_once(strings[again], letters[again], self.gram)[:, :-1] & fits
            start[again] = np.where(once, rng.random(once.shape), -1.0).argmax(1)
            again[again] = ~once.any(1)
            strings[again] = rng.integers(self.alphabet, size=(int(again.sum()), strings.shape[2]))
        return strings, start

    def _lay_out(
        self, strings: np.ndarray, letters: np.ndarray, start: np.ndarray, tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows [n,tokens] of examples one after another, and which tokens are asked for."""
        rows, examples, width = strings.shape
        signs = np.broadcast_to(self.alphabet + np.arange(3), (rows, examples, 3))
        source = np.concatenate([strings, signs], axis=2)
        first, size = self._stretches(letters, start, width)
        ends = size.reshape(rows, -1).cumsum(1).reshape(size.shape)
        whole = (ends[:, :, -1:] <= tokens) & np.array([part.asked for part in LAYOUTS[self.form]])
        # A line for each token of each stretch: the stretch it is of, its number there, and its place in the row.
        stretch = np.repeat(np.arange(size.size), size.ravel())
        inside = np.arange(len(stretch)) - np.repeat(size.cumsum() - size.ravel(), size.ravel())
        place = (ends - size).ravel()[stretch] + inside
        stretch, inside, place = (x[place < tokens] for x in (stretch, inside, place))
        row, example, _ = np.unravel_index(stretch, size.shape)
        text = np.full((rows, tokens), self.alphabet + 3, np.int32)
        text[row, place] = source[row, example, first.ravel()[stretch] + inside]
        asked = np.zeros((rows, tokens), bool)
        asked[row, place] = whole.ravel()[stretch]
        return text, asked

    def _stretches(self, letters: np.ndarray, start: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the parts of each example begin in `width` letters and three signs, and their sizes: [n,E,parts]."""
        rest = letters - start - self.gram
        found = {
            "begin": (width, 1),
            "bar": (width + 1, 1),
            "stop": (width + 2, 1),
            "string": (0, letters),
            "gram": (start, self.gram),
            "rest": (start + self.gram, rest if self.answer is None else np.minimum(rest, self.answer)),
        }
        parts = [found[part.source] for part in LAYOUTS[self.form]]
        first, size = (
            np.stack([np.broadcast_to(x, letters.shape) for x in half], 2) for half in zip(*parts, strict=True)
        )
        return first, size


def occurring_once(strings: np.ndarray, letters: np.ndarray, gram: int) -> np.ndarray:
    """Which grams of strings [n,W], of which the first letters [n] count, occur once: bool [n, W - gram + 1]."""
    windows = np.lib.stride_tricks.sliding_window_view(strings, gram, axis=1)
    code = windows @ (int(strings.max(initial=0)) + 1) ** np.arange(gram)
    beyond = np.arange(code.shape[1]) > letters[:, None] - gram
    code = np.where(beyond, -1, code)
    order = np.argsort(code, axis=1, kind="stable")
    ranked = np.take_along_axis(code, order, 1)
    same = ranked[:, 1:] == ranked[:, :-1]
    no = np.zeros((len(code), 1), bool)
    once = np.empty(code.shape, bool)
    np.put_along_axis(once, order, ~(np.concatenate([same, no], 1) | np.concatenate([no, same], 1)), 1)
    return once & ~beyond
