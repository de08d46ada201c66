"""Induction: what came after this the last time? As a repeated segment, and as one trigger (arXiv 2312.00752 §4.1.2).

repeat   BOS s s           asked for is the second s, but not its first token: nothing says how long s is
trigger  ... p v ... p     asked for is v
"""

import dataclasses
import functools
from typing import Literal

import numpy as np

from hydrax.core.build import ConfigError, NonNegative, Positive
from hydrax.tasks.base import IGNORE, Sample, Task

PAD, BOS, TRIGGER, FIRST = 0, 1, 2, 3  # symbols come from FIRST on


@dataclasses.dataclass(frozen=True)
class Induction(Task):
    """Segments s of different symbols, so that each decides the next; or symbols with repetition around one p v.

    Training rows have lengths uniform from `min_length` to `length`, evaluation rows `eval_factors` times `length`,
    each a slice; shorter ones are padded at the end. A segment takes half of that length.

    Attributes:
      form: repeat or trigger, as above.
      length: T of training rows.
      symbols: how many there are. A repeated segment needs as many as half of the longest evaluation row.
    """

    form: Literal["repeat", "trigger"] = "repeat"
    length: Positive = 64
    min_length: NonNegative = 4
    eval_factors: tuple[Positive, ...] = (1, 2, 4, 8)
    symbols: Positive = 256

    def __post_init__(self) -> None:
        if not 4 <= self.min_length <= self.length:
            raise ConfigError("min_length", self.min_length, f"expected 4 to length = {self.length}")
        if not self.eval_factors or len(set(self.eval_factors)) < len(self.eval_factors):
            raise ConfigError("eval_factors", self.eval_factors, "expected one or more different factors of length")
        least = self.length * max(self.eval_factors) // 2
        if self.form == "repeat" and self.symbols < least:
            raise ConfigError("symbols", self.symbols, f"expected at least {least}, half of the longest row")

    def labels(self, split: str) -> int:
        longest = self.length * (1 if split == "train" else max(self.eval_factors))
        return 1 if self.form == "trigger" else longest // 2 - 1

    @property
    def vocabulary(self) -> int:
        return FIRST + self.symbols

    @functools.cached_property
    def slices(self) -> tuple[str, ...]:
        return tuple(f"length={factor * self.length}" for factor in self.eval_factors)

    def sample(self, rng: np.random.Generator, rows: int, split: str) -> Sample:
        """meta: length int32 [n], tokens of each row that are not padding."""
        if split == "train":
            longest = self.length
            lengths = rng.integers(self.min_length, self.length, rows, endpoint=True)
        else:
            longest = self.length * max(self.eval_factors)
            chosen = rng.integers(len(self.eval_factors), size=rows)
            lengths = self.length * np.array(self.eval_factors)[chosen]
        make = {"repeat": self._repeat, "trigger": self._trigger}[self.form]
        inputs, targets, lengths = make(rng, lengths, longest)
        meta = {"length": lengths.astype(np.int32)}
        if split != "train":
            meta["slice"] = chosen.astype(np.int32)
        return {"inputs": inputs.astype(np.int32), "targets": targets.astype(np.int32), "meta": meta}

    def _repeat(
        self, rng: np.random.Generator, lengths: np.ndarray, longest: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        segment = lengths[:, None] // 2
        order = rng.permuted(np.tile(np.arange(self.symbols), (len(lengths), 1)), axis=1)
        index = np.arange(longest + 1) - 1  # of the token within s s, after BOS
        tokens = FIRST + np.take_along_axis(order, np.maximum(index, 0) % segment, 1)
        row = np.where(index < 0, BOS, np.where(index < 2 * segment, tokens, PAD))
        asked = (index > segment) & (index < 2 * segment)
        # A model reads 2m tokens: the last of the second s is only asked for.
        inputs = np.where(index[:-1] + 1 < 2 * segment, row[:, :-1], PAD)
        return inputs, np.where(asked, row, IGNORE)[:, 1:], 2 * segment[:, 0]

    def _trigger(
        self, rng: np.random.Generator, lengths: np.ndarray, longest: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        inputs = FIRST + rng.integers(self.symbols, size=(len(lengths), longest))
        rows, last = np.arange(len(lengths)), lengths - 1
        place = rng.integers(lengths - 2)  # p v ends before the last token
        inputs[rows, place] = inputs[rows, last] = TRIGGER
        inputs[np.arange(longest) > last[:, None]] = PAD
        targets = np.full(inputs.shape, IGNORE)
        targets[rows, last] = inputs[rows, place + 1]
        return inputs, targets, lengths
