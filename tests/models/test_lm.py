"""The language model around its layers: embeddings, vocabulary, precision, initialisation, remat."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from hydrax.core import tree
from hydrax.core.build import ConfigError, build
from hydrax.models import lm
from hydrax.models.spec import ModelConfig
from hydrax.models.stack import REMAT
from hydrax.ops.dispatch import KERNEL
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

MODEL = {
    "d_model": 16,
    "pattern": "2*(gla,attn)",
    "vocab_size": 50,
    "ffn_dim": 24,
    "mixers": {"gla": {"heads": 2}, "attn": {"heads": 2}},
}
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 11)).astype(np.int32)


def config(**values) -> ModelConfig:
    return build(ModelConfig, {**MODEL, **values})


@functools.cache
def start(remat: str = "none", **values) -> tuple[lm.Blueprint, dict[str, jax.Array]]:
    plan = lm.blueprint(config(**values), remat=remat)
    return plan, jax.jit(plan.init)(jax.random.key(0))


def gradients(plan: lm.Blueprint, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Of the mean log-likelihood over all rows of the table, those beyond the vocabulary included."""

    def loss(params):
        model = plan.merge(params)
        logits = model.logits(model.hidden(TOKENS))
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(TOKENS)[..., None], -1))

    return jax.jit(jax.grad(loss))(params)


def test_a_tied_table_is_read_twice_an_untied_one_once():
    (tied, params), (untied, apart) = start(), start(tie=False)
    assert "head/weight" not in params
    for plan, values, table in ((tied, params, "embed/weight"), (untied, apart, "head/weight")):
        hidden, logits = jax.jit(lambda p, plan=plan: ((m := plan.merge(p)).hidden(TOKENS), m(TOKENS)))(values)
        assert_close(table, logits, np.asarray(hidden) @ np.asarray(values[table])[:50].T, TOLERANCE["fp32_op"])
    same = {**apart, "head/weight": params["embed/weight"], "embed/weight": params["embed/weight"]}
    read, both = gradients(untied, same), gradients(tied, params)
    assert_close("embed", both["embed/weight"], read["embed/weight"] + read["head/weight"], TOLERANCE["fp32_op"])


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_rows_that_round_up_the_vocabulary_do_nothing(tie: bool):
    plan, params = start(tie=tie)
    table = "embed/weight" if tie else "head/weight"
    assert params[table].shape[0] == 128
    model = plan.merge(params)
    logits = model.logits(model.hidden(TOKENS))
    assert logits.shape == (*TOKENS.shape, 128)
    assert np.all(np.asarray(logits[..., 50:]) == -1e30)
    assert model(TOKENS).shape == (*TOKENS.shape, 50)
    assert_close("probability", jax.nn.softmax(logits)[..., :50].sum(-1), np.ones(TOKENS.shape), TOLERANCE["fp32_op"])
    assert not np.any(np.asarray(gradients(plan, params)[table][50:]))


def test_logits_are_soft_capped_before_the_mask():
    plan, params = start(logit_softcap=3.0)
    bare, _ = start()
    params = {**params, "norm/weight": 500.0 * params["norm/weight"]}
    raw, capped = bare.merge(params)(TOKENS), plan.merge(params)(TOKENS)
    assert np.abs(raw).max() > 6
    assert_close("logits", capped, 3 * np.tanh(np.asarray(raw) / 3), TOLERANCE["fp32_op"])


def test_bf16_runs_in_bf16_with_fp32_logits_and_gates():
    plan, params = start()
    cast = plan.cast(params, jnp.bfloat16)
    assert {k: v.dtype for k, v in cast.items()} == {
        k: jnp.dtype(jnp.bfloat16 if plan.meta[k].cast else jnp.float32) for k in params
    }
    assert cast["periods/0/blocks/0/mixer/norm/weight"].dtype == jnp.float32
    assert cast["periods/0/blocks/0/mixer/q/kernel"].dtype == jnp.bfloat16
    model = plan.merge(cast)
    assert model.hidden(TOKENS).dtype == jnp.bfloat16
    assert model(TOKENS).dtype == jnp.float32
    plan, params = start(pattern="2*attn")
    logits = plan.merge(plan.cast(params, jnp.bfloat16))(TOKENS)
    assert_close("logits", logits, plan.merge(params)(TOKENS), TOLERANCE["bf16_long"])


def test_the_blueprint_describes_the_parameters():
    plan, params = start(tie=False)
    assert {k: (v.shape, v.dtype) for k, v in params.items()} == {k: (s.shape, s.dtype) for k, s in plan.shapes.items()}
    for name, meta in plan.meta.items():
        assert len(meta.axes) == params[name].ndim, name
        assert (meta.axes[0] == "layers") == name.startswith("periods/"), name
        assert meta.cast or not meta.decay, f"{name} decays although it is a gate or norm"
        assert (meta.matrix is not None) == (name.endswith("/kernel")), name
    again = jax.jit(plan.init)(jax.random.key(0))
    other = jax.jit(plan.init)(jax.random.key(1))
    for name, value in params.items():
        assert_equal(name, again[name], value)
        assert name.endswith(("norm/weight", "bias")) or np.any(np.asarray(other[name] != value)), name


