import dataclasses

import numpy as np
import pytest

from hydrax.core.build import ConfigError, build, differences
from hydrax.eval import extrapolation, state_tracking
from hydrax.models.spec import ModelConfig
from hydrax.tasks.state_tracking import WordProblem, word_problem
from hydrax.train.optim import OptimConfig

MODEL = build(
    ModelConfig,
    {"d_model": 16, "pattern": "gla", "ffn": "none", "vocab_size": 5, "mixers": {"gla": {"heads": 2}}},
)
TINY = extrapolation.Protocol(
    seeds=2, steps=30, rows=16, lengths=(2, 5), longest=12, exam_rows=64, optim=OptimConfig(lr=0.05, warmup=2)
)


class Coin(WordProblem):
    """Answers that have nothing to do with the word."""

    def answers(self, words):
        return np.random.default_rng(0).integers(0, self.order, words.shape)


def curve(kind):
    """The product of this table is its second factor, so the answer is the last letter, which is learnt at once."""
    losses = []
    problem = kind(np.tile(np.arange(4), (4, 1)), np.arange(4))
    result = extrapolation.scaled_accuracy(problem, MODEL, TINY, losses.append)
    assert result.shape == (2, 12) and len(losses) == 30
    return result, losses


def test_knowing_scores_one():
    scores, losses = curve(WordProblem)
    assert losses[0] > 1.2 and losses[-1] < 0.1
    assert scores.min() > 0.98


def test_guessing_scores_zero():
    scores, losses = curve(Coin)
    assert min(losses) > 1
    assert abs(scores.mean()) < 0.1  # 4 standard errors


def test_ranges_are_closed_and_count_from_length_one():
    lengths = np.arange(1, 257.0)
    means = {name: extrapolation.over(lengths[None], r) for name, r in extrapolation.Protocol().ranges.items()}
    assert means == {"3-40": [(3 + 40) / 2], "41-256": [(41 + 256) / 2]}


def test_a_pair_differs_in_the_eigenvalues_alone():
    for mixer, pair in state_tracking.pairs(["gdn", "deltanet"], word_problem("parity")).items():
        changed = differences(*(dataclasses.asdict(pair[kind]) for kind in ("with", "without")))
        assert changed == [f"mixers.{mixer}.allow_neg_eigval: True -> False"]


@pytest.mark.parametrize(
    ("mixers", "message"),
    [
        ([], "mixers = '': expected names of mixers"),
        (["gla"], r"model\.mixers\.gla\.allow_neg_eigval = True: unknown key"),
        (["gdm"], r"model\.mixers\.gdm = .*: expected one of .*gdn"),
    ],
)
def test_mixers_without_the_option_are_refused(mixers, message):
    with pytest.raises(ConfigError, match=message):
        state_tracking.pairs(mixers, word_problem("parity"))


def test_the_figure_is_a_picture(tmp_path):
    curves = {"gdn": {"with": np.ones((2, 12)), "without": np.zeros((2, 12))}}
    extrapolation.draw(curves, "negative eigenvalues", TINY, tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").read_bytes().startswith(b"\x89PNG")
