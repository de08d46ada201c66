"""Accuracy on synthetic tasks: of a model trained on the task, or of a language model of bytes on a task in bytes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hydrax.eval.scoring import Advance, Score, Scorer
from hydrax.tasks.base import BLOCK, IGNORE, Sample, Task, block


def eval_rows(task: Task, name: str, rows: int, seed: int) -> list[Sample]:
    """At least that many rows of the evaluation split, in blocks."""
    return [block(task, name, seed=seed, split="eval", number=n) for n in range(-(-rows // BLOCK))]


def accuracy(
    scorer: Scorer,
    samples: Sequence[Sample],
    rows: int,
    slices: Sequence[str] = (),
    advance: Advance | None = None,
) -> dict[str, Any]:
    """Of the first `rows` rows: the share of labelled positions that are right, per row and then over rows; of rows
    without an error; and the first of both for every slice.
    """
    inputs, targets = ([row for s in samples for row in s[key]][:rows] for key in ("inputs", "targets"))
    ends = [int(np.flatnonzero(y != IGNORE)[-1]) + 1 for y in targets]
    scores = scorer(
        [x[:n] for x, n in zip(inputs, ends, strict=True)], [y[:n] for y, n in zip(targets, ends, strict=True)], advance
    )
    right = [_right(score, y[: len(score.right)]) for score, y in zip(scores, targets, strict=True)]
    share, whole = (np.array([f(r) for r in right], np.float64) for f in (np.mean, np.all))
    result: dict[str, Any] = {
        "accuracy": float(share.mean()),
        "stderr": float(share.std(ddof=1) / np.sqrt(len(share))) if len(share) > 1 else None,
        "sequence_accuracy": float(whole.mean()),
        "rows": len(share),
    }
    if slices:
        of = np.concatenate([s["meta"]["slice"] for s in samples])[:rows]
        result["slices"] = {name: float(share[of == i].mean()) for i, name in enumerate(slices) if (of == i).any()}
    return result


def _right(score: Score, targets: np.ndarray) -> np.ndarray:
    return score.right[targets != IGNORE]
