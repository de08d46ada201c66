"""The matrix of a layer against what the layer reads, the matrix of its op and formulas; rollout and attribution."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax import mixers
from hydrax.core.build import build
from hydrax.core.numerics import fp32
from hydrax.interp import effective_attention as ea
from hydrax.mixers import Context
from hydrax.models import lm
from hydrax.models.spec import ModelConfig
from hydrax.ops import linear, scan, softmax
from tests.contract import cases
from tests.tolerances import TOLERANCE, assert_close, assert_equal

T = 21
IDS = np.stack([cases.segments([1, 9, 8], T), cases.segments([21], T)])
X = cases.normal(0, 2, T, cases.D)
OTHERS = {"gated_conv", "lstm", "max_pool", "mlp", "token_gate"}  # a bias, no linear mixing, no mixing
LINEAR = sorted(set(mixers.names()) - OTHERS)
TOKENS = np.random.default_rng(0).integers(0, 50, (2, 11)).astype(np.int32)
TOKEN_IDS = jnp.asarray(np.stack([cases.segments([4, 5], 11), cases.segments([11], 11)]))


def mixer_and_context(name: str) -> tuple[mixers.Mixer, Context]:
    case = cases.case(name)
    ctx = Context.of(jnp.asarray(X), jnp.asarray(IDS), **cases.LAYER)
    return case.merge(case.params), ctx


@functools.cache
def probed(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The matrix of a layer, its values and its reads."""
    mixer, ctx = mixer_and_context(name)

    def run(x: jax.Array) -> tuple:
        return ea.probe(mixer, x, ctx), *ea._observe(mixer, x, ctx, lambda v: v)

    return tuple(map(np.asarray, jax.jit(run)(X)))


