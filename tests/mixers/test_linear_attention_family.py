"""What is particular to linear_attn, retention, hgrn2 and the published forms of lightning, against the sums over all
pairs of tokens that the papers write, in numpy and fp64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.mixers import Context, Mixer
from hydrax.mixers.linear import hgrn2, lightning, linear_attn, retention
from hydrax.nn import features
from tests.contract.cases import inside, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_slopes

pytestmark = pytest.mark.thorough

D, T, SPLIT = 32, 37, 13
SEG = np.stack([segments((20, 1, 11), T), segments((T,), T)])
POSITIONS = inside(SEG)[0]
REAL = (SEG != 0)[..., None, None]
X = normal(0, 2, T, D)


def make(name: str, d_model: int = D, **options: Any) -> Mixer:
    """A mixer with norm weights and biases that are neither 1 nor 0."""
    cls = mixers.get(name)
    module = cls(d_model, build(cls.Config, options).fill(d_model), rngs=nnx.Rngs(0))
    for i, (_, p) in enumerate(nnx.to_flat_state(nnx.state(module, nnx.Param))):
        p[...] = jnp.asarray(np.asarray(p[...]) + 0.1 * normal(i, *p.shape))
    return module


def heads(module: Mixer, **facts: Any) -> tuple[np.ndarray, np.ndarray]:
    """z of the real tokens and the final memory, in two calls of which the second continues a document."""

    @jax.jit
    def run(x: jax.Array) -> tuple[jax.Array, dict]:
        z, state = [], None
        for part in (np.s_[:, :SPLIT], np.s_[:, SPLIT:]):
            ctx = Context(positions=jnp.asarray(POSITIONS[part]), segment_ids=jnp.asarray(SEG[part]), **facts)
            z_part, state = module.mix(x[part], ctx, state)
            z.append(z_part)
        return jnp.concatenate(z, axis=1), state

    z, state = run(X)
    return np.asarray(z) * REAL, np.asarray(state["memory"])


def projected(linear: Any) -> np.ndarray:
    return np.einsum("btd,d...->bt...", X.astype(np.float64), linear.kernel[...])


def pairs(q: np.ndarray, k: np.ndarray, decay: np.ndarray) -> np.ndarray:
    """decay_h^(t-s) q_t·k_s [B,H,T,S] for s <= t in one document."""
    t = np.arange(T)
    distance = np.maximum(t[:, None] - t, 0)
    visible = (SEG[:, :, None] == SEG[:, None]) & (t[:, None] >= t) & (SEG != 0)[:, :, None]
    return np.einsum("bthk,bshk->bhts", q, k) * decay[:, None, None] ** distance * visible[:, None]


def rms(o: np.ndarray, axes: int | tuple[int, ...], eps: float) -> np.ndarray:
    return o / np.sqrt((o**2).mean(axes, keepdims=True) + eps)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


# ---------------------------------------------------------------------------------------------------- linear_attn


def test_elu1_is_normalised_attention_over_a_positive_kernel() -> None:
    module = make("linear_attn", heads=4, value_dim=6)
    z, memory = heads(module)
    q, k = (np.where(y > 0, y + 1, np.exp(np.minimum(y, 0))) for y in (projected(module.q), projected(module.k)))
    weights = pairs(q, k, np.ones(4))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    assert_close("z", z, np.einsum("bhts,bshv->bthv", weights, projected(module.v)), TOLERANCE["fp32_op"])
    last = (SEG.max(1, keepdims=True) == SEG)[..., None, None]
    assert_close("normaliser", memory[..., -1], (k * last).sum(1), TOLERANCE["fp32_op"])


def test_normalised_outputs_in_bf16_keep_the_weights_of_a_mean() -> None:
    """Of equal values the mean is that value, whatever the rounding of weights and sums, over a long row too."""
    module = make("linear_attn", heads=2, key_dim=8)
    module.v.kernel[...] = jnp.zeros_like(module.v.kernel[...]).at[0].set(1.0)
    x = jnp.asarray(normal(1, 1, 2000, D), jnp.bfloat16).at[:, :, 0].set(1.0)
    z, _ = jax.jit(lambda x: module.mix(x, Context.of(x), None))(x)
    assert_close("mean of ones", z.astype(jnp.float32), np.ones(z.shape), TOLERANCE["bf16_output"])


def test_without_the_division_every_head_is_normed() -> None:
    module = make("linear_attn", heads=4, feature_map="identity")
    o = np.einsum("bhts,bshv->bthv", pairs(projected(module.q), projected(module.k), np.ones(4)), projected(module.v))
    want = rms(o / np.sqrt(8), -1, 1e-5) * module.norm.weight[...]
    assert_close("z", heads(module)[0], want, TOLERANCE["fp32_op"])


def test_a_learned_normalizer_scales_unnormed_sums() -> None:
    module = make("linear_attn", heads=4, **linear_attn.Config.PRESETS["normalised"])
    rng = np.random.default_rng(0)
    for linear in (module.q, module.k, module.v, module.size):
        linear.bias.set_value(jnp.asarray(rng.normal(size=linear.bias.shape), jnp.float32))
    module.size.bias.set_value(jnp.asarray([0.5, -0.5, 100.0, -100.0]))  # two of them beyond the bounds of the exponent
    q, k, v, size = (projected(linear) + linear.bias[...] for linear in (module.q, module.k, module.v, module.size))
    o = np.einsum("bhts,bshv->bthv", pairs(q, k, np.ones(4)), v)
    z = heads(module)[0]
    for h in range(4):
        want = np.exp(-np.clip(size[:, :, h], -10, 10))[..., None] * o[:, :, h]
        assert_close(f"head {h}", z[:, :, h], want, TOLERANCE["fp32_op"])


def learned(p: dict[str, np.ndarray]) -> np.ndarray:
    """z of normalised attention, one token at a time."""
    q, k, v, size = (
        np.einsum("btd,d...->bt...", p["x"], p[f"{name}/kernel"]) + p[f"{name}/bias"]
        for name in ("q", "k", "v", "size")
    )
    z, S = np.zeros_like(v), np.zeros(())
    for b, t in np.argwhere(SEG):
        S = (S if t and SEG[b, t] == SEG[b, t - 1] else 0) + np.einsum("hk,hv->hkv", k[b, t], v[b, t])
        z[b, t] = np.exp(-np.clip(size[b, t], -10, 10))[:, None] * np.einsum("hkv,hk->hv", S, q[b, t])
    return z


def test_gradients_of_a_learned_normalizer() -> None:
    module = make("linear_attn", heads=4, chunk_size=16, **linear_attn.Config.PRESETS["normalised"])
    module.size.bias[...] = jnp.asarray([0.5, -0.5, 100.0, -100.0])  # beyond the bounds an exponent has no gradient
    graph, state = nnx.split(module)
    flat = {"/".join(map(str, path)): p for path, p in nnx.to_flat_state(state) if "project" not in path}
    rest = [(path, p) for path, p in nnx.to_flat_state(state) if "project" in path]
    p = {name: np.asarray(v[...], np.float64) for name, v in flat.items()} | {"x": X.astype(np.float64)}
    # The fourth head is e^20 times as large as the third: what it gives counts as much as what they give.
    weights = normal(99, *learned(p).shape) * np.asarray([1, 1, np.exp(10.0), np.exp(-10.0)])[:, None]

    def total(p: dict[str, jax.Array]) -> jax.Array:
        own = [(tuple(name.split("/")), v.replace(p[name])) for name, v in flat.items()]
        module = nnx.merge(graph, nnx.from_flat_state([*own, *rest]))
        ctx = Context(positions=jnp.asarray(POSITIONS), segment_ids=jnp.asarray(SEG))
        return jnp.sum(weights * REAL * module.mix(p["x"], ctx, None)[0])

    with jax.enable_x64(True):
        gradients = jax.jit(jax.grad(total))(jax.tree.map(jnp.asarray, p))
    assert_slopes(lambda p: float(np.sum(weights * learned(p))), p, gradients, TOLERANCE["fp32_op"])
    clamped = np.asarray(gradients["size/bias"])[2:]
    assert_close("gradient of a bias beyond the bounds", clamped, np.zeros(2), TOLERANCE["fp64"])


@pytest.mark.parametrize("name", features.TABLE)
def test_a_feature_map_fixes_the_state_and_whether_it_is_normalised(name: str) -> None:
    cfg = build(linear_attn.Config, {"heads": 2, "key_dim": 4, "value_dim": 6, "feature_map": name}).fill(D)
    width = {"hedgehog": 8, "dpfp": 32, "taylor2": 15}.get(name, 4)
    signed = name in ("hadamard", "identity")
    assert cfg.state_shape == (2, width, 6 if signed else 7)
    assert mixers.row("linear_attn").state_bytes(cfg, 1, 2) == 4 * 2 * width * (6 if signed else 7)
    matrices = {"hadamard": 2, "hedgehog": 1, "t2r": 1}.get(name, 0)  # for each head, and for q and k: 2 K² FLOPs
    assert mixers.row("linear_attn").flops(cfg, 1) == 4 * 2 * width * (6 if signed else 7) + matrices * 2 * 2 * 2 * 16
    assert cfg.fill(D) == cfg
    if signed:
        with pytest.raises(ConfigError, match=r"linear_attn.normalizer = 'sum': .*elu1"):
            build(linear_attn.Config, {"feature_map": name, "normalizer": "sum"}, "linear_attn")
    else:
        assert build(linear_attn.Config, {"feature_map": name, "normalizer": "rmsnorm"}).fill(D).state_shape[2] == 4


def test_an_unknown_feature_map_is_refused() -> None:
    with pytest.raises(ConfigError, match="feature_map = 'elu': expected one of dpfp, elu1"):
        build(linear_attn.Config, {"feature_map": "elu"})


# ------------------------------------------------------------------------------------------------------ retention


@pytest.mark.parametrize("preset", ["torchscale", None])
def test_retention_is_the_parallel_form_of_the_paper(preset: str | None) -> None:
    """Its row sums included: the norm of each head undoes them, and would not if they were divided by a constant."""
    options = retention.Config.PRESETS[preset] if preset else {}
    module = make("retention", heads=4, **{**options, "norm_eps": 1e-12})
    m = np.arange(4)
    angles = POSITIONS[..., None, None] * 10000.0 ** -(m / 3 if preset else m / 4)

    def turned(x: np.ndarray) -> np.ndarray:
        """q and k as complex numbers; their products then have the real part that counts."""
        z = x[..., ::2] + 1j * x[..., 1::2] if preset else x[..., :4] + 1j * x[..., 4:]
        z = z * np.exp(1j * angles)
        return np.concatenate([z.real, z.imag], axis=-1)

    gamma = 1 - 2.0 ** (-5 - np.arange(4))
    q, k = turned(projected(module.q)), turned(projected(module.k)) / np.sqrt(8)
    mask = pairs(np.ones_like(q) / 8, np.ones_like(k), gamma)
    real = REAL[:, None, :, 0]
    scores = pairs(q, k, gamma) / np.sqrt(np.where(real, mask.sum(-1, keepdims=True), 1))
    scores /= np.maximum(np.abs(scores.sum(-1, keepdims=True)), 1)
    o = rms(np.einsum("bhts,bshv->bthv", scores, projected(module.v)), -1, 1e-12) * REAL
    weight = 1 if preset else module.norm.weight[...]
    assert_close("z", heads(module)[0], o * weight * silu(projected(module.gate)), TOLERANCE["fp32_op"])


def test_retention_keeps_almost_everything() -> None:
    kept = np.exp(np.asarray(retention.log_decay(30), np.float64))
    assert_close("what is lost", 1 - kept, 2.0 ** (-5 - np.arange(30)), TOLERANCE["fp32_op"])


# ---------------------------------------------------------------------------------------------------------- hgrn2


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"heads": 2, "key_dim": 8, "value_dim": 16}, 8**-0.5),
        ({"heads": 2, "key_dim": 8, "value_dim": 16, **hgrn2.Config.PRESETS["original"]}, 1.0),
        ({"heads": 5, "key_dim": 1, "value_dim": 1}, 1.0),  # h_t = f h_{t-1} + (1 - f) i_t, the recurrence of hgrn
    ],
    ids=["fla", "original", "hgrn"],
)
def test_hgrn2_ties_its_keys_to_its_gates(options: dict, scale: float) -> None:
    module = make("hgrn2", **options)
    H, K = module.cfg.heads, module.cfg.key_dim
    bounds = np.random.default_rng(2).uniform(0, 1, (3, H * K)).astype(np.float32)
    z, memory = heads(module, lower_bounds={H * K: jnp.asarray(bounds)}, layer_index=2)
    gamma = bounds[2].astype(np.float64).reshape(H, K)
    f = gamma + (1 - gamma) * sigmoid(projected(module.forget))
    q, v = silu(projected(module.q)), projected(module.v)
    o, S = np.zeros(v.shape), np.zeros(memory.shape)
    for b, t in np.argwhere(SEG != 0):
        if POSITIONS[b, t] == 0:
            S[b] = 0
        S[b] = f[b, t][..., None] * S[b] + (1 - f[b, t])[..., None] * v[b, t][:, None]
        o[b, t] = scale * np.einsum("hk,hkv->hv", q[b, t], S[b])
    assert_close("z", z, rms(o, (-2, -1), 1e-5) * module.norm.weight[...], TOLERANCE["fp32_op"])
    assert_close("memory", memory, S, TOLERANCE["fp32_op"])


def test_forget_gates_keep_their_digits_at_both_ends() -> None:
    f = np.linspace(-49, 49, 197)
    for gamma in (0.0, 1e-6, 0.3, 0.9, 1 - 2.0**-10):
        stays, lost = gamma + (1 - gamma) * sigmoid(f), (1 - gamma) * sigmoid(-f)
        want = np.where(lost > 0.5, np.log(stays), np.log1p(-np.minimum(lost, 0.5)))
        g, k = hgrn2.forget_gates(jnp.asarray(f, jnp.float32), jnp.float32(gamma))
        assert_close(f"relative g, lower bound {gamma}", np.float64(g) / want, np.ones_like(f), 1e-6)
        assert_close(f"relative k, lower bound {gamma}", np.float64(k) / lost, np.ones_like(f), 1e-6)


def test_forget_gates_that_saturate_have_finite_gradients() -> None:
    f = jnp.asarray([-1e30, -1e4, -60.0, -17.0, 0.0, 17.0, 200.0, 1e30], jnp.bfloat16)
    for gamma in (0.0, 0.5, 1.0):
        (g, k), pullback = jax.vjp(hgrn2.forget_gates, f, jnp.full(f.shape, gamma))
        assert g.dtype == k.dtype == jnp.float32
        for x in (g, k, *pullback((jnp.ones_like(g), jnp.ones_like(k)))):
            assert np.isfinite(np.asarray(x, np.float32)).all()
        assert (g <= 0).all()


# ------------------------------------------------------------------------------------------------------ lightning


@pytest.mark.parametrize("name", lightning.Config.PRESETS)
def test_lightning_in_its_published_forms(name: str) -> None:
    """TNL: u ⊙ SRMSNorm(o), values linear; MiniMax: silu on all, σ gate; SALA: normed and turned, equal layers."""
    preset = lightning.Config.PRESETS[name]
    module = make("lightning", heads=4, **preset)
    module.v.kernel[...] = 1e-3 * module.v.kernel[...]  # outputs so small that the norm's ε shows their scale
    q, k, v, u = (projected(linear) for linear in (module.q, module.k, module.v, module.gate))
    falling = 1 - 3 / 4 + 1e-5
    decay = np.exp(-(2.0 ** (-2 * np.arange(1, 5))) * (falling if name != "sala" else 1 + 1e-5))
    p, norm_weight, scale = POSITIONS[..., None, None], 1, 1.0
    if name == "sala":
        q, k = (rms(y, -1, 1e-6) * norm.weight[...] for y, norm in ((q, module.q_norm), (k, module.k_norm)))
        turns = np.exp(1j * p * 10000.0 ** -(np.arange(4) / 4))
        q, k = ((y[..., :4] + 1j * y[..., 4:]) * turns for y in (q, k))
        q, k = (np.concatenate([y.real, y.imag], axis=-1) for y in (q, k))
        scale = 8**-0.5
    else:
        q, k = silu(q), silu(k)
    if name == "tnl_first":
        turns = np.exp(1j * p * np.asarray(module.phases[...], np.float64))
        q, k = (np.concatenate([(y * turns).real, (y * turns).imag], axis=-1) for y in (q, k))
    if name == "minimax":
        v = silu(v)
    if name in ("minimax", "sala"):
        u, norm_weight = sigmoid(u), module.norm.weight[...]
    o = rms(scale * np.einsum("bhts,bshv->bthv", pairs(q, k, decay), v), (-2, -1), 1e-6)
    z, memory = heads(module, layer_index=3, depth=5)
    assert_close("z", z, o * norm_weight * u * REAL, TOLERANCE["fp32_op"])
    assert memory.shape == (2, 4, 16 if name == "tnl_first" else 8, 8)


def test_lightning_is_minimax_unless_told_otherwise() -> None:
    assert build(lightning.Config, lightning.Config.PRESETS["minimax"]) == lightning.Config()
    assert lightning.Config().fill(64).scale == 1.0


def test_rotary_options_without_rotary_positions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"lightning.rope = .*needs position = rope"):
        build(lightning.Config, {"rope": {"theta": 500.0}, "position": "lrpe"}, "lightning")
    assert build(lightning.Config, {"rope": {"theta": 500.0}, "position": "rope"}).rope.theta == 500.0


def test_learned_phases_stay_in_fp32_without_weight_decay() -> None:
    module = make("lightning", heads=4, **lightning.Config.PRESETS["tnl_first"])
    meta = module.phases.get_metadata()
    assert not meta["decay"] and not meta["cast"] and meta["matrix"] is None
    names = {path[0] for path, _ in nnx.to_flat_state(nnx.state(make("lightning", heads=4), nnx.Param))}
    assert names == {"q", "k", "v", "gate", "norm", "project"}


# --------------------------------------------------------------------------------------------------------- widths


@pytest.mark.parametrize(
    ("cfg", "d_model", "expected"),
    [
        (linear_attn.Config(), 64, {"key_dim": 8, "value_dim": 8, "normalizer": "sum"}),
        (retention.Config(), 2048, {"key_dim": 256, "value_dim": 512}),
        (hgrn2.Config(), 1024, {"heads": 8, "key_dim": 128, "value_dim": 128}),
        (hgrn2.Config(), 64, {"heads": 1, "key_dim": 64, "value_dim": 64}),
        (hgrn2.Config(), 640 + 64, {"heads": 4, "key_dim": 176}),
        (hgrn2.Config(heads=4, key_dim=16), 64, {"key_dim": 16, "value_dim": 16}),
        (lightning.Config(scale=None, position="lrpe"), 64, {"scale": 8**-0.5}),
    ],
)
def test_widths_that_follow_from_the_model(cfg: Any, d_model: int, expected: dict) -> None:
    filled = cfg.fill(d_model)
    assert {name: getattr(filled, name) for name in expected} == expected
    assert filled.fill(d_model) == filled


@pytest.mark.parametrize("cls", [linear_attn.Config, retention.Config, hgrn2.Config, lightning.Config])
def test_heads_that_do_not_fit_are_refused_and_presets_do_fit(cls: Any) -> None:
    with pytest.raises(ConfigError) as error:
        cls(heads=3).fill(64)
    assert error.value.key == "heads"
    for preset in cls.PRESETS.values():
        build(cls, preset).fill(64)


def test_lower_bounds_are_as_wide_as_the_gates() -> None:
    lower_bound = mixers.row("hgrn2").lower_bound
    assert lower_bound is not None and lower_bound(hgrn2.Config(heads=4, key_dim=16).fill(64)) == 64
