import numpy as np
import pytest

from hydrax.core.build import ConfigError
from hydrax.tasks import make

KINDS = ("mad_recall", "mad_fuzzy_recall", "mad_selective_copy", "mad_compression", "mad_memorisation")


def draw(task, split="eval", rows=200, seed=0):
    return task.sample(np.random.default_rng(seed), rows, split)


def asked(targets):
    return {t: x for t, x in enumerate(targets.tolist()) if x >= 0}


@pytest.mark.parametrize("options", [{}, {"vocabulary": 32, "noise_tokens": 16, "noise": 0.2}], ids=["clean", "noisy"])
def test_recall_asks_for_the_values_of_known_keys(options):
    task = make("mad_recall", options)
    sample, usable = draw(task), task.vocabulary - task.noise_tokens
    for row, targets, noisy in zip(sample["inputs"], sample["targets"], sample["meta"]["noisy"], strict=True):
        known, expected = {}, {}
        for i, (key, value) in enumerate(row.reshape(-1, 2).tolist()):
            if noisy[i]:
                assert key >= usable and value >= usable
                continue
            assert key < usable // 2 <= value < usable
            if key in known:
                expected[2 * i] = known[key]
            assert known.setdefault(key, value) == value
        assert asked(targets) == expected and task.length - 2 in expected
    pairs = sample["meta"]["noisy"][:, :-1]
    share = task.noise * (1 - 1 / pairs.shape[1])  # one of them is protected
    assert abs(pairs.mean() - share) <= 3 * np.sqrt(share * (1 - share) / pairs.size)


@pytest.mark.parametrize("name", ["mad_recall", "mad_fuzzy_recall"])
def test_training_asks_for_every_next_token(name):
    sample, pad = draw(make(name, {}), "train"), 15 if name == "mad_fuzzy_recall" else -1
    said = sample["targets"][:, :-1]
    np.testing.assert_array_equal(said, np.where(sample["inputs"][:, :-1] == pad, -1, sample["inputs"][:, 1:]))
    assert (sample["targets"][:, -1] == -1).all()
    few = draw(make(name, {"next_token": False}), "train")
    assert ((few["targets"] >= 0).sum(1) < (sample["targets"] >= 0).sum(1)).all()


def motifs(row, half, pad):
    """The motifs of a row and where each begins: keys and values alternate, and their tokens differ."""
    found = []
    for t, token in enumerate(row):
        if token == pad:
            assert not found
        elif found and (row[t - 1] < half) == (token < half):
            found[-1][1].append(token)
        else:
            found.append((t, [token]))
    return found


def test_fuzzy_recall_asks_for_the_motifs_of_known_keys():
    task = make("mad_fuzzy_recall", {})
    sample, pad, half = draw(task), 15, 7
    longest = 0
    for row, targets in zip(sample["inputs"].tolist(), sample["targets"], strict=True):
        known, expected, parts = {}, {}, motifs(row, half, pad)
        for (at, key), (begin, value) in zip(parts[::2], parts[1::2], strict=True):
            assert key[0] < half and len(set(key)) == len(key) <= 3 and len(set(value)) == len(value) <= 3
            assert begin == at + len(key)
            if tuple(key) in known and len(key) == 3:
                expected |= {begin - 1 + i: x for i, x in enumerate(known[tuple(key)])}
            assert known.setdefault(tuple(key), value) == value
        assert asked(targets) == expected
        assert max(expected) == task.length - 2  # the last pair is asked for
        longest = max(longest, row.count(pad))
    assert longest < 6  # only a pair that did not fit is left out


@pytest.mark.parametrize(("name", "count"), [("mad_selective_copy", 16), ("mad_compression", 32)])
def test_copies_are_the_tokens_in_their_order(name, count):
    task = make(name, {})
    sample = draw(task)
    for row, targets in zip(sample["inputs"], sample["targets"], strict=True):
        sign = np.flatnonzero(row == 15)
        assert sign.tolist() == [task.length - count - 1]
        content = row[: sign[0]]
        assert (row[sign[0] + 1 :] == 14).all() and row[sign[0] - 1] != 14
        assert asked(targets) == dict(
            zip(range(sign[0] + 1, task.length), content[content != 14].tolist(), strict=True)
        )


def test_memorised_values_are_those_of_a_map_that_no_row_shows():
    task = make("mad_memorisation", {})
    sample, other = draw(task, "train"), draw(task, "eval", seed=1)
    values = sample["meta"]["values"][0]
    for part in (sample, other):
        assert (part["inputs"][:, 1::2] == 255).all() and part["inputs"][:, ::2].max() < 255
        np.testing.assert_array_equal(part["targets"][:, 1::2], values[part["inputs"][:, ::2]])
        assert (part["targets"][:, ::2] == -1).all()
    again = draw(make("mad_memorisation", {"map_seed": 1}))
    assert (again["meta"]["values"][0] != values).mean() > 0.9


@pytest.mark.parametrize("name", KINDS)
def test_rows_have_the_right_types_and_numbers_of_answers(name):
    task = make(name, {})
    for split in ("train", "eval"):
        sample = draw(task, split)
        assert sample["inputs"].dtype == sample["targets"].dtype == np.int32
        assert sample["inputs"].shape == sample["targets"].shape == (200, task.length)
        assert sample["inputs"].min() >= 0 and max(sample["inputs"].max(), sample["targets"].max()) < task.vocabulary
        most = task.labels(split)
        assert most is None or (sample["targets"] >= 0).sum(1).max() == most


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mad_recall", {"length": 7}, "length = 7: expected an even number"),
        ("mad_recall", {"noise": 0.2}, "noise = 0.2: expected above 0 if and only if"),
        ("mad_recall", {"noise_tokens": 15, "noise": 0.2}, "noise_tokens = 15: expected at most 14"),
        ("mad_fuzzy_recall", {"length": 11}, "length = 11: expected at least 12"),
        ("mad_fuzzy_recall", {"vocabulary": 6}, "vocabulary = 6: expected at least 7"),
        ("mad_selective_copy", {"length": 32}, "length = 32: expected at least 33"),
        ("mad_compression", {"length": 32}, "length = 32: expected an odd number"),
        ("mad_compression", {"vocabulary": 2}, "vocabulary = 2: expected at least 3"),
        ("mad_memorisation", {"length": 33}, "length = 33: expected an even number"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make(name, options)