@pytest.mark.thorough
@pytest.mark.parametrize("name", LINEAR)
def test_a_layer_reads_its_matrix_times_its_values(name: str) -> None:
    A, v, o = probed(name)
    heads = A.shape[1]
    v = np.repeat(v, heads // v.shape[2], axis=2)
    product = np.einsum("bhij,bjhv->bihv", A, v.reshape(2, T, heads, -1)).reshape(o.shape)
    assert_close("A v", product, o, TOLERANCE["fp32_op"])
    apart = (IDS[:, :, None] != IDS[:, None]) | (IDS[:, None] == 0) | ~np.tri(T, dtype=bool)
    assert_equal("entries of the future and of other documents", A * apart[:, None], np.zeros_like(A))


def test_the_layer_has_the_matrix_of_its_op() -> None:
    mixer, ctx = mixer_and_context("gla")
    q, k, x = mixer.q(X), mixer.k(X), mixer.decay_up(mixer.decay_down(X))
    g = jax.nn.log_sigmoid(x) / mixer.cfg.gate_divisor
    expected = linear.attention_matrix(q, k, g, segment_ids=ctx.segment_ids)
    assert_close("A", probed("gla")[0], expected, TOLERANCE["fp32_op"])


@pytest.mark.thorough
def test_softmax_layers_have_their_weights() -> None:
    mixer, ctx = mixer_and_context("swa")
    q, k, _ = mixer.qkv(X, ctx.positions)
    c = mixer.cfg
    options = {"window": c.window, "sink_tokens": c.sink_tokens, "sinks": mixer.sinks[...]}
    expected = softmax.attention_matrix(q, k, segment_ids=ctx.segment_ids, **options)
    assert_close("A", probed("swa")[0], expected, TOLERANCE["fp32_op"])


def test_mamba_has_the_matrix_of_the_paper() -> None:
    """arXiv 2403.01590 eq. 11 in fp64: Σ_n C_in exp(A_dn Σ_{j<l<=i} Δ_ld) Δ_jd B_jn, of the convolved x."""
    mixer, ctx = mixer_and_context("mamba")
    x, _ = mixer.x_conv(mixer.x(X), segment_ids=ctx.segment_ids)
    dt = jax.nn.softplus(fp32(mixer.step_up(mixer.step_down(x))) + mixer.dt_bias[...])
    rates, b, c = -jnp.exp(mixer.A_log[...]), mixer.b(x), mixer.c(x)
    found = probed("mamba")[0]
    assert_close("A", found, scan.attention_matrix_selective(dt, rates, b, c, segment_ids=ctx.segment_ids), 1e-5)
    dt, rates, b, c = (np.asarray(a, np.float64) for a in (dt, rates, b, c))
    expected = np.zeros(found.shape)
    for row, i, j in np.ndindex(2, T, T):
        if j <= i and IDS[row, i] == IDS[row, j] != 0:
            decay = np.exp(rates * dt[row, j + 1 : i + 1].sum(0)[:, None])
            expected[row, :, i, j] = (decay * c[row, i] * b[row, j]).sum(-1) * dt[row, j]
    assert_close("A", found, expected, TOLERANCE["fp32_op"])


@pytest.mark.thorough
def test_steps_of_mamba2_belong_to_its_matrix() -> None:
    mixer, ctx = mixer_and_context("mamba2")
    (c, _), (b, _) = (
        conv(f(X), segment_ids=ctx.segment_ids) for conv, f in ((mixer.c_conv, mixer.c), (mixer.b_conv, mixer.b))
    )
    g, dt = mixer.decay(mixer.step_size(X))
    expected = linear.attention_matrix(c, b, g, scale=1.0, segment_ids=ctx.segment_ids)
    assert_close("A", probed("mamba2")[0], expected * jnp.moveaxis(dt, 1, 2)[:, :, None], TOLERANCE["fp32_op"])


@pytest.mark.thorough
def test_hgrn_averages_what_it_has_seen() -> None:
    """With λ bounded by 0, rows sum to 1 - λ_1 ... λ_i: what the initial state of zeros has lost."""
    mixer, _ = mixer_and_context("hgrn")
    kept = np.asarray(jax.nn.sigmoid(mixer.forget(X)), np.float64)
    expected = 1 - np.stack([kept[1, : i + 1].prod(0) for i in range(T)])
    assert_close("rows", probed("hgrn")[0][1].sum(-1).T, expected, TOLERANCE["fp32_op"])


@pytest.mark.thorough
def test_channels_with_matrices_of_their_own_are_averaged_in_groups() -> None:
    mixer, ctx = mixer_and_context("mamba")
    found = jax.jit(lambda x: ea.probe(mixer, x, ctx, groups=3))(X)
    every = probed("mamba")[0]
    assert_close("groups", found, every.reshape(2, 3, -1, T, T).mean(2), TOLERANCE["fp32_op"])


@pytest.mark.parametrize(
    ("name", "tokens", "groups", "message"),
    [
        ("gated_conv", 2, None, "GatedConv is not linear in its values"),
        ("mlp", 2, None, "MLP is not linear in its values"),
        ("mamba", 2, 7, "groups = 7: expected a divisor of 24 channels"),
        ("gla", ea.LONGEST + 1, None, "T = 4097: expected at most 4096"),
    ],
)
def test_what_has_no_matrix_is_refused(name: str, tokens: int, groups: int | None, message: str) -> None:
    mixer, _ = mixer_and_context(name)
    x = jnp.zeros((1, tokens, cases.D))
    with pytest.raises(ValueError, match=message):
        ea.probe(mixer, x, Context.of(x), groups=groups)


# ------------------------------------------------------------------------------------------------------ a whole model


@functools.cache
def model() -> lm.LM:
    """Two periods and an odd layer; decays of lightning and bounds of hgrn2 depend on the depth of the layer."""
    own = {name: dict(mixers.row(name).tiny) for name in ("lightning", "attn", "hgrn2")}
    options = {"d_model": 16, "pattern": "2*(lightning,attn),hgrn2", "vocab_size": 50, "ffn_dim": 24, "mixers": own}
    plan = lm.blueprint(build(ModelConfig, options))
    return plan.merge(jax.jit(plan.init)(jax.random.key(0)))


@pytest.mark.thorough
def test_walking_through_a_model_is_running_it() -> None:
    seen = []

    def visit(block: object, x: jax.Array, ctx: Context) -> Context:
        seen.append((type(block.mixer).__name__, int(ctx.layer_index)))
        return ctx

    net = model()
    walked = ea.walk(net, TOKENS, visit, TOKEN_IDS)
    assert_close("hidden", walked, jax.jit(lambda: net.hidden(TOKENS, TOKEN_IDS))(), TOLERANCE["fp32_model"])
    assert seen == [("Lightning", 0), ("Attention", 1), ("Lightning", 2), ("Attention", 3), ("HGRN2", 4)]


@pytest.mark.thorough
def test_every_layer_of_a_model_has_a_matrix() -> None:
    net = model()
    found = jax.jit(lambda tokens: ea.matrices(net, tokens, TOKEN_IDS))(TOKENS)
    assert [A.shape for A in found] == [(2, h, 11, 11) for h in (2, 4, 2, 4, 2)]
    real = np.asarray(TOKEN_IDS != 0)
    for A in (found[1], found[3]):
        assert_close("rows of softmax", A.sum(-1), np.broadcast_to(real[:, None], A.shape[:3]), TOLERANCE["fp32_op"])
    assert_close("rows of R", ea.rollout([ea.head_mean(A) for A in found]).sum(-1), np.ones((2, 11)), 1e-5)


@pytest.mark.thorough
def test_gradients_are_the_slopes_of_the_score() -> None:
    """Central differences over pushes to z at one token of both rows; wide ones, since the model runs in fp32."""
    net = model()

    def score(logits: jax.Array) -> jax.Array:
        return logits[0, 8, 7] - logits[1, 10].mean()

    found = jax.jit(lambda tokens: ea.gradients(net, tokens, score, TOKEN_IDS))(TOKENS)
    assert found.shape == (5, 2, 11)
    assert_equal("of padding", found[:, 0, 9:], np.zeros((5, 2)))
    size = float(jnp.sqrt(jnp.mean(found**2)))  # gradients of decays are sums that cancel: here they leave rounding
    assert_close("of another document", found[:, 0, :4], np.zeros((5, 4)), TOLERANCE["fp32_op"], floor=size)

    @jax.jit
    def pushed(layer: jax.Array, token: jax.Array, size: jax.Array) -> jax.Array:
        def visit(block: object, x: jax.Array, ctx: Context) -> Context:
            here = (ctx.layer_index == layer) * (jnp.arange(11) == token) * size
            return dataclasses.replace(ctx, taps={"heads": lambda z: z + here[:, None, None] / z[0, 0].size})

        return score(net.logits(ea.walk(net, TOKENS, visit, TOKEN_IDS))[..., :50])

    for layer, token in ((0, 8), (1, 8), (2, 6), (3, 6), (4, 10)):
        slope = (pushed(layer, token, 0.2) - pushed(layer, token, -0.2)) / 0.4
        assert_close(f"layer {layer}, token {token}", found[layer, :, token].sum(), slope, 1e-2)


# ------------------------------------------------------------------------------------------------------- what to show

A = np.array([[[[0.0, 0.0, 0.0], [-3.0, 1.0, 0.0], [0.0, 2.0, 2.0]], [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0] * 3]]])


