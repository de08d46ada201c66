"""Arithmetic modulo 5, as in arXiv 2411.12537: an expression, `=`, and the answer is asked for.

flat      digits and + - ×, of which × binds tighter
brackets  expressions of + and - in brackets: d, -d, (d), (-d), (left op right), by length
"""

import dataclasses
from typing import ClassVar

import numpy as np

from hydrax.tasks.state_tracking import Ending

MODULUS = 5
PLUS, MINUS, TIMES, EQUALS, DIGIT, OPEN, CLOSE = 1, 2, 3, 4, 5, 10, 11  # DIGIT: that of 0


@dataclasses.dataclass(frozen=True)
class Arithmetic(Ending):
    """Digits between operations; with its `=`, an expression has an even number of tokens."""

    every: ClassVar[int] = 2

    @property
    def vocabulary(self) -> int:
        return DIGIT + MODULUS

    def write(self, rng: np.random.Generator, lengths: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        rows, n = len(lengths), most // 2
        digits, signs = rng.integers(MODULUS, size=(rows, n)), rng.integers(PLUS, EQUALS, size=(rows, n))
        signs[np.arange(rows), lengths // 2 - 1] = EQUALS
        tokens = np.zeros((rows, most), int)
        tokens[:, : 2 * n : 2], tokens[:, 1 : 2 * n : 2] = DIGIT + digits, signs
        # The value is total + term, where the term may still grow by ×.
        total, term, answers = np.zeros(rows, int), digits[:, 0], np.zeros(rows, int)
        for i in range(n):
            if i:
                before, digit = signs[:, i - 1], digits[:, i]
                total = np.where(before == TIMES, total, total + term)
                term = np.select([before == TIMES, before == MINUS], [term * digit, -digit], digit) % MODULUS
            answers = np.where(lengths // 2 == i + 1, total + term, answers)
        return tokens, DIGIT + answers % MODULUS


@dataclasses.dataclass(frozen=True)
class BracketArithmetic(Ending):
    """Whole expressions in brackets; lengths count the `=`."""

    @property
    def vocabulary(self) -> int:
        return CLOSE + 1

    def write(self, rng: np.random.Generator, lengths: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, answers = np.zeros((len(lengths), most), int), np.zeros(len(lengths), int)
        for row, length in enumerate(lengths.tolist()):
            text, value = expression(rng, length - 1)
            tokens[row, :length], answers[row] = [*text, EQUALS], DIGIT + value % MODULUS
        return tokens, answers


def expression(rng: np.random.Generator, length: int) -> tuple[list[int], int]:
    """Tokens of a random expression in brackets, and its value; the left part has 1 to length - 4 tokens."""
    if length < 5:
        value = int(rng.integers(MODULUS))
        digit = DIGIT + value
        forms = {1: [digit], 2: [MINUS, digit], 3: [OPEN, digit, CLOSE], 4: [OPEN, MINUS, digit, CLOSE]}
        return forms[length], value if length % 2 else -value
    first = int(rng.integers(1, length - 3))
    (left, a), (right, b) = expression(rng, first), expression(rng, length - 3 - first)
    plus = rng.random() < 0.5
    return [OPEN, *left, PLUS if plus else MINUS, *right, CLOSE], a + b if plus else a - b
