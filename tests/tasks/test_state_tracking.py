import itertools

import numpy as np
import pytest

from hydrax import tasks
from hydrax.core.build import ConfigError
from hydrax.tasks import state_tracking
from hydrax.tasks.state_tracking import word_problem


def words(problem, *, rows=50, lengths=(2, 9), seed=0, step=0):
    """A batch, and per row the elements of its word and of its answers."""
    batch = problem.batch(rows, lengths, seed=seed, step=step)
    real = batch["weights"] > 0
    pairs = zip(batch["tokens"], batch["targets"], real, strict=True)
    return batch, [((tokens[r] - 1).tolist(), (targets[r] - 1).tolist()) for tokens, targets, r in pairs]


@pytest.mark.parametrize(("name", "n"), [("parity", 2), ("mod5", 5)])
def test_sums_equal_a_naive_loop(name, n):
    for word, answers in words(word_problem(name))[1]:
        total = 0
        for letter, answer in zip(word, answers, strict=True):
            total += letter
            assert answer == total % n


@pytest.mark.parametrize(("name", "n"), [("s3", 3), ("s5", 5), ("s5_swaps", 5)])
def test_permutations_equal_a_naive_loop(name, n):
    elements = list(itertools.permutations(range(n)))
    for word, answers in words(word_problem(name))[1]:
        acc = tuple(range(n))
        for letter, answer in zip(word, answers, strict=True):
            acc = tuple(acc[point] for point in elements[letter])  # acc ∘ g: first g, then acc
            assert elements[answer] == acc


@pytest.mark.parametrize("name", state_tracking.TABLE)
def test_every_table_is_a_group(name):
    product = word_problem(name).product
    everything = np.arange(len(product))
    np.testing.assert_array_equal(product[0], everything)
    np.testing.assert_array_equal(product[:, 0], everything)
    np.testing.assert_array_equal(np.sort(product, axis=0), np.broadcast_to(everything[:, None], product.shape))
    a, b, c = np.random.default_rng(0).integers(0, len(product), (3, 1000))
    np.testing.assert_array_equal(product[product[a, b], c], product[a, product[b, c]])


def test_groups_and_letters_have_the_sizes_of_the_paper():
    sizes = {name: (word_problem(name).order, len(word_problem(name).letters)) for name in state_tracking.TABLE}
    groups = {"parity": (2, 2), "mod5": (5, 5), "s3": (6, 6), "a5": (60, 60), "s5": (120, 120)}
    assert sizes == groups | {"s5_swaps": (120, 11), "s5_three": (120, 31)}
    assert word_problem("parity").vocabulary == 3
    assert sorted(sum(p != i for i, p in enumerate(x)) for x in _letters("s5_swaps")) == [0] + [2] * 10


def _letters(name):
    elements = list(itertools.permutations(range(5)))
    return [elements[i] for i in word_problem(name).letters]


def test_lengths_are_uniform_over_the_closed_range_and_the_rest_is_padding():
    batch, pairs = words(word_problem("parity"), rows=4000, lengths=(3, 10))
    counts = np.bincount([len(word) for word, _ in pairs], minlength=12)
    assert counts[:3].sum() == counts[11:].sum() == 0
    assert np.abs(counts[3:11] - 500).max() < 5 * np.sqrt(500)
    assert 0.48 < np.mean(np.concatenate([word for word, _ in pairs])) < 0.52
    real = np.arange(10) < [[len(word)] for word, _ in pairs]
    for name in ("segment_ids", "weights"):
        np.testing.assert_array_equal(batch[name], real)
    np.testing.assert_array_equal(batch["positions"], np.where(real, np.arange(10), 0))
    np.testing.assert_array_equal(batch["bytes"], real.sum(1))
    assert not batch["tokens"][~real].any() and not batch["targets"][~real].any()
    assert {name: x.dtype.name for name, x in batch.items()} == {
        **dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), "int32"),
        **dict.fromkeys(("weights", "bytes"), "float32"),
    }


