"""Accuracy counts labelled positions, of rows and slices; tasks in bytes reach a model as its own text would."""

import jax
import numpy as np
import pytest

from hydrax.eval import tasks
from hydrax.eval.scoring import Score, Scorer
from hydrax.tasks.base import IGNORE
from hydrax.tasks.passkey import Passkey
from tests.eval import small

INPUTS = np.arange(12, dtype=np.int32).reshape(3, 4)
TARGETS = np.array([[1, 2, IGNORE, IGNORE], [IGNORE, 3, 4, 5], [6, IGNORE, IGNORE, IGNORE]], np.int32)


def say(answers):
    """A scorer whose model says these things."""

    def score(inputs, targets, advance=None):
        given = [np.resize(answer, len(x)) for answer, x in zip(answers, inputs, strict=True)]
        return [Score(np.zeros(len(x)), g == y) for x, y, g in zip(inputs, targets, given, strict=True)]

    return score


def test_means_are_over_rows_and_slices():
    sample = {"inputs": INPUTS, "targets": TARGETS, "meta": {"slice": np.array([0, 2, 2])}}
    answers = [np.array([1, 2, 9, 9]), np.array([9, 3, 9, 5]), np.array([9, 9, 9, 9])]
    found = tasks.accuracy(say(answers), [sample], 3, ("a", "b", "c"))
    assert found["accuracy"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert found["sequence_accuracy"] == pytest.approx(1 / 3)
    assert found["slices"] == {"a": 1.0, "c": pytest.approx(1 / 3)}
    assert tasks.accuracy(say(answers[:1]), [sample], 1)["accuracy"] == 1.0


def test_a_model_is_asked_what_the_task_asks():
    model = small.model(pattern="gla")
    sample = {"inputs": INPUTS, "targets": TARGETS, "meta": {}}
    said = np.asarray(jax.jit(model)(INPUTS)).argmax(-1)
    right = [np.mean((said == t)[m]) for said, t, m in zip(said, TARGETS, TARGETS != IGNORE, strict=True)]
    found = tasks.accuracy(Scorer(model), [sample], 3)
    assert found["accuracy"] == pytest.approx(np.mean(right))
    knowing = {**sample, "targets": np.where(TARGETS == IGNORE, IGNORE, said).astype(np.int32)}
    assert tasks.accuracy(Scorer(model), [knowing], 3)["sequence_accuracy"] == 1.0


def test_blocks_hold_the_rows_asked_for():
    task = Passkey(length=256, eval_factors=(1,))
    (once,) = tasks.eval_rows(task, "passkey", 3, seed=0)
    np.testing.assert_array_equal(once["inputs"], tasks.eval_rows(task, "passkey", 3, seed=0)[0]["inputs"])
    assert (once["inputs"] != tasks.eval_rows(task, "passkey", 3, seed=1)[0]["inputs"]).any()
