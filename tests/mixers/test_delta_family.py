"""What is particular to deltanet, gdn and kda: what a write does, how each reduces to the next, decays, presets."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.core.typing import Array
from hydrax.mixers import Context, Mixer
from hydrax.mixers.linear import deltanet, gdn, kda
from hydrax.models import lm
from hydrax.models.spec import ModelConfig, resolve
from hydrax.nn.decay import DT_RANGE, BoundedDecay, StepDecay
from hydrax.nn.delta import DeltaConfig, DeltaInputs
from hydrax.ops.delta import delta_rule
from hydrax.parallel import rules
from hydrax.parallel.mesh import MeshConfig, make_mesh
from tests.contract.cases import normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal

pytestmark = pytest.mark.thorough

D, T = 32, 37
WIDTHS: dict[str, Any] = {"heads": 2, "key_dim": 8, "value_dim": 16, "chunk_size": 16}
SEG = np.stack([segments((20, 1, 11), T), segments((T,), T)])


def make(name: str, **options: Any) -> Mixer:
    """A mixer of which no parameter is 0 or 1."""
    cls = mixers.get(name)
    module = cls(D, build(cls.Config, {**WIDTHS, **options}).fill(D), rngs=nnx.Rngs(0))
    for i, (_, p) in enumerate(nnx.to_flat_state(nnx.state(module, nnx.Param))):
        p[...] = jnp.asarray(np.asarray(p[...]) + 0.1 * normal(i, *p.shape))
    return module


def share(source: Mixer, target: Mixer, **changed: Array) -> None:
    """`target` gets the parameters of `source`, or those of `changed`, path by path with _ for /."""
    given = {"_".join(map(str, path)): p[...] for path, p in nnx.to_flat_state(nnx.state(source, nnx.Param))} | changed
    for path, p in nnx.to_flat_state(nnx.state(target, nnx.Param)):
        value = given["_".join(map(str, path))]
        assert value.shape == p.shape, path
        p[...] = value


def run(module: Mixer) -> Array:
    @jax.jit
    def outputs(module: Mixer, x: Array) -> Array:
        return module(x, Context.of(x, jnp.asarray(SEG)))[0]

    return outputs(module, normal(0, 2, T, D))


# -------------------------------------------------------------------------------------------------- what a write does


def test_orthonormal_keys_with_beta_one_are_recalled_exactly():
    """Every key is written twice; what it holds is the second value."""
    K = 8
    keys = np.linalg.qr(normal(0, K, K))[0]
    k, v = jnp.concatenate([keys, keys])[None, :, None], jnp.asarray(normal(1, 1, 2 * K, 1, 5))
    _, S = delta_rule(k, k, v, jnp.ones((1, 2 * K, 1)), impl="chunked", chunk_size=16)
    assert_close("recalled", keys @ S[0, 0], v[0, K:, 0], TOLERANCE["fp32_op"])


def test_beta_two_reflects():
    """Writing v = 0 flips the sign of what the key holds and leaves everything orthogonal to it alone."""
    k, S = (jnp.asarray(normal(i, *shape)) for i, shape in enumerate([(1, 1, 1, 8), (1, 1, 8, 5)]))
    k /= jnp.linalg.norm(k)
    _, after = delta_rule(k, k, jnp.zeros((1, 1, 1, 5)), jnp.full((1, 1, 1), 2.0), initial_state=S)
    along = k[0, 0] @ S[0, 0]
    assert_close("along the key", k[0, 0] @ after[0, 0], -along, TOLERANCE["fp32_op"])
    assert_close("beside it", after[0, 0] + k[0, 0].T @ along, S[0, 0] - k[0, 0].T @ along, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("cls", [deltanet, gdn, kda])
def test_beta_reaches_two_where_negative_eigenvalues_are_allowed(cls: Any):
    for allow, bound in ((False, 1.0), (True, 2.0)):
        cfg = build(cls.Config, {**WIDTHS, "allow_neg_eigval": allow, "beta_bias": True}).fill(D)
        inputs = DeltaInputs(D, cfg, 2, rngs=nnx.Rngs(0))
        inputs.beta.bias[...] = jnp.array([30.0, -30.0])
        (_, _, _, beta), _ = inputs(x := jnp.zeros((1, 1, D)), Context.of(x), None)
        assert_close("β", beta[0, 0], [bound, 0.0], TOLERANCE["fp32_op"])


@pytest.mark.parametrize("activation", ["silu", "relu", "elu1", "identity"])
@pytest.mark.parametrize("norm", ["l2", "sum"])
def test_queries_and_keys(activation: str, norm: str):
    if norm == "sum" and activation in ("silu", "identity"):
        with pytest.raises(ConfigError, match="qk_norm = 'sum': expected l2"):
            DeltaConfig(qk_activation=activation, qk_norm=norm)
        return
    acts = {
        "silu": lambda y: y / (1 + np.exp(-y)),
        "relu": lambda y: np.maximum(y, 0),
        "elu1": lambda y: np.where(y > 0, y + 1, np.exp(y)),
        "identity": lambda y: y,
    }
    cfg = DeltaConfig(heads=2, key_dim=8, value_dim=4, conv_width=1, qk_activation=activation, qk_norm=norm)
    inputs, x = DeltaInputs(D, cfg, 2, rngs=nnx.Rngs(0)), normal(0, 2, 5, D)
    (*qk, v, _), _ = inputs(x, Context.of(x), None)
    for name, actual in zip("qk", qk, strict=True):
        kernel, taps = getattr(inputs, name).kernel[...], getattr(inputs, f"{name}_conv").weight[0]
        y = acts[activation](np.einsum("btd,dhk->bthk", x, kernel) * taps)
        size = np.sqrt((y**2).sum(-1, keepdims=True)) if norm == "l2" else y.sum(-1, keepdims=True)
        assert_close(name, actual, y / size, TOLERANCE["fp32_op"])
    y = np.einsum("btd,dhv->bthv", x, inputs.v.kernel[...]) * inputs.v_conv.weight[0]
    assert_close("v", v, acts["silu"](y), TOLERANCE["fp32_op"])


@pytest.mark.parametrize("name", ["deltanet", "gdn", "kda"])
def test_rope_turns_normalised_queries_and_keys(name: str):
    """Half of their channels, as complex numbers, by the positions in each document; values and β stay."""
    x, ctx = normal(2, 2, T, D), Context.of(jnp.zeros((2, T)), jnp.asarray(SEG))
    turned, plain = make(name, rope={"theta": 50.0, "fraction": 0.5}), make(name)
    share(turned, plain)
    found, bare = (m.inputs(x, ctx, None)[0] for m in (turned, plain))
    turns = np.exp(1j * np.asarray(ctx.positions)[..., None, None] * 50.0 ** (-np.arange(2) / 2))
    for part, actual, before in zip("qk", found[:2], bare[:2], strict=True):
        z = (np.asarray(before[..., :2]) + 1j * np.asarray(before[..., 2:4])) * turns
        expected = np.concatenate([z.real, z.imag, before[..., 4:]], axis=-1)
        assert_close(part, actual, expected, TOLERANCE["fp32_op"])
    for part, actual, before in zip(("v", "beta"), found[2:], bare[2:], strict=True):
        assert_equal(part, actual, before)


def test_rope_counts_from_the_start_of_a_document():
    """Two calls give what one call gives, though the second starts at a later position."""
    module, x = make("gdn", rope={}), jnp.asarray(normal(3, 1, T, D))

    @jax.jit
    def outputs(module: Mixer, x: Array) -> tuple[Array, Array]:
        whole, _ = module(x, Context.of(x))
        _, state = module(x[:, :9], Context.of(x[:, :9]), module.init_state(1, T, jnp.float32))
        return module(x[:, 9:], Context(positions=jnp.arange(9, T)[None]), state)[0], whole[:, 9:]

    assert_close("y", *outputs(module, x), TOLERANCE["fp32_op"])


# ---------------------------------------------------------------------------------------- each reduces to the next


def test_gdn_without_decay_is_deltanet():
    full, plain = make("gdn", allow_neg_eigval=True), make("deltanet", allow_neg_eigval=True, out_gate="silu")
    full.decay.A_log[...] = jnp.full(2, -200.0)
    share(full, plain)
    assert_close("y", run(full), run(plain), TOLERANCE["fp32_op"])


@pytest.mark.parametrize("out_gate", ["sigmoid", "silu"])
def test_kda_with_equal_decays_over_a_head_is_gdn(out_gate: str):
    vector, scalar = make("kda", out_gate=out_gate), make("gdn", out_gate=out_gate)
    vector.decay.dt_bias[...] = jnp.broadcast_to(vector.decay.dt_bias[:, :1], (2, 8))
    vector.decay_up.kernel[...] = jnp.broadcast_to(vector.decay_up.kernel[..., :1], (16, 2, 8))
    share(
        vector,
        scalar,
        step_size_kernel=vector.decay_down.kernel @ vector.decay_up.kernel[..., 0],
        decay_dt_bias=vector.decay.dt_bias[:, 0],
        gate_kernel=jnp.einsum("dr,rhv->dhv", vector.gate_down.kernel[...], vector.gate_up.kernel[...]),
    )
    assert_close("y", run(vector), run(scalar), TOLERANCE["fp32_op"])


def test_grouped_value_heads_equal_repeated_keys():
    grouped, repeated = make("gdn", value_heads=4), make("gdn", heads=4)
    shared = {f"inputs_{name}_kernel": getattr(grouped.inputs, name).kernel for name in "qk"}
    shared |= {f"inputs_{name}_conv_weight": getattr(grouped.inputs, f"{name}_conv").weight for name in "qk"}
    share(grouped, repeated, **{name: jnp.repeat(w[...], 2, axis=1) for name, w in shared.items()})
    assert_close("y", run(grouped), run(repeated), TOLERANCE["fp32_op"])


@pytest.mark.parametrize("name", ["deltanet", "gdn", "kda"])
def test_the_output_gate_multiplies_normalised_heads(name: str):
    module, x = make(name, out_gate="silu", norm_eps=1e-12), normal(1, 1, 5, D)
    bare = make(name, out_gate="none", norm_eps=1e-12)
    share(module, bare)
    z, plain = (m.mix(x, Context.of(x), None)[0] for m in (module, bare))
    gate = module.gate_up(module.gate_down(x)) if name == "kda" else module.gate(x)
    assert_close("z", z, plain * jax.nn.silu(gate), TOLERANCE["fp32_op"])
    square = (np.asarray(plain / module.norm.weight[...]) ** 2).mean(-1)
    assert_close("mean square of a head", square, np.ones((1, 5, 2)), TOLERANCE["fp32_op"])


# --------------------------------------------------------------------------------------------------------- decays


def test_safe_gates_stay_above_their_limit():
    decay, a = BoundedDecay(3, 4, lower_limit=-2.5, rngs=nnx.Rngs(0)), 2 * normal(0, 50, 3, 4)
    decay.A_log[...] = jnp.log(jnp.array([0.5, 1.0, 3.0]))
    g, _ = decay(jnp.asarray(a))
    rates = np.array([0.5, 1.0, 3.0])[:, None]
    assert_close("g", g, -2.5 / (1 + np.exp(-rates * (a + decay.dt_bias[...]))), TOLERANCE["fp32_op"])
    g, _ = decay(1e4 * a)
    assert -2.5 <= g.min() < -2.4 and -0.1 < g.max() <= 0


@pytest.mark.parametrize("decay", [
    StepDecay(2, 3, rates=(1.0, 16.0), rngs=nnx.Rngs(0)),
    BoundedDecay(2, 3, lower_limit=-5.0, rngs=nnx.Rngs(0)),
], ids=["step", "bounded"])  # fmt: skip
def test_huge_rates_have_finite_gradients(decay: nnx.Module):
    decay.A_log[...] = jnp.array([90.0, 1e4])
    graph, state = nnx.split(decay)
    a = jnp.array([-1e4, -1.0, 0.0, 1e-8, 1.0, 1e4])[:, None, None] - decay.dt_bias[...]

    def total(state: nnx.State, a: Array) -> Array:
        return nnx.merge(graph, state)(a)[0].sum()

    for leaf in jax.tree.leaves((total(state, a), jax.grad(total, argnums=(0, 1))(state, a))):
        assert np.isfinite(np.asarray(leaf)).all()


def test_kda_reaches_its_limit_and_no_further():
    module, x = make("kda", safe_gate=True, lower_limit=-4.0), 1e3 * normal(0, 1, T, D)
    g, _ = module.decay(module.decay_up(module.decay_down(x)))
    assert g.shape == (1, T, 2, 8) and g.dtype == jnp.float32
    assert -4 <= g.min() < -3.99 and -0.01 < g.max() <= 0
    assert np.ptp(np.asarray(g), axis=-1).max() > 3  # the channels of a head differ


def test_decays_start_in_their_ranges_wherever_they_are_made():
    """Made inside jit, each device its part. Of the parameters, only decays are compiled."""
    head = {"heads": 256, "key_dim": 4, "value_dim": 4}
    options = {"gdn": head, "kda": {**head, "gate_rank": 2}, "mamba2": {"key_dim": 4, "value_dim": 2}}
    blocks = {
        "safe": {"mixer": "kda", "options": {**options["kda"], "safe_gate": True}},
        "ones": {"mixer": "gdn", "options": {**head, "dt_init": "ones"}},
    }
    model = {"d_model": 128, "pattern": "2*gdn,kda,safe,ones,mamba2", "ffn": "none", "mixers": options}
    plan = lm.blueprint(build(ModelConfig, {**model, "vocab_size": 32, "blocks": blocks}))
    mesh = make_mesh(build(MeshConfig, {"fsdp": 2, "tensor": 4}))
    axes = {n: m.axes for n, m in plan.meta.items() if n.endswith(("A_log", "dt_bias"))}
    place = rules.shardings(axes, {n: plan.shapes[n] for n in axes}, mesh)
    init = jax.jit(lambda key: {n: p for n, p in plan.init(key).items() if n in axes}, out_shardings=place)
    params = init(jax.random.key(0))
    decays = {n: np.asarray(p, np.float64) for n, p in params.items()}
    assert len(decays) == 10 and all(p.dtype == np.float32 for p in params.values())
    for name, value in decays.items():
        layer = int(name.split("/")[1])  # 0: two of gdn
        if name.endswith("A_log"):
            low, high = {0: (0.01, 16), 1: (1, 16), 2: (1, 1), 3: (0.01, 16), 4: (1, 16)}[layer]
            value = np.exp(value)
        else:
            low, high = (np.log1p(np.e),) * 2 if layer == 3 else DT_RANGE
            value = np.log1p(np.exp(value))
        assert low * (1 - 1e-4) <= value.min() and value.max() <= high * (1 + 1e-4), name
        if high > low:
            assert np.unique(value).size > 0.9 * value.size, name  # drawn, one by one
            assert value.max() > 0.8 * high and value.min() < 2 * low + 0.2, name


def test_convolutions_start_uniform_or_as_published():
    for init, std in (("uniform", 0.5 / np.sqrt(3)), ("normal", 0.02)):
        inputs = make("deltanet", heads=64, conv_init=init).inputs
        fresh = DeltaInputs(D, inputs.cfg, 64, rngs=nnx.Rngs(0))
        for conv in (fresh.q_conv, fresh.k_conv, fresh.v_conv):
            assert_close(init, np.std(conv.weight[...]), std, 0.05)


# ---------------------------------------------------------------------------------------------- widths and presets


@pytest.mark.parametrize(
    ("cfg", "d_model", "expected"),
    [
        (deltanet.Config(), 1024, {"heads": 8, "key_dim": 128, "value_dim": 128}),
        (deltanet.Config(), 32, {"heads": 1, "key_dim": 32}),
        (deltanet.Config(), 1000, {"heads": 5, "key_dim": 200}),
        (deltanet.Config(heads=4, key_dim=24, value_dim=48), 100, {"heads": 4, "key_dim": 24, "value_dim": 48}),
        (kda.Config(), 2048, {"heads": 16, "key_dim": 128, "value_dim": 128, "gate_rank": 128}),
        (kda.Config(heads=2, value_dim=64), 64, {"key_dim": 32, "gate_rank": 64}),
    ],
)
def test_widths_that_follow_from_the_model(cfg: Any, d_model: int, expected: dict[str, int]):
    filled = cfg.fill(d_model)
    assert {name: getattr(filled, name) for name in expected} == expected
    assert filled.fill(d_model) == filled


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deltanet", {"heads": 3}, "heads = 3: expected a divisor of d_model = 64"),
        ("kda", {"heads": 5}, "heads = 5: expected a divisor of d_model = 64"),
        ("kda", {"lower_limit": -6.0}, "lower_limit = -6.0: expected a number >= -5 and < 0"),
        ("kda", {"lower_limit": 0}, "lower_limit = 0.0: expected a number >= -5 and < 0"),
        ("gdn", {"dt_init": "zeros"}, "dt_init = 'zeros': expected one of steps, ones"),
        ("deltanet", {"conv_width": 0}, "conv_width = 0: expected an integer >= 1"),
        ("deltanet", {"qk_norm": "sum"}, "since a sum of silu may vanish"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        build(mixers.get(name).Config, options).fill(64)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("preset", "d_model", "keys", "values", "scalars"),
    [("olmo", 3840, 30 * 96, 30 * 192, 30), ("qwen3next", 2048, 16 * 128, 32 * 128, 32)],
)
def test_presets_have_the_published_number_of_parameters(
    preset: str, d_model: int, keys: int, values: int, scalars: int
):
    """Projections of q, k, v, gate and output; of β and decay; taps; A, b_dt and the norm of a head."""
    value_dim = values // scalars
    matrices = d_model * (2 * keys + 3 * values + 2 * scalars)
    expected = matrices + 4 * (2 * keys + values) + 2 * scalars + value_dim
    cfg = build(ModelConfig, {"d_model": d_model, "pattern": "gdn", "mixers": {"gdn": {"preset": preset}}})
    options = resolve(cfg)[0].options
    shapes = nnx.eval_shape(lambda: nnx.state(gdn.GatedDeltaNet(d_model, options, rngs=nnx.Rngs(0))))
    assert sum(p.size for p in jax.tree.leaves(shapes)) == expected


def test_low_rank_gates_of_kda_are_as_wide_as_a_value():
    module = make("kda", gate_bias=True)
    for down, up, width in (("decay_down", "decay_up", 8), ("gate_down", "gate_up", 16)):
        assert getattr(module, down).kernel.shape == (D, 16)
        assert getattr(module, up).kernel.shape == (16, 2, width)
    assert module.gate_up.bias.shape == (2, 16)
    assert make("kda").gate_up.bias is module.decay_up.bias is None


def test_gates_are_the_published_ones():
    gates = {name: mixers.get(name).Config().out_gate for name in ("deltanet", "gdn", "kda")}
    assert gates == {"deltanet": "none", "gdn": "silu", "kda": "sigmoid"}


def test_presets_have_the_published_choices():
    chosen = {name: gdn.Config(**options) for name, options in gdn.Config.PRESETS.items()}
    assert {n: c.allow_neg_eigval for n, c in chosen.items()} == {"olmo": True, "qwen3next": False}
    assert {n: c.norm_eps for n, c in chosen.items()} == {"olmo": 1e-5, "qwen3next": 1e-6}
    assert {n: c.dt_init for n, c in chosen.items()} == {"olmo": "steps", "qwen3next": "ones"}
    assert {c.conv_init for c in chosen.values()} == {"normal"}
