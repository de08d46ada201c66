import re

import numpy as np
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.tasks.phonebook import Phonebook
from tests.tasks.reading import draw, right, texts


@pytest.mark.parametrize("split", ["train", "eval"])
def test_numbers_are_those_of_the_book(split):
    task = Phonebook(entries=(5, 20))
    sample = draw(task, 60, split)
    rows = zip(texts(sample), sample["meta"]["entries"], sample["meta"]["references"], strict=True)
    for (context, question, answer), entries, references in rows:
        book, shots = context.removesuffix("\n").split("\n\n")
        lines = [re.fullmatch(r"([A-Z][a-z]+ [A-Z][a-z]+): ([6-9]\d{9})", line).groups() for line in book.split("\n")]
        numbers = dict(lines)
        assert len(numbers) == len(lines) == entries
        examples = [tuple(line.split(": ")) for line in shots.split("\n")]
        assert len(set(examples)) == 2 and set(examples) < set(lines)
        name = question.removesuffix(": ")
        assert numbers[name] == answer and name not in dict(examples)
        assert task.score(f" {answer}\n", references) == 1 and task.score(f"1{answer}", references) == 0


def test_sizes_are_slices():
    task = Phonebook(eval_entries=(20, 50))
    sample = draw(task, 200, "eval")
    assert task.slices == ("entries=20", "entries=50")
    assert (np.array([20, 50])[sample["meta"]["slice"]] == sample["meta"]["entries"]).all()
    assert 70 < sample["meta"]["slice"].sum() < 130


def test_the_largest_book_fits():
    task = Phonebook(entries=(500,), length=15_093)
    assert (draw(task, 4)["inputs"] < 256).sum() > 4 * 12_000


def test_chance_is_a_digit():
    sample = draw(Phonebook(entries=(5,), length=400), 1000)
    guess = np.random.default_rng(1).integers(ord("0"), ord("9") + 1, sample["targets"].shape)
    assert abs(right(sample, guess) - 0.1) < 0.015


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"length": 500}, "length"),
        ({"entries": (2,)}, "entries"),
        ({"eval_entries": (20, 40_001)}, "eval_entries"),
        ({"eval_entries": ()}, "eval_entries"),
    ],
)
def test_bad_options_are_one_line(options, key):
    with pytest.raises(ConfigError, match=f"^{key} = .*expected.*$") as error:
        build(Phonebook, options)
    assert "\n" not in str(error.value)
