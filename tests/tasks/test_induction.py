import numpy as np
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.tasks.induction import BOS, FIRST, PAD, TRIGGER, Induction
from tests.tasks.reading import draw, labels, right


def induce(row):
    """What came after each token the last time, for those that were there before."""
    seen, said = {}, {}
    for t, token in enumerate(row.tolist()):
        if token in seen:
            said[t] = seen[token]
        if t:
            seen[row[t - 1]] = token
    return said


@pytest.mark.parametrize("split", ["train", "eval"])
def test_repeated_segments_are_solved_by_induction_alone(split):
    sample = draw(Induction(), 200, split)
    for row, targets, length in zip(sample["inputs"], sample["targets"], sample["meta"]["length"], strict=True):
        asked, row = labels(targets), row[:length]
        half = length // 2
        assert row[0] == BOS and len(set(row[1 : half + 1])) == half and row[1:].min() >= FIRST
        assert list(asked) == list(range(half + 1, length))
        for t, token in asked.items():
            assert token == row[t + 1 - half]
            if t < length - 1:
                assert row[t + 1] == token
        assert {t: token for t, token in induce(row).items() if t in asked} == asked


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_trigger_is_answered_by_what_followed_it(split):
    task = Induction(form="trigger", symbols=16)
    sample = draw(task, 200, split)
    for row, targets, length in zip(sample["inputs"], sample["targets"], sample["meta"]["length"], strict=True):
        first, last = np.flatnonzero(row == TRIGGER)
        assert last == length - 1 and (row[length:] == PAD).all() and first + 1 < last
        assert labels(targets) == {last: row[first + 1]}


def test_the_trigger_may_stand_anywhere():
    sample = draw(Induction(form="trigger", length=10, min_length=10), 4000)
    counts = np.bincount((sample["inputs"] == TRIGGER).argmax(1))
    assert len(counts) == 8 and abs(counts - 500).max() < 5 * 500**0.5


def test_lengths():
    train = draw(Induction(length=12, min_length=6), 1000)["meta"]["length"]
    assert sorted(set(train.tolist())) == [6, 8, 10, 12]
    task = Induction(form="trigger", length=12, eval_factors=(1, 3))
    sample = draw(task, 100, "eval")
    assert task.slices == ("length=12", "length=36") and sample["inputs"].shape == (100, 36)
    assert (sample["meta"]["length"] == np.array([12, 36])[sample["meta"]["slice"]]).all()


def test_chance_is_one_symbol():
    sample = draw(Induction(form="trigger", symbols=8), 4000)
    guess = np.random.default_rng(1).integers(FIRST, FIRST + 8, sample["targets"].shape)
    assert abs(right(sample, guess) - 1 / 8) < 0.02


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"symbols": 100}, "symbols"),
        ({"min_length": 65}, "min_length"),
        ({"min_length": 3}, "min_length"),
        ({"eval_factors": ()}, "eval_factors"),
        ({"form": "both"}, "form"),
    ],
)
def test_bad_options_are_one_line(options, key):
    with pytest.raises(ConfigError, match=f"^{key} = .*expected.*$") as error:
        build(Induction, options)
    assert "\n" not in str(error.value)
