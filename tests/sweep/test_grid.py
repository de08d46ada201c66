"""Grids are lists of dicts, and what makes them keeps order, length and every key."""

import pytest

from hydrax.core.build import ConfigError
from hydrax.sweep import grid

A, B = grid.sweep("a", [1, 2]), grid.sweep("b", [3, 4])


def test_a_product_varies_its_last_grid_fastest():
    assert grid.product(A, B) == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]
    assert grid.product([{"c": 0}], A) == [{"c": 0, "a": 1}, {"c": 0, "a": 2}]


def test_zip_merges_entry_by_entry():
    assert grid.zip(A, B) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]


def test_chain_keeps_the_order():
    assert grid.chain(A, B, A) == [{"a": 1}, {"a": 2}, {"b": 3}, {"b": 4}, {"a": 1}, {"a": 2}]


def test_the_inputs_stay_as_they_are():
    grid.product(A, B), grid.zip(A, B), grid.chain(A, B)
    assert A == [{"a": 1}, {"a": 2}] and B == [{"b": 3}, {"b": 4}]


@pytest.mark.parametrize("merge", [grid.product, grid.zip])
def test_a_key_is_set_once(merge):
    with pytest.raises(ConfigError, match=r"a = 1: this entry has 1 already"):
        merge(A, A)


def test_zipped_grids_have_one_length():
    with pytest.raises(ConfigError, match=r"zip = \[2, 3\]: expected grids of one length"):
        grid.zip(A, grid.sweep("b", range(3)))
