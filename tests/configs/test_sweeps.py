"""Sweeps expand to runs that can be built, and compare what they say they compare."""

import dataclasses
import itertools
import pathlib

import pytest

import configs.sweeps
from hydrax.models.cost import cost
from hydrax.models.lm import blueprint
from hydrax.sweep.runs import expand
from hydrax.sweep.stacked import groups
from hydrax.train.source import vocabulary_of

ARMS = {  # of every size
    "axis": (4, 4),
    "extrapolation": (5, 5),
    "mqar_ratio": (7, 9),
    "mqar_state_size": (4, 17),
    "placement": (5, 5),
    "rat_chunks": (4, 8),
    "shootout": (38, 38),
    "state_tracking": (4, 18),
}
TASKS = tuple(ARMS)


def test_there_is_a_test_of_every_sweep():
    found = {p.stem for p in pathlib.Path(configs.sweeps.__path__[0]).glob("*.py")} - {"__init__"}
    assert found == {*TASKS, "ratio", "tiny"}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("size", ["tiny", pytest.param("h100", marks=pytest.mark.slow)])
def test_every_arm_is_a_group_that_can_be_built(name, size, tmp_path):
    found = groups(expand(f"sweeps/{name}:size={size}", tmp_path), 16)
    assert len(found) == ARMS[name][size == "h100"]
    for group in found:
        cfg = group[0].cfg
        assert len({(run.cfg.optim.lr, run.cfg.train.seed) for run in group}) == len(group) >= 2
        blueprint(dataclasses.replace(cfg.model, vocab_size=vocabulary_of(cfg.data)))  # shapes alone


def test_axes_have_equal_caches(tmp_path):
    seen = set()
    for group in groups(expand("sweeps/axis:h100", tmp_path), 16):
        cfg = group[0].cfg
        found = cost(dataclasses.replace(cfg.model, vocab_size=512), seq_len=cfg.data.seq_len)
        # Beside keys and values, a token has its position and its document in every layer and pass of attention: 8
        # bytes, which have nothing to do with what a layer remembers.
        marks = sum(8 * cfg.data.seq_len * layer.passes for layer in found.layers if layer.kv_bytes)
        seen.add((found.state_bytes, found.kv_bytes - marks))
    assert len(seen) == 1


def test_placements_cost_the_same(tmp_path):
    runs = [group[0] for group in groups(expand("sweeps/placement:h100", tmp_path), 16)]
    found = [cost(dataclasses.replace(r.cfg.model, vocab_size=1024), seq_len=256) for r in runs]
    for one, other in itertools.pairwise(found):
        assert (one.parameters, one.cache_bytes, one.flops_per_token) == (
            other.parameters,
            other.cache_bytes,
            other.flops_per_token,
        )