def test_every_layer_starts_differently_and_writes_less_in_deeper_models():
    """Layer i draws from the key of index i; what writes into the stream is scaled by 1/sqrt(2 depth)."""
    (_, short), (_, long) = start(pattern="2*gla"), start(pattern="8*gla")
    path = "periods/0/blocks/0/"
    for name in ("mixer/project/kernel", "ffn/down/kernel"):
        assert_close(name, long[path + name][:2] * 2, short[path + name], TOLERANCE["fp32_op"])
        std = float(jnp.std(short[path + name])) * math.sqrt(4) * math.sqrt(np.prod(short[path + name].shape[1:-1]))
        assert 0.9 < std < 1.1
    q = np.asarray(long[path + "mixer/q/kernel"]).reshape(8, -1)
    assert_equal("q", q[:2].reshape(-1), np.asarray(short[path + "mixer/q/kernel"]).reshape(-1))
    assert np.abs(np.corrcoef(q) - np.eye(8)).max() < 0.5


def test_positions_follow_from_the_documents_unless_given():
    plan, params = start()
    seg = jnp.asarray(np.repeat([[1, 2, 2, 3]], 2, 0).repeat([3, 1, 4, 3], axis=1), jnp.int32)
    model = plan.merge(params)
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2]] * 2, jnp.int32)
    assert_equal("logits", model(TOKENS, seg, positions), model(TOKENS, seg))
    assert np.any(np.asarray(model(TOKENS, seg, positions * 2) != model(TOKENS, seg)))


# -------------------------------------------------------------------------------------------------------------- remat


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_remat_changes_memory_and_not_gradients(remat: str):
    plan, params = start()
    again = lm.blueprint(config(), remat=remat)
    assert_trees_close("gradient", gradients(again, params), gradients(plan, params), TOLERANCE["fp32_op"])
    assert residual_bytes(again) < residual_bytes(plan)


def residual_bytes(plan: lm.Blueprint) -> int:
    """Bytes that the backward pass of a long row keeps."""
    tokens = jnp.zeros((1, 256), jnp.int32)
    pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: plan.merge(p).hidden(tokens), p)[1], plan.shapes)
    return tree.nbytes(pullback)


def test_remat_presets_keep_more_in_this_order():
    kept = [residual_bytes(lm.blueprint(config(), remat=name)) for name in ("full", "mixer", "dots", "none")]
    assert kept == sorted(set(kept))


@pytest.mark.parametrize("remat", ["full", "offload"])
def test_only_offload_keeps_what_periods_read_on_the_host(remat: str):
    plan = lm.blueprint(config(), remat=remat)
    program = str(jax.make_jaxpr(jax.grad(lambda p: plan.merge(p).hidden(TOKENS).sum()))(plan.shapes))
    assert ("<host>" in program) == (remat == "offload")


@pytest.mark.parametrize(("remat", "runs"), [("full", 2), ("mixer", 2), ("dots", 1)])
def test_kernels_run_again_only_where_that_saves_what_dots_keep(remat: str, runs: int):
    """`tanh` stands for a kernel: no other operation here is one."""

    def kernel(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = checkpoint_name(jnp.tanh(x), KERNEL)
        return y, y

    op = jax.custom_vjp(lambda x: kernel(x)[0])
    op.defvjp(kernel, lambda y, dy: (dy * (1 - y * y),))
    gradient = jax.grad(jax.checkpoint(lambda x: op(2 * x).sum(), policy=REMAT[remat]))
    assert str(jax.make_jaxpr(gradient)(jnp.ones(3))).count(" tanh ") == runs


@pytest.mark.parametrize("remat", ["none", "full"])
def test_unrolling_the_layer_scan_changes_nothing(remat: str):
    """Also where the periods are no multiple of `unroll`."""
    plan, params = start(pattern="3*(gla,attn)")
    unrolled = lm.blueprint(plan.cfg, remat=remat, unroll=2)
    assert_trees_close("gradient", gradients(unrolled, params), gradients(plan, params), TOLERANCE["fp32_op"])


def test_an_unknown_preset_is_refused():
    with pytest.raises(ConfigError, match=r"train\.remat = 'some': expected one of none, offload, full, mixer, dots"):
        lm.blueprint(config(), remat="some")


def test_the_program_grows_with_the_period_and_not_with_the_depth():
    def size(repeats: int) -> int:
        plan = lm.blueprint(config(pattern=f"{repeats}*(gla,attn)"))
        return str(jax.make_jaxpr(lambda p: plan.merge(p)(TOKENS))(plan.shapes)).count("\n")

    assert size(40) == size(2)


# -------------------------------------------------------------------------------------------------------------- build


def test_build_takes_dicts_and_configs():
    params = jax.tree.leaves(lm.nnx.state(lm.build(MODEL, seed=3)))
    same = jax.tree.leaves(lm.nnx.state(lm.build(config(), seed=3)))
    other = jax.tree.leaves(lm.nnx.state(lm.build(config(), seed=4)))
    assert all(np.array_equal(a, b) for a, b in zip(params, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(params, other, strict=True))
    with pytest.raises(ConfigError, match=r"model\.d_modl = 16: unknown key; did you mean 'd_model'"):
        lm.build({"d_modl": 16})
