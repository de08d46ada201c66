"""What the replay tests share: the labels of a row, text tasks read as text, and how right an answerer is."""

import numpy as np

from hydrax.tasks.base import IGNORE
from hydrax.tasks.text import BOS, PAD, SEP


def draw(task, rows=64, split="train", seed=0):
    """A sample, checked for what every task promises."""
    sample = task.sample(np.random.default_rng(seed), rows, split)
    inputs, targets, meta = sample["inputs"], sample["targets"], sample["meta"]
    assert inputs.dtype == targets.dtype == np.int32 and inputs.shape == targets.shape and len(inputs) == rows
    assert inputs.min() >= 0 and inputs.max() < task.vocabulary and targets.max() < task.vocabulary
    assert (targets >= 0).any(1).all() and targets.min() == IGNORE
    assert all(isinstance(value, np.ndarray) and len(value) == rows for value in meta.values())
    most = task.labels(split)
    assert most is None or (targets >= 0).sum(1).max() <= most
    if split == "train":
        assert inputs.shape[1] == task.length
    if "slice" in meta:
        assert meta["slice"].dtype == np.int32 and meta["slice"].min() >= 0
        assert meta["slice"].max() < len(task.slices)
    again = task.sample(np.random.default_rng(seed), rows, split)
    assert (again["inputs"] == inputs).all() and (again["targets"] == targets).all()
    return sample


def labels(targets):
    """{position: token} of a row."""
    return {int(t): int(targets[t]) for t in np.flatnonzero(targets != IGNORE)}


def texts(sample):
    """Context, question, labelled answer of each row of a task in bytes; its frame is checked."""
    for row, targets, prompt, answer in zip(
        sample["inputs"], sample["targets"], sample["meta"]["prompt_length"], sample["meta"]["answer"], strict=True
    ):
        end = prompt + len(answer)
        (sep,) = np.flatnonzero(row == SEP)
        assert row[0] == BOS and (np.delete(row[:end], [0, sep]) < 256).all() and (row[end:] == PAD).all()
        asked = labels(targets)
        assert sorted(asked) == list(range(prompt - 1, end - 1)) and bytes(asked.values()) == answer
        assert bytes(row[prompt:end].tolist()) == answer[: len(row) - prompt]  # it is read as it is said
        yield bytes(row[1:sep].tolist()).decode(), bytes(row[sep + 1 : prompt].tolist()).decode(), answer.decode()


def right(sample, predictions):
    """Mean over rows of the fraction of labels that were said."""
    asked = sample["targets"] != IGNORE
    return float(
        ((predictions == sample["targets"]) & asked).sum(1) / asked.sum(1) @ np.full(len(asked), 1 / len(asked))
    )
