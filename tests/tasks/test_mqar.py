import itertools

import numpy as np
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.tasks import TABLE, make
from hydrax.tasks.base import BLOCK, IGNORE, block, distinct, overlap, sha256
from hydrax.tasks.mqar import MQAR, gaps

CASES = {
    "recall": {"pairs": (2, 8), "length": 64},
    "random": {"pairs": (8,), "length": 64, "fill_random": True},
    "longer": {"pairs": (2, 4), "eval_pairs": (4, 16), "length": 16, "eval_length": 64},
    "forgetting": {"variant": "forgetting", "pairs": (4, 6), "updates": 3, "length": 40},
    "repeats": {"repeats": 3, "pairs": (4,), "length": 40},
    "compositional": {"variant": "compositional", "pairs": (4, 9), "length": 64},
}


def draw(task, rows=200, split="train", seed=0):
    return task.sample(np.random.default_rng(seed), rows, split)


def solve(task, sample):
    """What a dict of the context, later pairs over earlier ones, says where something is asked; 0 if nothing."""
    width = 3 if task.variant == "compositional" else 2
    said = np.zeros_like(sample["targets"])
    for row, (tokens, context) in enumerate(zip(sample["inputs"].tolist(), sample["meta"]["context"], strict=True)):
        known = {tuple(tokens[i : i + width - 1]): tokens[i + width - 1] for i in range(0, context, width)}
        for t in np.flatnonzero(sample["targets"][row] != IGNORE):
            said[row, t] = known.get(tuple(tokens[t - width + 2 : t + 1]), 0)
    return said


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_a_dict_of_the_context_knows_every_answer(name, split):
    task = build(MQAR, CASES[name] | {"vocabulary": 64})
    sample = draw(task, split=split)
    asked = sample["targets"] != IGNORE
    np.testing.assert_array_equal(solve(task, sample)[asked], sample["targets"][asked])
    np.testing.assert_array_equal(asked.sum(1), sample["meta"]["pairs"])
    assert not asked[np.arange(asked.shape[1]) < sample["meta"]["context"][:, None]].any()
    assert asked.sum(1).max() == task.labels(split)
    assert {x.dtype.name for x in (sample["inputs"], sample["targets"], *sample["meta"].values())} == {"int32"}
    assert sample["inputs"].min() >= 0 and sample["inputs"].max() < task.vocabulary
    named = [f"pairs={n}" for n in sample["meta"]["pairs"]]
    if split == "eval":
        assert [task.slices[i] for i in sample["meta"]["slice"]] == named and set(named) == set(task.slices)


def test_keys_and_values_are_different_tokens_of_their_halves():
    sample = draw(MQAR(pairs=(15,), vocabulary=32, length=64))
    pairs = sample["inputs"][:, :30].reshape(-1, 15, 2)
    assert (np.sort(pairs[..., 0]) == np.arange(1, 16)).all()  # all 15 keys that there are
    assert pairs[..., 1].min() == 16 and pairs[..., 1].max() == 31
    assert all(len(set(row)) == 15 for row in pairs[..., 1].tolist())
    rest = sample["inputs"][:, 30:]
    assert all(sorted(row[row > 0]) == list(range(1, 16)) for row in rest)  # each key once more, else 0


def test_forgotten_values_change():
    task = MQAR(variant="forgetting", pairs=(6,), updates=6, length=64, vocabulary=14)
    sample = draw(task)
    old, new = (sample["inputs"][:, i : i + 12].reshape(-1, 6, 2) for i in (0, 12))
    for before, after in zip(old.tolist(), new.tolist(), strict=True):
        values = dict(before)
        assert all(values[key] != value for key, value in after) and len(dict(after)) == 6


def test_a_grid_of_two_keys_has_every_cell_once():
    sample = draw(MQAR(variant="compositional", pairs=(9,), length=64, vocabulary=60))
    triples = sample["inputs"][:, :27].reshape(-1, 9, 3)
    for row in triples:
        assert {tuple(x) for x in row[:, :2]} == set(itertools.product(set(row[:, 0]), set(row[:, 1])))
        assert len(set(row[:, 2])) == 9
        assert row[:, 0].max() < 20 <= row[:, 1].min() and row[:, 1].max() < 40 <= row[:, 2].min()


