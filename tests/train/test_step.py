"""The pure step: accumulation, bad batches, precision, meshes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from hydrax.core.build import build
from hydrax.models.lm import blueprint
from hydrax.models.spec import ModelConfig
from hydrax.parallel.mesh import AXES, MeshConfig, make_mesh
from hydrax.parallel.rules import batch_sharding
from hydrax.train.optim import OptimConfig, make_optimizer, make_schedule
from hydrax.train.state import abstract_state, new_state, shardings
from hydrax.train.step import NORM_STEPS, make_eval_step, make_train_step
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close
from tests.train import tiny

CONFIG = build(OptimConfig, {"lr": 1e-2, "warmup": 0, "weight_decay": 0.1})
ROWS, TOKENS = 8, 12


@functools.cache
def parts(**mesh):
    """Blueprint, optimizer, mesh and initial state; without sizes the mesh is one device."""
    plan = tiny.plan()
    one = jax.make_mesh((1,) * len(AXES), AXES, (AxisType.Auto,) * len(AXES), devices=jax.devices()[:1])
    mesh = make_mesh(build(MeshConfig, mesh)) if mesh else one
    tx = make_optimizer(CONFIG, 10, plan.meta)
    return plan, tx, mesh, new_state(plan, tx, 0, mesh)


@functools.cache
def train_step(accumulate=1, dtype="float32", spike=None, **mesh):
    plan, tx, mesh, _ = parts(**mesh)
    schedule = make_schedule(CONFIG, 10)
    how = {"dtype": jnp.dtype(dtype), "accumulate": accumulate, "z_loss": 1e-2, "spike": spike}
    step = make_train_step(plan, tx, schedule, **how)
    place = shardings(abstract_state(plan, tx, mesh))
    jitted = jax.jit(step, in_shardings=(place, batch_sharding(mesh)), out_shardings=(place, None))

    def run(state, batch):
        with jax.set_mesh(mesh):
            return jitted(state, batch)

    return run


def after(batches, **options):
    mesh = {k: v for k, v in options.items() if k not in ("accumulate", "dtype", "spike")}
    state, metrics = parts(**mesh)[3], {}
    for batch in batches:
        state, metrics = train_step(**options)(state, batch)
    return jax.device_get((state, metrics))


def test_accumulation_does_not_change_the_step():
    batch = tiny.batch(ROWS, TOKENS)
    counts = batch["weights"].reshape(ROWS // 4, 4, -1).sum((0, 2))
    assert counts.max() > 1.5 * counts.min()  # averaging the microbatches' means would not do
    state, metrics = after([batch])
    cut_state, cut_metrics = after([batch], accumulate=4)
    assert_trees_close("metrics", cut_metrics, metrics, 1e-6)
    assert_trees_close("params", cut_state["params"], state["params"], 1e-6)


def test_a_spike_of_the_gradient_is_skipped_and_moves_the_mean_little():
    calm = tiny.batch(ROWS, TOKENS)
    steep = calm | {"targets": np.zeros_like(calm["targets"])}  # always the same token: every row pulls alike
    state, metrics = after([calm], spike=1.5)
    mean = float(state["norm_mean"])
    assert metrics["taken"] == 1 and mean == pytest.approx(float(metrics["grad_norm"]))
    skipped, metrics = after([calm, steep], spike=1.5)
    assert metrics["grad_norm"] > 1.5 * mean
    assert (metrics["taken"], metrics["skipped"]) == (0, 1)
    assert_trees_close("params", skipped["params"], state["params"], 0.0)
    assert float(skipped["norm_mean"]) == pytest.approx(mean * (1 + 0.5 / NORM_STEPS))
    assert after([calm, steep])[1]["taken"] == 1  # without a limit


def test_a_bad_batch_leaves_everything_but_the_counters():
    good, bad = tiny.batch(ROWS, TOKENS), tiny.batch(ROWS, TOKENS, seed=1)
    bad["weights"] = np.where(bad["weights"] > 0, np.float32("nan"), 0).astype(np.float32)
    state, _ = after([good])
    skipped, metrics = after([good, bad])
    assert not np.isfinite(metrics["loss"])
    assert (int(skipped["step"]), int(skipped["skipped"]), int(metrics["skipped"])) == (2, 1, 1)
    for (path, a), e in zip(
        jax.tree_util.tree_flatten_with_path((skipped["params"], skipped["opt_state"]))[0],
        jax.tree.leaves((state["params"], state["opt_state"])),
        strict=True,
    ):
        assert_equal(jax.tree_util.keystr(path), a, e)
    assert (metrics["taken"], float(skipped["norm_mean"])) == (0, float(state["norm_mean"]))
    with_bad, rate = after([good, bad, good])
    without, expected = after([good, good])
    assert_trees_close("next step", with_bad["params"], without["params"], 0.0)
    assert rate["lr"] == expected["lr"]


def test_metrics_mean_what_they_say():
    batch = tiny.batch(ROWS, TOKENS)
    _, metrics = after([batch])
    assert {x.dtype for x in metrics.values()} == {np.dtype("float32")}
    assert metrics["tokens"] == batch["weights"].sum()
    bits = metrics["loss"] * metrics["tokens"] / math.log(2) / batch["bytes"].sum()
    np.testing.assert_allclose(metrics["bits_per_byte"], bits, rtol=1e-5)
    assert abs(metrics["loss"] - math.log(tiny.VOCABULARY)) < 0.7  # a fresh model is nearly uniform

    plan, _, _, state = parts()
    sums = jax.jit(make_eval_step(plan))(jax.device_get(state["params"]), batch)
    np.testing.assert_allclose(sums["nll"] / sums["tokens"], metrics["loss"], rtol=1e-5)  # without the z-loss
    assert sums["bytes"] == batch["bytes"].sum()


def test_bf16_computes_in_bf16_and_keeps_fp32_parameters():
    batch = tiny.batch(ROWS, TOKENS)
    state, metrics = after([batch], dtype="bfloat16")
    _, expected = after([batch])
    assert {x.dtype for x in jax.tree.leaves(state["params"])} == {np.dtype("float32")}
    assert metrics["loss"] != expected["loss"]
    assert_close("loss", metrics["loss"], expected["loss"], TOLERANCE["bf16_long"])
    assert_close("grad_norm", metrics["grad_norm"], expected["grad_norm"], TOLERANCE["bf16_long"])


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"replica": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_the_mesh_does_not_change_the_result(mesh):
    assert_trees_close("start", parts(**mesh)[3]["params"], parts()[3]["params"], 0.0)
    batch = tiny.batch(ROWS, TOKENS)
    state, metrics = after([batch, batch], **mesh)
    expected_state, expected = after([batch, batch])
    assert_trees_close("metrics", metrics, expected, TOLERANCE["fp32_op"])
    assert_trees_close("params", state["params"], expected_state["params"], TOLERANCE["fp32_model"])


def test_moments_lie_where_their_parameter_does():
    _, _, _, state = parts(fsdp=8)
    assert any(not x.sharding.is_fully_replicated for x in state["params"].values())
    moments = state["opt_state"][1].mu
    assert {k: x.sharding for k, x in moments.items()} == {k: x.sharding for k, x in state["params"].items()}
    assert state["step"].sharding.is_fully_replicated


def test_losses_of_layers_and_their_balance_take_part():
    """The router's own losses reach the objective and the metrics; the selection bias steps by the load alone."""
    values = {"d_model": 16, "vocab_size": 259, "pattern": "attn", "mixers": {"attn": {"heads": 2}}, "ffn": "moe"}
    batch = tiny.batch(4, TOKENS)

    def stepped(**moe):
        config = build(ModelConfig, {**values, "moe": {"experts": 4, "width": 8, "bias": True, **moe}})
        plan = blueprint(config)
        tx = make_optimizer(CONFIG, 10, plan.meta)
        step = make_train_step(plan, tx, make_schedule(CONFIG, 10))
        rng = np.random.default_rng(0)
        params = {k: rng.normal(0, 0.3, p.shape).astype(np.float32) for k, p in plan.shapes.items()}
        zero = jnp.zeros((), jnp.int32)
        state = {
            "params": params,
            "opt_state": tx.init(params),
            "step": zero,
            "skipped": zero,
            "norm_mean": jnp.zeros(()),
        }
        return params, *jax.device_get(jax.jit(step)(state, batch))

    params, state, metrics = stepped(balance=0.5, z_loss=0.1)
    _, other, silent = stepped(balance=0.0, z_loss=0.0)
    assert metrics["balance"] >= 0.5 * 0.99
    assert metrics["router_z"] > 0
    assert {"balance", "router_z"}.isdisjoint(silent)
    assert metrics["loss"] == silent["loss"]  # what is reported is the loss of predictions
    name = "periods/0/blocks/0/moe/router"
    assert np.abs(state["params"][name] - other["params"][name]).max() > 1e-4
    move = state["params"]["periods/0/blocks/0/moe/bias"] - params["periods/0/blocks/0/moe/bias"]
    assert set(np.round(np.abs(move).ravel() / CONFIG.balance_rate, 3)) <= {0.0, 1.0}
    assert move.min() < 0 < move.max()


