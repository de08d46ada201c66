"""The patterns of swa: the contract for each, what they are where they see everything, and options that do not fit."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.mixers import Context
from tests.contract import test_mixers as contract
from tests.contract.cases import VARIANTS, D, case, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_trees_close

pytestmark = pytest.mark.thorough

PATTERNS = {options["pattern"]: i for i, options in enumerate(VARIANTS["swa"]) if "pattern" in options}
EACH = pytest.mark.parametrize("pattern", PATTERNS)
T = 31


def some(*patterns: str) -> pytest.MarkDecorator:
    """Each pattern, these ones in the default tier."""
    marks = {name: [] if name in patterns else [pytest.mark.slow] for name in PATTERNS}
    return pytest.mark.parametrize("pattern", [pytest.param(name, marks=marks[name]) for name in PATTERNS])


@some("s2", "log_bands")
def test_prefill_then_steps(pattern: str) -> None:
    """At every split of a packed row: what leaves the cache is what no later token sees."""
    contract.test_prefill_then_steps_at_every_split(case("swa", PATTERNS[pattern]), (1, 8, 1, 6, 5), jnp.float32)


@EACH
def test_the_state(pattern: str) -> None:
    contract.test_state_is_what_the_table_says(case("swa", PATTERNS[pattern]), jnp.bfloat16)


@some("gna", "spans")
def test_documents(pattern: str) -> None:
    contract.test_packed_equals_separate(case("swa", PATTERNS[pattern]))


@pytest.mark.slow
@EACH
@pytest.mark.parametrize(
    "test",
    [
        lambda mixer: contract.test_prefill_then_steps_at_every_split(mixer, None, jnp.bfloat16),
        lambda mixer: contract.test_two_calls_equal_one_at_every_split(mixer, (1, 8, 1, 6, 5)),
        lambda mixer: contract.test_the_future_does_not_change_the_past(mixer, 1e3),
        contract.test_documents_padding_and_neighbours_do_not_leak,
        contract.test_a_row_of_padding_leaves_the_state_alone,
        contract.test_starts_forgets_the_state,
        lambda mixer: contract.test_extremes_stay_finite(mixer, jnp.float32),
    ],
)
def test_the_rest_of_the_contract(pattern: str, test: Any) -> None:
    test(case("swa", PATTERNS[pattern]))


WIDE: dict[str, dict[str, Any]] = {
    "gna": {"window": T},
    "s2": {"s2": {"block": 4, "local": 8}},
    "shifted_groups": {"window": 2 * T, "shift_fraction": 0.5},
    "spans": {"spans": {"block": 4, "length": T, "rules": [[[0, 2], [32, 0]]]}},
    "log_bands": {"window": T},
}


@some("s2", "shifted_groups")
def test_a_pattern_that_hides_nothing_is_causal_attention(pattern: str) -> None:
    """With the parameters of attn: equal outputs, and equal gradients of parameters and inputs."""
    sizes = {"heads": 4, "kv_heads": 2, "key_dim": 8}
    options = {**sizes, "pattern": pattern, **WIDE[pattern]}
    made = {
        name: mixers.get(name)(D, build(mixers.get(name).Config, o).fill(D), rngs=nnx.Rngs(0))
        for name, o in (("attn", sizes), ("swa", options))
    }
    ids, do = jnp.asarray(segments((19, 9), T)[None]), normal(1, 1, T, D)
    weight = (np.asarray(ids) != 0)[..., None] * do

    def loss(state: Any, x: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
        y = nnx.merge(nnx.split(made[name])[0], state)(x, Context.of(x, ids))[0]
        return jnp.sum(y * weight), y

    x, state = normal(0, 1, T, D), nnx.split(made["attn"])[1]
    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    want, got = (run(state, x, name) for name in ("attn", "swa"))
    assert_trees_close(pattern, nnx.to_pure_dict(got[0][0]), nnx.to_pure_dict(want[0][0]), TOLERANCE["fp32_op"])
    assert_close("dx", got[0][1], want[0][1], TOLERANCE["fp32_op"])
    assert_close("y", got[1][:, :28], want[1][:, :28], TOLERANCE["fp32_op"])


@pytest.mark.parametrize(
    ("options", "held"),
    [
        ({"pattern": "gna", "window": 8, "gna": {"stride": 4}}, 8),
        ({"pattern": "gna", "window": 8, "gna": {"dilation": 3}}, 22),
        ({"pattern": "s2", "s2": {"block": 4, "local": 2, "vert_stride": 5}}, 2 * 4 + 2048 // 5 // 4 * 4 - 4),
        ({"pattern": "shifted_groups", "window": 16, "sink_tokens": 3}, 19),
        ({"pattern": "spans", "spans": {"block": 4, "rules": [[[8, 0], [16, 0]]]}}, 4 + 16),
        ({"pattern": "log_bands", "window": 16}, 16 + 8 * 7),
    ],
    ids=lambda x: x["pattern"] if isinstance(x, dict) else None,
)
def test_a_cache_is_bounded(options: dict[str, Any], held: int) -> None:
    """Slots for a document of 2048 tokens: a few blocks more or less than what a query sees."""
    cfg = build(mixers.get("swa").Config, {"heads": 4, "kv_heads": 2, "key_dim": 8, **options}).fill(D)
    assert abs(cfg.lifetimes.slots(2048) - held) <= 8
    states = [
        jax.eval_shape(lambda n=n: mixers.get("swa")(D, cfg, rngs=nnx.Rngs(0)).init_state(1, n, jnp.float32))
        for n in (2048, 4096)
    ]
    assert states[0]["k"].shape[1] == cfg.lifetimes.slots(2048) <= states[1]["k"].shape[1]


def test_groups_do_not_see_the_end_of_the_row() -> None:
    """The trap of shifting by a roll: tokens of the first half group would attend to the last ones."""
    mixer = case("swa", PATTERNS["shifted_groups"])
    x = np.stack([normal(0, T, D)] * 2)
    x[1, T - 3 :] += 1
    y, _ = jax.jit(mixer)(mixer.params, x)
    assert np.array_equal(y[0, : T - 3], y[1, : T - 3])


def test_spans_come_from_a_file(tmp_path: pathlib.Path) -> None:
    """{"layers": [[[α, β] per head] per layer]}: the last ⌊α/block⌋ + ⌊β N/block⌋ blocks, at least the query's own."""
    path = tmp_path / "spans.json"
    path.write_text(json.dumps({"layers": [[[0, 0.25], [9, 0]], [[-64, 1], [1, 0]]]}))
    options = {"heads": 4, "kv_heads": 2, "pattern": "spans", "spans": {"file": str(path), "length": 64, "block": 4}}
    cfg = build(mixers.get("swa").Config, options).fill(D)
    assert cfg.lifetimes.blocks == ((4, 2), (1, 1))
    assert hash(cfg) == hash(build(mixers.get("swa").Config, options).fill(D))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"pattern": "gna", "window": 4, "gna": {"stride": 5}}, "gna.stride = 5: expected at most window = 4"),
        ({"pattern": "gna", "sink_tokens": 2, "gna": {"dilation": 2}}, "sink_tokens = 2: expected 0 with gna.dilation"),
        ({"pattern": "s2", "s2": {"num_dense_heads": 3}}, "s2.num_dense_heads = 3: expected at most kv_heads = 2"),
        ({"pattern": "s2", "s2": {"num_dense_heads": 1, "homo_head": True}}, "expected 0 with s2.homo_head"),
        ({"pattern": "shifted_groups", "shift_fraction": 0.4}, "shift_fraction = 0.4: shifts none of 2 heads"),
        ({"pattern": "shifted_groups", "shift_fraction": 0.6}, "expected a number from 0 to 0.5"),
        ({"pattern": "spans"}, "spans.rules = (): expected (α, β) for each of kv_heads = 2"),
        ({"pattern": "spans", "spans": {"rules": [[[1, 0]]]}}, "for each of kv_heads = 2, in every layer"),
        ({"pattern": "spans", "spans": {"file": "nowhere.json"}}, "spans.file = 'nowhere.json': expected a JSON file"),
        ({"pattern": "stars"}, "pattern = 'stars': expected one of window, gna"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build(mixers.get("swa").Config, {"heads": 4, "kv_heads": 2, **options}).fill(D)
    assert line in str(refused.value) and "\n" not in str(refused.value)
