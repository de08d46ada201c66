import dataclasses

import pytest

from hydrax.core.build import ConfigError
from hydrax.tasks import make
from hydrax.tasks.base import IGNORE, overlap
from tests.tasks.reading import draw, right

NAMES = (
    "babilong",
    "copying",
    "induction",
    "listops",
    "passkey",
    "phonebook",
    "ruler_common_words",
    "ruler_frequent_words",
    "ruler_needle",
    "ruler_variables",
    "state_recall",
)


@pytest.mark.parametrize("name", NAMES)
def test_defaults_make_rows_of_both_splits(name):
    task = make(name, {})
    train, evaluation = draw(task, 4, "train"), draw(task, 4, "eval")
    assert len(task.slices) == len(set(task.slices)) > 1 and "slice" in evaluation["meta"]
    assert right(train, train["targets"]) == 1 and right(train, train["inputs"] * 0 + IGNORE) == 0
    assert overlap(train, draw(task, 4, "train", seed=1)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_length_is_a_row_of_training(name):
    task = make(name, {"length": 2345, "symbols": 9380} if name == "induction" else {"length": 2345})
    assert draw(task, 2)["inputs"].shape == (2, 2345)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_options_are_one_line(name):
    allowed = ", ".join(field.name for field in dataclasses.fields(make(name, {})))
    with pytest.raises(ConfigError, match=f"^lenght = 3: unknown key; .*allowed: {allowed}$"):
        make(name, {"lenght": 3})
