"""Which parameters decay, which are orthogonalised, and that layers do not mix."""

import jax
import numpy as np
import optax
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.models.lm import ParamMeta
from hydrax.train.optim import MUON_RMS, OptimConfig, make_optimizer
from hydrax.train.state import init_state
from hydrax.train.step import make_train_step
from tests.tolerances import assert_close, assert_equal
from tests.train import tiny

META = {
    "embed": ParamMeta(("vocab", "embed"), False, None, True),
    "norm": ParamMeta(("layers", "norm"), False, None, False),
    "q": ParamMeta(("layers", "embed", "heads", "state_k"), True, ((-3,), (-2, -1)), True),
    "out": ParamMeta(("heads", "state_v", "embed"), True, ((-3, -2), (-1,)), True),
}
SHAPES = {"embed": (7, 6), "norm": (3, 6), "q": (3, 6, 2, 4), "out": (2, 4, 6)}


def optimizer(meta=META, **options):
    settings = {"lr": 0.1, "schedule": "constant", "warmup": 0, "final_fraction": 1.0} | options
    return make_optimizer(build(OptimConfig, settings), 10, meta)


def normal(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def update(tx, grads, params, state=None):
    """(updates, state) of one update, the first if no state is given."""
    return jax.jit(tx.update)(grads, jax.jit(tx.init)(params) if state is None else state, params)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_what_is_marked_decays(name):
    params, zeros = normal(0), jax.tree.map(np.zeros_like, normal(0))
    updates, _ = update(optimizer(name=name, weight_decay=0.5), zeros, params)
    new = {path: params[path] + np.asarray(updates[path]) for path in params}
    for path, meta in META.items():
        if meta.decay:
            assert_close(path, new[path], (1 - 0.1 * 0.5) * params[path], 1e-6)
        else:
            assert_equal(path, new[path], params[path])


def test_muon_takes_the_matrices_and_adam_the_rest():
    """The labels are read off the state: a Muon parameter has one moment, an Adam parameter two."""
    plan = tiny.plan()
    params = jax.eval_shape(plan.init, jax.random.key(0))
    state = jax.eval_shape(optimizer(plan.meta, name="muon").init, params)
    moments: dict[str, int] = dict.fromkeys(params, 0)
    for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]:
        owner = getattr(path[-1], "key", None)
        if owner in moments:
            moments[owner] += 1
    assert moments == {name: 2 if meta.matrix is None else 1 for name, meta in plan.meta.items()}
    assert moments["embed/weight"] == 2
    assert sum(n == 1 for n in moments.values()) >= 4  # q, k, v, o


def test_stacked_layers_are_orthogonalised_one_by_one():
    # In fp64: Newton-Schulz amplifies rounding up to 3.4^5 times where singular values are small.
    with jax.enable_x64(True):
        grads = {name: g.astype(np.float64) for name, g in normal(1).items()}
        together, _ = update(optimizer(name="muon", weight_decay=0.0, clip=None), grads, grads)
        for layer in range(3):
            one = {"q": grads["q"][layer]}
            alone, _ = update(optimizer({"q": META["q"]}, name="muon", weight_decay=0.0, clip=None), one, one)
            assert_close(f"layer {layer}", together["q"][layer], alone["q"], 1e-12)


@pytest.mark.parametrize(("name", "rows", "columns"), [("q", 6, 8), ("out", 8, 6)])
def test_muon_updates_are_orthogonal_with_the_size_of_adams(name, rows, columns):
    grads = normal(1)
    updates, _ = update(optimizer(name="muon", weight_decay=0.0), grads, grads)
    matrices = np.asarray(updates[name]).reshape(-1, rows, columns)
    singular = np.linalg.svd(matrices, compute_uv=False) / (0.1 * MUON_RMS * max(rows, columns) ** 0.5)
    assert singular.min() > 0.5  # Newton-Schulz with these coefficients ends between 0.7 and 1.2
    assert singular.max() < 1.3


