"""What is particular to lightning, gdn and mamba2: decays, widths that follow from d_model, the norm of groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import ConfigError
from hydrax.mixers import Context
from hydrax.mixers.linear import gdn, lightning, mamba2
from hydrax.nn.decay import DT_RANGE, StepDecay
from tests.tolerances import TOLERANCE, assert_close, assert_equal

pytestmark = pytest.mark.thorough


def test_slopes_follow_the_alibi_rule() -> None:
    assert_equal("8 heads", lightning.slopes(8), [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256])
    assert_close("6 heads", lightning.slopes(6), [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8], 1e-12)


def test_lightning_decay_falls_with_depth_and_accepts_a_traced_layer() -> None:
    layers = jax.vmap(lambda i: lightning.log_decay(8, "layerwise", i, 5))(jnp.arange(5))
    factors = 1 - np.arange(5) / 4 + 1e-5
    assert_close("g", layers, -factors[:, None] * lightning.slopes(8), TOLERANCE["fp32_op"])
    assert_equal("uniform", lightning.log_decay(8, "uniform", 3, 5), layers[0])
    assert_equal("one layer", lightning.log_decay(8, "layerwise", 0, 1), layers[0])


@pytest.mark.parametrize(
    ("cfg", "d_model", "expected"),
    [
        (lightning.Config(), 64, {"key_dim": 8, "value_dim": 8}),
        (gdn.Config(heads=6), 2048, {"value_heads": 6, "key_dim": 256, "value_dim": 512}),
        (gdn.Config(heads=16, value_heads=32, key_dim=128), 2048, {"value_dim": 128}),
        (gdn.Config(), 16, {"key_dim": 8, "value_dim": 16}),
        (mamba2.Config(), 1024, {"value_heads": 32, "key_dim": 128, "value_dim": 64}),
        (mamba2.Config(), 48, {"value_heads": 3, "value_dim": 32}),
    ],
)
def test_widths_that_follow_from_the_model(cfg: object, d_model: int, expected: dict) -> None:
    filled = cfg.fill(d_model)
    assert {name: getattr(filled, name) for name in expected} == expected
    assert filled.fill(d_model) == filled


@pytest.mark.parametrize(
    ("cfg", "key"),
    [
        (lightning.Config(heads=3), "heads"),
        (gdn.Config(heads=4, value_heads=6), "value_heads"),
        (mamba2.Config(heads=3), "heads"),
        (mamba2.Config(value_dim=48), "value_dim"),
    ],
)
def test_widths_that_do_not_fit_are_refused(cfg: object, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        cfg.fill(64)
    assert error.value.key == key


def test_decays_start_in_their_ranges_and_stay_finite_beyond() -> None:
    decay = StepDecay(4096, rates=(0.01, 16.0), rngs=nnx.Rngs(0))
    g, dt = decay(jnp.zeros(4096, jnp.bfloat16))
    rates = -g / dt
    assert g.dtype == dt.dtype == jnp.float32
    assert 0.01 <= rates.min() < 0.1 and 15 < rates.max() <= 16 * (1 + 1e-5)
    assert DT_RANGE[0] * (1 - 1e-4) < dt.min() < 1.1e-3 and 0.09 < dt.max() < DT_RANGE[1] * (1 + 1e-4)
    decay.A_log[...] = jnp.full(4096, 90.0)
    assert np.isfinite(decay(jnp.full(4096, 1e4))[0]).all()


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def mamba2_as_published(mixer: mamba2.Mamba2, u: np.ndarray) -> np.ndarray:
    """y of one row of one document, token by token in fp64, with the options of its config."""
    p = {"/".join(map(str, n)): np.asarray(v[...], np.float64) for n, v in nnx.to_flat_state(nnx.state(mixer))}
    c, heads = mixer.cfg, {}
    for name in "xbc":
        inner = np.einsum("td,dhk->thk", u, p[f"{name}/kernel"])
        inner = np.pad(inner, ((c.conv_width - 1, 0), (0, 0), (0, 0)))
        weight, bias = p[f"{name}_conv/weight"], p[f"{name}_conv/bias"]
        y = sum(weight[i] * inner[i : i + len(u)] for i in range(c.conv_width)) + bias
        heads[name] = silu(y) if c.conv_activation == "silu" else y
    keys, queries = (np.repeat(heads[name], c.value_heads // c.heads, axis=1) for name in "bc")
    dt = np.maximum(np.logaddexp(0, u @ p["step_size/kernel"] + p["decay/dt_bias"]), c.dt_min)
    S, o = np.zeros((c.value_heads, c.key_dim, c.value_dim)), np.zeros_like(heads["x"])
    for t in range(len(u)):
        decay = np.exp(-dt[t] * np.exp(p["decay/A_log"]))[:, None, None]
        S = decay * S + keys[t][..., None] * (dt[t][:, None] * heads["x"][t])[:, None]
        o[t] = np.einsum("hkv,hk->hv", S, queries[t]) + p["skip"][:, None] * heads["x"][t]
    gate = silu(np.einsum("td,dhv->thv", u, p["gate/kernel"]))

    def normed(y: np.ndarray) -> np.ndarray:
        grouped = y.reshape(len(u), c.heads, -1)
        grouped = grouped / np.sqrt((grouped**2).mean(-1, keepdims=True) + c.norm_eps)
        return grouped.reshape(y.shape) * p["norm_weight"]

    z = {"after_gate": lambda: normed(o * gate), "before_gate": lambda: normed(o) * gate, "none": lambda: o * gate}
    return np.einsum("thv,hvd->td", z[c.norm](), p["project/kernel"])


@pytest.mark.parametrize(
    "options",
    [{}, {"norm": "before_gate"}, {"norm": "none"}, {"conv_activation": "none"}, {"dt_min": 0.7}],
    ids=str,
)
def test_mamba2_follows_its_equations(options: dict) -> None:
    """Outputs so small that the epsilon of the norm counts, and steps on both sides of their minimum."""
    widths = {"heads": 2, "value_heads": 4, "key_dim": 8, "value_dim": 4, **options}
    mixer = mamba2.Mamba2(16, mamba2.Config(**widths), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, p in nnx.to_flat_state(nnx.state(mixer)):
        p[...] = jnp.asarray(np.asarray(p[...]) + 0.1 * rng.standard_normal(p.shape).astype(np.float32))
    mixer.decay.dt_bias[...] = jnp.asarray([0.0, 0.2, -0.2, 0.0])
    u = 0.1 * rng.standard_normal((21, 16)).astype(np.float32)
    y, _ = jax.jit(lambda x: mixer(x, Context.of(x)))(u[None])
    assert_close("y", y[0], mamba2_as_published(mixer, u.astype(np.float64)), TOLERANCE["fp32_op"])
    assert (mixer.norm_weight is None) == (mixer.cfg.norm == "none")


def test_steps_have_a_minimum() -> None:
    decay = StepDecay(2, rates=(1.0, 16.0), dt_min=0.05, rngs=nnx.Rngs(0))
    decay.dt_bias[...] = jnp.asarray([-9.0, 1.0])
    g, dt = decay(jnp.zeros(2))
    assert_close("Δ", dt, [0.05, np.log1p(np.e)], TOLERANCE["fp32_op"])
    assert_close("g", g, -jnp.exp(decay.A_log[...]) * dt, TOLERANCE["fp32_op"])


def test_mamba2_normalises_gated_heads_of_a_group_together() -> None:
    mixer = mamba2.Mamba2(32, mamba2.Config(heads=2, value_heads=4, key_dim=8, value_dim=16), rngs=nnx.Rngs(0))
    y = jax.random.normal(jax.random.key(0), (1, 3, 4, 16)) * jnp.arange(1.0, 5.0)[:, None]
    z = np.asarray(mixer._group_norm(y)).reshape(1, 3, 2, 32)
    assert_close("mean square of a group", (z**2).mean(-1), np.ones((1, 3, 2)), TOLERANCE["fp32_op"])
    assert_close("ratios in a group", z[..., 0] / z[..., 16], y[:, :, ::2, 0] / y[:, :, 1::2, 0], TOLERANCE["fp32_op"])
