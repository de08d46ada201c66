"""Passkey retrieval (arXiv 2305.16300): a number of five digits, said once in text that repeats itself."""

import dataclasses

import numpy as np

from hydrax.tasks import haystack
from hydrax.tasks.text import Example, TextTask

NEEDLE = "The pass key is {key}. Remember it: {key} is the pass key."
QUESTION = b"What is the pass key? The pass key is "


@dataclasses.dataclass(frozen=True)
class Passkey(TextTask):
    """Filler sentences repeated, among them the pass key at a uniform depth; the question stands at the end."""

    @property
    def budget(self) -> int:
        return 5

    def labels(self, split: str) -> int:
        return self.budget

    @property
    def least(self) -> int:
        return 1 + len(NEEDLE.format(key=10_000)) + len(QUESTION) + 5

    def example(self, rng: np.random.Generator, room: int) -> Example:
        key = b"%d" % rng.integers(10_000, 100_000)
        needle = NEEDLE.format(key=key.decode()).encode()
        left = room - 1 - len(QUESTION) - len(key)
        context, depths = haystack.noise(self.longest).around(rng, [needle], rng.random(1), left)
        return Example(context, QUESTION, key, (key,), float(depths[0]))