def test_gradients_are_clipped_by_their_global_norm():
    grads = jax.tree.map(lambda g: 1e3 * g, normal(1))
    _, state = update(optimizer(clip=0.5, b1=0.75), grads, grads)
    moments = [x for path, x in jax.tree_util.tree_flatten_with_path(state)[0] if ".mu" in jax.tree_util.keystr(path)]
    assert len(moments) == len(SHAPES)
    np.testing.assert_allclose(optax.tree.norm(moments), 0.25 * 0.5, rtol=1e-5)


def test_the_rate_follows_the_schedule():
    grads = normal(1)
    tx = optimizer(warmup=4, weight_decay=0.0)
    first, state = update(tx, grads, grads)
    second, _ = update(tx, grads, grads, state)
    # Adam's direction for a constant gradient is its sign, so sizes are rates.
    np.testing.assert_allclose(np.median(np.abs(first["q"])), 0.1 / 4, rtol=1e-3)
    np.testing.assert_allclose(np.median(np.abs(second["q"])), 0.2 / 4, rtol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_balancing_biases_step_by_the_sign_and_count_in_no_norm(name):
    meta = META | {"bias": ParamMeta(("router",), False, None, False, rule="balance")}
    params, grads = ({**normal(seed), "bias": np.zeros(4, np.float32)} for seed in range(2))
    grads["bias"] = np.array([3000, -2000, 0, 1e-3], np.float32)
    tx, usual = optimizer(meta, name=name, balance_rate=0.5, clip=0.1), optimizer(name=name, clip=0.1)
    updates, _ = tx.update(grads, tx.init(params), params)
    without = {key: x for key, x in params.items() if key != "bias"}
    expected, _ = usual.update({key: grads[key] for key in SHAPES}, usual.init(without), without)
    assert_equal("bias", updates.pop("bias"), np.array([-0.5, 0.5, 0.0, -0.5], np.float32))
    for key, expected_update in expected.items():
        assert_equal(key, updates[key], expected_update)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_rates_scale_what_their_first_pattern_fits_and_0_freezes(name):
    params, grads = normal(0), normal(1)
    plain, _ = update(optimizer(name=name, clip=None), grads, params)
    tx = optimizer(name=name, clip=None, rates={"embed": 0, "q": 0.25, "*": 0.5})
    updates, state = update(tx, grads, params)
    for path, factor in {"embed": 0.0, "q": 0.25, "norm": 0.5, "out": 0.5}.items():
        assert_close(path, updates[path], factor * np.asarray(plain[path]), 1e-6)
    shapes = {np.shape(leaf) for leaf in jax.tree.leaves(state)}
    assert SHAPES["out"] in shapes and SHAPES["embed"] not in shapes  # no moments of what is frozen


def test_what_is_frozen_counts_in_no_norm():
    params, grads = normal(0), normal(1)
    rest = {path: meta for path, meta in META.items() if path != "out"}
    few = {path: grads[path] for path in rest}, {path: params[path] for path in rest}
    expected, _ = update(optimizer(rest, clip=0.1), *few)
    updates, _ = update(optimizer(clip=0.1, rates={"out": 0}), grads, params)
    for path in rest:
        assert_close(path, updates[path], np.asarray(expected[path]), 1e-6)
    assert not np.asarray(updates["out"]).any()

    plan = tiny.plan()
    how = {"tx": optimizer(plan.meta), "schedule": lambda n: 0.1}
    state = jax.jit(lambda key: init_state(plan, how["tx"], key))(jax.random.key(0))
    norms = [
        jax.jit(make_train_step(plan, **how, frozen=still))(state, tiny.batch(2, 8))[1]["grad_norm"]
        for still in ((), ("embed/weight",))
    ]
    assert norms[0] > norms[1] > 0


def test_wrong_rates_are_named():
    with pytest.raises(ConfigError, match=r"optim\.rates = 'attn/\*': fits no parameter; expected a pattern"):
        optimizer(rates={"attn/*": 0.5})
    with pytest.raises(ConfigError, match=r"optim\.rates\.q = -1\.0: expected a number >= 0"):
        build(OptimConfig, {"rates": {"q": -1}}, "optim")
    with pytest.raises(ConfigError, match=r"optim\.rates\.q = 'slow': expected a number"):
        build(OptimConfig, {"rates": {"q": "slow"}}, "optim")