def test_rows_of_one_document_need_not_say_so():
    _, _, _, state = parts()
    rows = tiny.batch(ROWS, TOKENS) | {"weights": np.ones((ROWS, TOKENS), np.float32)}
    del rows["segment_ids"], rows["positions"]
    facts = {
        "segment_ids": np.ones((ROWS, TOKENS), np.int32),
        "positions": np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (ROWS, TOKENS)),
    }
    (bare, metrics), (told, expected) = train_step()(state, rows), train_step()(state, rows | facts)
    assert_trees_close("parameters", bare["params"], told["params"], TOLERANCE["fp32_op"])
    assert_close("loss", metrics["loss"], expected["loss"], TOLERANCE["fp32_op"])


def test_what_a_step_draws_follows_from_its_number():
    """A mixer that draws: equal steps are equal, another number is another draw, and what it draws with is trained."""
    plan = tiny.plan(pattern="2*nats", mixers={"nats": {"heads": 2, "key_dim": 8, "sliding": 2}})
    tx, schedule = make_optimizer(CONFIG, 10, plan.meta), make_schedule(CONFIG, 10)
    step = jax.jit(make_train_step(plan, tx, schedule, accumulate=2))
    state = new_state(plan, tx, 0, parts()[2])
    batch = tiny.batch(ROWS, TOKENS)
    (new, metrics), (again, _), (_, other) = (step({**state, "step": jnp.int32(n)}, batch) for n in (3, 3, 4))
    for name, value in new["params"].items():
        assert_equal(name, again["params"][name], value)
    assert metrics["loss"] != other["loss"] and metrics["nats_sparsity"] > 0
    scorer = next(name for name in plan.shapes if name.endswith("scorer"))
    moved = np.abs(np.asarray(new["params"][scorer] - state["params"][scorer])).max((1, 2, 3))
    assert np.all(moved > CONFIG.lr / 2)  # by a gradient: its decay is far smaller
