"""The recipes at the size of a test: the same structure, and all that holds for random hybrids must hold for them."""

import dataclasses
import functools

import pytest

from hydrax.core.config import known, load_config, load_module
from hydrax.models.spec import ModelConfig, model_config
from tests.contract import test_hybrids as hybrids
from tests.tolerances import TOLERANCE, assert_close

pytestmark = pytest.mark.thorough

RECIPES = [name for name in known() if "tiny" in getattr(load_module(name)[0], "SIZES", {})]


@dataclasses.dataclass(frozen=True, eq=False)
class Recipe(hybrids.Hybrid):
    """A recipe in the place of a random model."""

    name: str = ""

    @functools.cached_property
    def cfg(self) -> ModelConfig:
        return model_config(load_config(f"{self.name}:tiny").model)


QUICK = {
    "gemma2",
    "griffin",
    "flux",
    "hybridna",
    "hydrahead",
    "lt2",
    "minimax_01",
    "oryx",
    "phi3_small",
    "smallthinker",
}
"""Those that every run of the tests can afford; `make test-all` checks all."""

PARAMS = [
    pytest.param(name, id=short, marks=() if short in QUICK else pytest.mark.slow)
    for name in RECIPES
    for short in [name.removeprefix("recipes/")]
]


@pytest.fixture(scope="module", params=PARAMS)
def recipe(request) -> Recipe:
    return Recipe(0, request.param)


def test_documents_causality_decoding_and_cache(recipe: Recipe):
    """One test for all that needs the same compiled programs."""
    hybrids.test_packed_documents_equal_separate_ones(recipe)
    hybrids.test_the_past_ignores_the_future(recipe)
    hybrids.test_documents_padding_and_neighbours_do_not_matter(recipe)
    hybrids.test_prefill_then_steps_equal_the_whole_pass(recipe)
    hybrids.test_cache_bytes_are_what_cost_says(recipe)


@pytest.mark.slow
def test_scanned_layers_equal_unrolled_ones(recipe: Recipe):
    hybrids.test_scanned_layers_equal_unrolled_ones(recipe)


@pytest.mark.slow
def test_fp32_is_close_to_fp64(recipe: Recipe):
    """What random hybrids amplify at will stays small in models that people train."""
    row = recipe.row(hybrids.LENGTHS, recipe.text())
    given, real = hybrids.batch([row]), row.segment_ids != 0
    y = hybrids.forward(recipe)(hybrids.rounded(recipe.params), given)
    with hybrids.exact():
        want = hybrids.forward(recipe)(recipe.params, given)
    assert_close("logits", y[0][real], want[0][real], TOLERANCE["fp32_model"])


@pytest.mark.slow
def test_training(recipe: Recipe):
    hybrids.test_it_trains(recipe)


def test_every_published_hybrid_is_there():
    assert len(RECIPES) == 30
