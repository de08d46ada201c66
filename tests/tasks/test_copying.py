import re
from collections import Counter

import numpy as np
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.tasks.copying import LAYOUTS, Copying, occurring_once
from tests.tasks.reading import draw, labels, right

SIGNS = "abcdefghijklmnopqrstuvwxyz$|.*"
ANSWER = {  # what is said in an example up to where the answer begins
    "copy": lambda given: given[1:-1],
    "prefix": lambda given: follow(given[1:].split("|")[1], given[1:].split("|")[0]),
    "suffix": lambda given: follow(*given[1:].split("|")),
}
GIVEN = {"copy": r"\$[a-z]+\|", "prefix": r"\$[a-z]{3}\|[a-z]+\|", "suffix": r"\$[a-z]+\|[a-z]{3}"}


def follow(string, gram):
    assert len(re.findall(f"(?={gram})", string)) == 1 and not string.endswith(gram)
    return string.split(gram, 1)[1]


def read(form, row, most=None):
    """Labels of a row from its inputs alone, by regular expressions."""
    text, asked, at = "".join(SIGNS[i] for i in row), {}, 0
    while match := re.compile(GIVEN[form]).match(text, at):
        said = ANSWER[form](match.group())[:most] + "."
        if match.end() + len(said) > len(row) + 1:
            break
        asked |= {match.end() - 1 + i: SIGNS.index(sign) for i, sign in enumerate(said)}
        at = match.end() + len(said)
    return asked


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("form", LAYOUTS)
def test_labels_follow_from_the_inputs(form, split):
    sample = draw(Copying(form=form), 200, split)
    for row, targets in zip(sample["inputs"], sample["targets"], strict=True):
        assert read(form, row) == labels(targets)


def test_an_answer_of_fixed_length():
    sample = draw(Copying(form="suffix", shortest=8, answer=4))
    for row, targets in zip(sample["inputs"], sample["targets"], strict=True):
        assert read("suffix", row, 4) == labels(targets)
    assert (sample["targets"] == SIGNS.index(".")).sum() > 4 * 64  # more examples fit into a row


def test_rows_are_packed_and_lengths_uniform():
    task = Copying(shortest=5, longest=14)
    sample = draw(task, 2000)
    first = Counter(sample["meta"]["letters"][:, 0].tolist())
    assert sorted(first) == list(range(5, 15))
    assert all(abs(count - 200) < 5 * 200**0.5 for count in first.values())
    assert (sample["inputs"] < 29).all()  # no padding: a row is full


def test_evaluation_strings_are_up_to_ten_times_as_long():
    task = Copying(longest=12)
    sample = draw(task, 800, "eval")
    assert task.slices == ("letters=12", "letters=24", "letters=48", "letters=120")
    length = np.array([12, 24, 48, 120])[sample["meta"]["slice"]]
    assert ((sample["targets"] >= 0).sum(1) == length + 1).all()
    assert np.bincount(sample["meta"]["slice"]).min() > 150


@pytest.mark.parametrize("form", ["prefix", "suffix"])
def test_grams_occur_once_even_where_most_do_not(form):
    task = Copying(form=form, alphabet=4, shortest=12, longest=16, eval_factors=(1, 4))
    sample = draw(task, 300, "eval")
    for row, letters in zip(sample["inputs"], sample["meta"]["letters"][:, 0], strict=True):
        text = "".join("abcd$|.*"[i] for i in row)
        first, second = text[1:].split("|")[:2]
        string, gram = (second, first) if form == "prefix" else (first, second[:3])
        assert len(string) == letters and len(re.findall(f"(?={gram})", string)) == 1


def test_where_a_gram_begins_is_uniform():
    starts = draw(Copying(form="prefix", shortest=13, longest=13), 1000)["meta"]["start"].ravel()
    counts = np.bincount(starts, minlength=10)
    assert len(counts) == 10 and abs(counts - counts.mean()).max() < 5 * counts.mean() ** 0.5


def test_occurring_once():
    once = occurring_once(np.array([[0, 1, 0, 1, 2, 2], [0, 0, 0, 0, 0, 0]]), np.array([6, 2]), 2)
    assert once.tolist() == [[False, True, False, True, True], [True, False, False, False, False]]


def test_chance_is_one_letter():
    sample = draw(Copying(), 400)
    guess = np.random.default_rng(1).integers(26, size=sample["targets"].shape)
    letters = sample["targets"] != 28
    guess[~letters] = 28
    share = 1 - ((sample["targets"] == 28).sum(1) / (sample["targets"] >= 0).sum(1)).mean()
    assert abs(right(sample, guess) - (1 - share) - share / 26) < 0.005


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"form": "suffix", "shortest": 3}, "shortest"),
        ({"shortest": 30}, "shortest"),
        ({"length": 40}, "length"),
        ({"form": "prefix", "alphabet": 3}, "gram"),
        ({"eval_factors": (1, 1)}, "eval_factors"),
        ({"eval_factors": ()}, "eval_factors"),
        ({"form": "middle"}, "form"),
        ({"alphabet": 0}, "alphabet"),
    ],
)
def test_bad_options_are_one_line(options, key):
    with pytest.raises(ConfigError, match=f"^{key} = .*expected.*$") as error:
        build(Copying, options)
    assert "\n" not in str(error.value)
