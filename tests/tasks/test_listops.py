import random
import statistics

import numpy as np
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.tasks.listops import CLOSE, DIGIT, EQUALS, MAX, MED, MIN, PAD, SM, ListOps
from tests.tasks.reading import draw, labels, right

VALUE = {MIN: min, MAX: max, MED: lambda x: int(statistics.median(x)), SM: lambda x: sum(x) % 10}


def read(tokens):
    """The value of an expression by a stack, its depth, and how many arguments its operations have."""
    stack, arguments, depth = [[None]], [], 0
    for token in tokens:
        if token in VALUE:
            stack.append([token])
            depth = max(depth, len(stack))
        elif token == CLOSE:
            operation, *values = stack.pop()
            arguments.append(len(values))
            stack[-1].append(VALUE[operation](values))
        else:
            stack[-1].append(token - DIGIT)
    ((_, value),) = stack
    return value, depth, arguments


@pytest.mark.parametrize(
    "options", [{}, {"length": 60, "min_length": 2}, {"length": 40, "min_length": 30, "max_depth": 4}]
)
def test_a_stack_gets_every_answer(options):
    task = ListOps(**options)
    sample = draw(task, 100)
    counts = []
    for row, targets, size, value in zip(
        sample["inputs"], sample["targets"], sample["meta"]["length"], sample["meta"]["value"], strict=True
    ):
        assert task.min_length <= size < task.length
        assert row[size] == EQUALS and (row[size + 1 :] == PAD).all() and (row[:size] != PAD).all()
        found, depth, arguments = read(row[:size].tolist())
        assert labels(targets) == {size: DIGIT + found} and value == found
        assert depth <= task.max_depth
        counts += arguments
    assert min(counts) == 2 and max(counts) <= 10


def naive(rng, depth=1):
    """The length of a tree drawn by recursion, as the task defines it."""
    if depth < 5 and rng.random() < 0.25:
        return 2 + sum(naive(rng, depth + 1) for _ in range(rng.randint(2, 10)))
    return 1


def test_lengths_have_the_law_of_rejection():
    rng = random.Random(0)
    expected = [size for size in (naive(rng) for _ in range(60_000)) if 10 <= size < 60]
    found = draw(ListOps(length=60, min_length=10, max_depth=5), 6000)["meta"]["length"]
    a, b = (np.histogram(x, [10, 20, 30, 40, 50, 60])[0] / len(x) for x in (expected, found))
    assert abs(a - b).max() < 5 * (0.25 / len(expected) + 0.25 / len(found)) ** 0.5


def test_operations_and_digits_are_uniform():
    counts = np.bincount(draw(ListOps(length=200, min_length=20), 300)["inputs"].ravel(), minlength=EQUALS + 1)
    for part in (counts[DIGIT : DIGIT + 10], counts[[MIN, MAX, MED, SM]]):
        assert part.min() > 500 and abs(part - part.mean()).max() < 5 * part.mean() ** 0.5


def test_slices_divide_the_lengths():
    task = ListOps(length=100, min_length=20)
    assert task.slices == ("length=20-39", "length=40-59", "length=60-79", "length=80-99")
    sample = draw(task, 500)
    low, high = np.array([part[7:].split("-") for part in task.slices]).astype(int)[sample["meta"]["slice"]].T
    assert (low <= sample["meta"]["length"]).all() and (sample["meta"]["length"] <= high).all()


def test_ten_classes_and_chance():
    sample = draw(ListOps(length=100, min_length=10), 4000)
    assert sorted(set(sample["meta"]["value"].tolist())) == list(range(10))
    guess = np.random.default_rng(1).integers(DIGIT, DIGIT + 10, sample["targets"].shape)
    assert abs(right(sample, guess) - 0.1) < 0.02


def test_lengths_that_no_expression_has_are_refused():
    with pytest.raises(ConfigError, match=r"^min_length = 115: .*widen the bounds$"):
        ListOps(length=120, min_length=115, max_depth=2).sample(np.random.default_rng(0), 1, "train")


@pytest.mark.parametrize(
    ("options", "key"),
    [({"length": 500}, "min_length"), ({"max_arguments": 1}, "max_arguments"), ({"max_depth": 0}, "max_depth")],
)
def test_bad_options_are_one_line(options, key):
    with pytest.raises(ConfigError, match=f"^{key} = .*expected.*$") as error:
        build(ListOps, options)
    assert "\n" not in str(error.value)
