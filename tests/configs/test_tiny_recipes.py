"""The recipes at the size of a test: the same structure, held to all that holds for every model."""

import functools

import numpy as np
import pytest

from hydrax.core.build import build
from hydrax.core.config import known, load_config, load_module
from hydrax.data.modes import modes
from hydrax.train.config import RunConfig
from tests.contract import checks

RECIPES = [name for name in known() if "tiny" in getattr(load_module(name)[0], "SIZES", {})]
EVERY_RECIPE = pytest.mark.parametrize("name", RECIPES, ids=lambda name: name.removeprefix("recipes/"))


@functools.cache
def config(name: str) -> RunConfig:
    return build(RunConfig, load_config(f"{name}:tiny").to_dict())


@functools.cache
def case(name: str) -> checks.Case:
    return checks.Case.of(config(name).model)


@pytest.mark.thorough
@EVERY_RECIPE
def test_documents_causality_and_decoding(name: str):
    """One test: they have programs in common."""
    checks.packed_documents_are_separate(case(name))
    checks.the_past_ignores_the_future(case(name))
    checks.decoding_is_training(case(name))


@EVERY_RECIPE
def test_cache_bytes(name: str):
    checks.cache_bytes_are_priced(case(name))


@pytest.mark.slow
@EVERY_RECIPE
def test_scanned_layers_equal_unrolled_ones(name: str):
    checks.scanned_layers_equal_unrolled_ones(case(name))


@pytest.mark.slow
@EVERY_RECIPE
def test_training(name: str):
    batch = checks.batch_of(case(name))
    rows = np.arange(len(batch["tokens"]))
    schedule = modes(config(name).data.modes, batch, rows)
    checks.training_learns(case(name), config(name).optim, batch if schedule is None else {**batch, "modes": schedule})


def test_all_hybrids_are_there():
    assert len(RECIPES) >= 19
