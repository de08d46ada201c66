import re

import numpy as np
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.tasks.passkey import Passkey
from tests.tasks.reading import draw, right, texts


@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_key_is_said_once_in_the_context(split):
    task = Passkey()
    sample = draw(task, 100, split)
    for (context, question, answer), references in zip(texts(sample), sample["meta"]["references"], strict=True):
        assert re.findall(r"The pass key is (\d{5})\. Remember it: (\d{5}) is the pass key\.", context) == [
            (answer, answer)
        ]
        assert question.endswith("The pass key is ") and len(answer) == task.budget
        assert task.score(answer, references) == 1


def test_depths_and_lengths_are_uniform():
    task = Passkey(length=256, eval_factors=(4, 8))
    counts = np.bincount(draw(task, 2000, "eval")["meta"]["slice"], minlength=20)
    assert len(task.slices) == len(counts) == 20 and counts.min() > 40 and counts.max() < 170


def test_chance_is_a_digit():
    sample = draw(Passkey(), 1000)
    guess = np.random.default_rng(1).integers(ord("0"), ord("9") + 1, sample["targets"].shape)
    assert abs(right(sample, guess) - 0.1) < 0.02


def test_bad_options_are_one_line():
    with pytest.raises(ConfigError, match=r"^length = 60: expected at least \d+ for this task$"):
        build(Passkey, {"length": 60})