def test_a_batch_is_a_function_of_seed_and_step():
    problem = word_problem("s3")
    first = problem.batch(4, (3, 40), seed=1, step=2)
    again = problem.batch(4, (3, 40), seed=1, step=2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    for seed, step in ((1, 3), (2, 2), (2, 1)):
        assert not np.array_equal(first["tokens"], problem.batch(4, (3, 40), seed=seed, step=step)["tokens"])


def test_unknown_problems_are_refused():
    with pytest.raises(ConfigError, match="task = 's6': expected one of parity, mod5"):
        word_problem("s6")


def test_a5_is_the_even_half_of_s5():
    elements = list(itertools.permutations(range(5)))
    even = [p for p in elements if sum(p[i] > p[j] for i in range(5) for j in range(i + 1, 5)) % 2 == 0]
    for word, answers in words(word_problem("a5"))[1]:
        acc = tuple(range(5))
        for letter, answer in zip(word, answers, strict=True):
            acc = tuple(acc[point] for point in even[letter])
            assert even[answer] == acc


def draw(task, split, rows=300):
    return task.sample(np.random.default_rng(0), rows, split)


@pytest.mark.parametrize("spacing", [0, 3])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_group_words_ask_for_every_beginning(split, spacing):
    task = state_tracking.GroupWords(length=16, group="s3", spacing=spacing, eval_factors=(1, 3))
    sample, each = draw(task, split), spacing + 1
    assert sample["inputs"].shape[1] == task.length * (3 if split == "eval" else 1)
    for row, targets, letters, part in zip(
        sample["inputs"], sample["targets"], *(sample["meta"][k] for k in ("letters", "slice")), strict=True
    ):
        assert split == "train" or task.slices[part] == f"length={letters * each}"
        acc, expected = 0, np.full(len(row), -1)
        for i in range(letters):
            acc = task.problem.product[acc, row[i * each] - 1]
            expected[i * each + spacing] = acc + 1
        np.testing.assert_array_equal(targets, expected)
        assert np.count_nonzero(row) == letters


def value(tokens):
    """Of an expression, by Python."""
    signs = {1: "+", 2: "-", 3: "*", 10: "(", 11: ")"}
    return eval("".join(signs.get(t, str(t - 5)) for t in tokens)) % 5


SOLVERS = {
    "parity": lambda row: 1 + sum(t == 2 for t in row) % 2,
    "arithmetic": lambda row: 5 + value(row[:-1]),
    "arithmetic_brackets": lambda row: 5 + value(row[:-1]),
}


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("name", SOLVERS)
def test_answers_at_the_end(name, split):
    task = tasks.make(name, {"length": 20, "eval_length": 60})
    sample = draw(task, split)
    lengths = sample["meta"]["length"]
    bounds = (20, 60) if split == "eval" else (2, 20)
    assert (lengths.min(), lengths.max()) == bounds and sample["inputs"].shape == (300, bounds[1])
    assert ((sample["targets"] >= 0).sum(1) == 1).all() and sample["inputs"].max() < task.vocabulary
    for row, targets, length in zip(sample["inputs"].tolist(), sample["targets"], lengths, strict=True):
        assert not any(row[length:]) and all(row[:length])
        assert targets[length - 1] == SOLVERS[name](row[:length])
    if split == "eval":
        for part, length in zip(sample["meta"]["slice"], lengths, strict=True):
            low, high = map(int, task.slices[part].removeprefix("length=").split("-"))
            assert low <= length <= high


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("parity", {"min_length": 41}, "min_length = 41: expected at most length = 40"),
        ("parity", {"eval_length": 42}, "eval_length = 42: expected length"),
        ("group_words", {"group": "s6"}, "group = 's6': expected one of parity"),
        ("group_words", {"spacing": 2}, "length = 32: expected a multiple of spacing"),
        ("group_words", {"eval_factors": ()}, "eval_factors = ..: expected one or more"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        tasks.make(name, options)
