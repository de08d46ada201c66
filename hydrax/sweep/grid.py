"""Grids of runs, and what makes them from one another.

An entry of a grid is a dict of flags of `launch.train`: `config`, the base, and dotted keys of it. A sweep file has a
function that returns a grid:

    from hydrax.sweep import grid

    def get_sweep(arg: str = "") -> grid.Grid:
        base = [{"config": "lm:100m", "train.steps": 2000}]
        return grid.product(base, grid.sweep("optim.lr", [3e-4, 1e-3]), grid.sweep("train.seed", range(3)))
"""

import builtins
import functools
import itertools
from collections.abc import Iterable
from typing import Any

from hydrax.core.build import ConfigError

Entry = dict[str, Any]
Grid = list[Entry]


def sweep(key: str, values: Iterable[Any]) -> Grid:
    """One entry per value of `key`."""
    return [{key: value} for value in values]


def product(*grids: Grid) -> Grid:
    """Every combination of one entry from each grid, merged; the last grid varies fastest.

    Raises:
      ConfigError: two grids set one key.
    """
    return [_merged(entries) for entries in itertools.product(*grids)]


def zip(*grids: Grid) -> Grid:
    """The first entries of all grids merged, then the second ones, and so on.

    Raises:
      ConfigError: the grids differ in length, or two set one key.
    """
    lengths = [len(g) for g in grids]
    if len(set(lengths)) > 1:
        raise ConfigError("zip", lengths, "expected grids of one length")
    return [_merged(entries) for entries in builtins.zip(*grids, strict=True)]


def chain(*grids: Grid) -> Grid:
    """One grid after the other."""
    return list(itertools.chain(*grids))


def _merged(entries: tuple[Entry, ...]) -> Entry:
    return functools.reduce(_merge, entries, {})


def _merge(left: Entry, right: Entry) -> Entry:
    for key in left.keys() & right.keys():
        raise ConfigError(key, right[key], f"this entry has {left[key]!r} already; expected every key in one grid only")
    return {**left, **right}