def test_repeated_contexts_are_equal():
    inputs = draw(MQAR(repeats=3, length=40))["inputs"]
    np.testing.assert_array_equal(inputs[:, :8], inputs[:, 8:16])
    np.testing.assert_array_equal(inputs[:, :8], inputs[:, 16:24])


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_slots_have_the_law_of_the_task(power):
    rows, slots = 20000, 28
    drawn = gaps(np.random.default_rng(0), rows, 4, slots, power)
    p = np.arange(1, slots + 1) ** (power - 1)
    p /= p.sum()
    first = np.bincount(drawn[:, 0], minlength=slots)
    assert (np.abs(first - rows * p) < 3 * np.sqrt(rows * p * (1 - p))).all()
    assert power == 1 or abs(p[0] - 0.25) < 0.01
    # The second draw is one without replacement: P(b) = sum over a of p_a p_b / (1 - p_a).
    second = (p[:, None] * p / (1 - p[:, None]) * (1 - np.eye(slots))).sum(0)
    counts = np.bincount(drawn[:, 1], minlength=slots)
    assert np.sum((counts - rows * second) ** 2 / (rows * second)) < slots + 3 * np.sqrt(2 * slots)
    assert all(len(set(row)) == 4 for row in drawn[:500].tolist())


def test_a_window_knows_the_keys_inside_it():
    """The analytic share: the key of pair i, at 2i, is visible from its query iff the window reaches back to 2i."""
    task, window = MQAR(pairs=(8,), length=64, vocabulary=64), 20
    sample = draw(task, 2000)
    row, at = np.nonzero(sample["targets"] != IGNORE)
    keys = sample["inputs"][row, at]
    place = (sample["inputs"][row, :16] == keys[:, None]).argmax(1)
    inside = at - place < window
    visible = [
        k in x[max(t - window + 1, 0) : t].tolist() for x, t, k in zip(sample["inputs"][row], at, keys, strict=True)
    ]
    np.testing.assert_array_equal(inside, visible)
    # Uniform slots make the share countable: slot g of query i is 16 + 2g, uniform over 24 slots.
    even = draw(MQAR(pairs=(8,), length=64, vocabulary=64, power=1.0), 4000)
    row, at = np.nonzero(even["targets"] != IGNORE)
    place = (even["inputs"][row, :16] == even["inputs"][row, at][:, None]).argmax(1)
    share = np.mean([[16 + 2 * g - 2 * i < window for g in range(24)] for i in range(8)])
    assert abs(np.mean(at - place < window) - share) < 3 * np.sqrt(share * (1 - share) / len(at)) + 1e-3


def test_choices_of_different_numbers_are_equally_likely():
    for count, size in ((2, 5), (3, 4)):  # by rejection, and by sorting
        rows = distinct(np.random.default_rng(0), 60000, count, size)
        _, counts = np.unique(rows, axis=0, return_counts=True)
        outcomes = np.prod(np.arange(size, size - count, -1))
        assert len(counts) == outcomes
        expected = len(rows) / outcomes
        assert np.sum((counts - expected) ** 2) / expected < outcomes + 4 * np.sqrt(2 * outcomes)


def test_blocks_are_functions_of_seed_split_and_number():
    task = make("mqar", {})
    digests = [
        sha256(block(task, "mqar", seed=seed, split=split, number=number))
        for seed, split, number in itertools.product((0, 1), ("train", "eval"), (0, 1))
    ]
    again = sha256(block(task, "mqar", seed=0, split="train", number=0))
    assert digests[0] == again and len(set(digests)) == 8
    assert (
        digests[0] == "6b9dcad585e52733f38a0f3a8243f194f6937e11fd37bb1f468eb5b1e3c40e5c"
    )  # other rows would change everyone's results
    train, val = (block(task, "mqar", seed=0, split=s, number=0) for s in ("train", "eval"))
    assert len(train["inputs"]) == BLOCK and overlap(val, train) == 0.0 and overlap(val, val) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": (17,)}, r"length = 64: expected at least 68"),
        ({"eval_pairs": (32,)}, r"length = 64: expected at least 128"),
        ({"pairs": (4, 4)}, r"pairs = \(4, 4\): expected one or more different numbers"),
        ({"pairs": ()}, r"pairs = \(\): expected one or more"),
        ({"vocabulary": 9}, r"vocabulary = 9: expected at least 10"),
        ({"variant": "forgetting"}, r"updates = 0: expected 1 or more"),
        ({"updates": 2}, r"updates = 2: expected 0 without forgetting"),
        ({"variant": "forgetting", "updates": 5}, r"updates = 5: expected at most the pairs, 4"),
        ({"variant": "compositional", "pairs": (5,)}, r"pairs = \(5,\): expected squares"),
        ({"pairs": (0,)}, r"pairs\[0\] = 0: expected an integer >= 1"),
        ({"power": 0}, r"power = 0.0: expected a number > 0"),
        ({"variant": "recal"}, r"variant = 'recal': expected one of recall"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(MQAR, options)


def test_names_and_single_numbers():
    assert make("mqar", {"pairs": 8}) == MQAR(pairs=(8,))
    with pytest.raises(ConfigError, match=f"task = 'mqr': expected one of {', '.join(TABLE)}"):
        make("mqr", {})