def test_views() -> None:
    assert_equal("signed", ea.head_mean(A, "signed"), A.mean(1))
    assert_equal("absolute", ea.head_mean(A, "absolute"), np.abs(A).mean(1))
    rows = [[0.5, 0, 0], [(0.75 + 0.5) / 2, (0.25 + 0.5) / 2, 0], [0, 0.25, 0.25]]
    assert_close("normalised", ea.head_mean(A), [rows], 1e-7)


def test_rollout_is_the_product_from_the_last_layer_to_the_first() -> None:
    first = np.array([[[0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])
    last = np.array([[[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 0.0]]])
    steps = np.array([[1, 0, 0], [1 / 3, 2 / 3, 0], [0, 0, 1]]), np.array([[1, 0, 0], [0, 1, 0], [0.25, 0.5, 0.25]])
    assert_close("R", ea.rollout([first, last])[0], steps[1] @ steps[0], 1e-6)


def test_attribution_rolls_out_what_raises_the_score() -> None:
    layer = np.array([[[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [2.0, -1.0, 0.0]]])
    slopes = np.array([[[0.0, -2.0, 0.5]]])
    step = np.array([[1, 0, 0], [2 / 3, 1 / 3, 0], [0.5, 0, 0.5]])
    assert_close("R", ea.attribution([layer, layer], np.concatenate([slopes, slopes]))[0], step @ step, 1e-6)
