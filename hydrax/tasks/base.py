"""What a task is: rows of tokens, and what a causal model should say at some of them."""

import abc
import dataclasses
import hashlib
import zlib
from typing import Literal, TypedDict

import numpy as np

IGNORE = -1  # a target where nothing is asked
BLOCK = 1024
"""Rows made by one random generator. Which process needs them does not matter to it."""

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")


class Sample(TypedDict):
    """Rows of one length T, with `targets[:, t]` what a causal model must say after reading `inputs[:, :t+1]`.

    meta holds arrays [n, ...] of whatever else is known about the rows; `slice`, if it is there, is an index into the
    task's `slices`.
    """

    inputs: np.ndarray  # int32 [n,T]
    targets: np.ndarray  # int32 [n,T]
    meta: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A generator of samples. The fields of a task are its options."""

    @property
    @abc.abstractmethod
    def vocabulary(self) -> int:
        """How many token ids there are."""

    @property
    def slices(self) -> tuple[str, ...]:
        """Names of the parts of the evaluation data that accuracy is also reported for."""
        return ()

    def labels(self, split: str) -> int | None:
        """How many targets a row has at most, if that is worth knowing: then logits are made for these alone."""
        return None

    @abc.abstractmethod
    def sample(self, rng: np.random.Generator, rows: int, split: str) -> Sample:
        """That many rows of the split `train` or `eval`; the latter may be longer and harder."""


def block(task: Task, name: str, *, seed: int, split: Split, number: int) -> Sample:
    """Rows number * BLOCK to (number + 1) * BLOCK - 1 of the endless split of a task: a function of the arguments."""
    entropy = [seed, zlib.crc32(name.encode()), SPLITS.index(split), number]
    return task.sample(np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy))), BLOCK, split)


def sha256(sample: Sample) -> str:
    """Over shape, inputs and targets, the same on every machine."""
    arrays = [sample[name].astype("<i4") for name in ("inputs", "targets")]
    digest = hashlib.sha256(repr(arrays[0].shape).encode())
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()


def overlap(rows: Sample, others: Sample) -> float:
    """The share of `rows` whose inputs are exactly those of one of `others`."""
    if rows["inputs"].shape[1] != others["inputs"].shape[1]:
        return 0.0
    seen = {row.tobytes() for row in others["inputs"].astype("<i4")}
    return float(np.mean([row.tobytes() in seen for row in rows["inputs"].astype("<i4")]))


def distinct(rng: np.random.Generator, rows: int, count: int, size: int) -> np.ndarray:
    """int64 [rows, count]: ordered choices of `count` different numbers below `size`, all equally likely.

    What repeats an earlier number of its row is drawn anew. Names of numbers play no part in that, so no choice is
    preferred.
    """
    if 2 * count > size:
        return np.argsort(rng.random((rows, size)), axis=1)[:, :count]
    chosen = rng.integers(size, size=(rows, count))
    open_rows = np.arange(rows)
    while open_rows.size:
        part = chosen[open_rows]
        order = np.argsort(part, axis=1, kind="stable")
        ranked = np.take_along_axis(part, order, 1)
        repeats = np.zeros(part.shape, bool)
        np.put_along_axis(repeats, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], 1)
        part[repeats] = rng.integers(size, size=int(repeats.sum()))
        chosen[open_rows] = part
        open_rows = open_rows[repeats.any(1)]
    return chosen
