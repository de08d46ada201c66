"""What is particular to hgrn and mamba: the equations as published, lower bounds, complex channels, initial values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.mixers import Context
from hydrax.mixers.linear import hgrn, mamba
from hydrax.nn.decay import DT_RANGE
from hydrax.ops.linear import linear_attention
from tests.tolerances import TOLERANCE, assert_close, assert_equal

pytestmark = pytest.mark.thorough

D, T = 8, 13


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def made(cls: type, **options: object) -> nnx.Module:
    return cls(D, cls.Config(**options).fill(D), rngs=nnx.Rngs(0))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def run(mixer: nnx.Module, x: jax.Array, state: dict | None = None) -> tuple[jax.Array, dict]:
    return jax.jit(lambda x, state: mixer(x, Context.of(x), state))(x, state)


def bounded(gamma: np.ndarray) -> dict:
    """Facts of the context of the second of two layers."""
    return {"layer_index": 1, "depth": 2, "lower_bounds": {len(gamma): jnp.stack([0 * gamma, gamma])}}


def hgrn_as_published(mixer: hgrn.HGRN, x: np.ndarray, gamma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """z and the last h of the equations in arXiv 2311.04823, token by token in fp64, for rows of one document."""
    weights = {name: np.asarray(getattr(mixer, name).kernel[...], np.float64) for name in ("input", "forget", "gate")}
    u, f, gate = (np.tensordot(x, w, 1) for w in weights.values())
    c, is_complex = silu(u), mixer.cfg.complex
    c = c[..., 0, :] + 1j * c[..., 1, :] if is_complex else c[..., 0, :]
    turn = np.exp(1j * np.asarray(mixer.theta[...], np.float64)) if is_complex else 1
    h, found = np.zeros_like(c[:, 0]), []
    for t in range(x.shape[1]):
        keep = gamma + (1 - gamma) * sigmoid(f[:, t])
        h = keep * turn * h + (1 - gamma) * sigmoid(-f[:, t]) * c[:, t]
        found.append(np.stack([h.real, h.imag] if is_complex else [h], axis=-2))
    hs = np.stack(found, axis=1)
    o = hs - hs.mean((-2, -1), keepdims=True) if is_complex else hs
    o = o / np.sqrt((o**2).mean((-2, -1), keepdims=True) + mixer.cfg.norm_eps) * np.asarray(mixer.norm.weight[...])
    o = o + np.asarray(mixer.norm_bias[...]) if is_complex else o
    return o * silu(gate), hs[:, -1]


@pytest.mark.parametrize("size", [1.0, 8.0], ids=["usual", "saturated"])
@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
def test_hgrn_follows_the_published_equations(is_complex: bool, size: float) -> None:
    """Also where 1 - λ is as small as e^-20: a difference from 1 would have no digits left."""
    mixer = made(hgrn.HGRN, complex=is_complex, value_dim=6, norm_eps=1e-30)
    mixer.forget.kernel[...] = size * jnp.abs(mixer.forget.kernel[...])
    mixer.norm.weight[...] = 1 + normal(1, *mixer.norm.weight.shape)
    if is_complex:
        mixer.norm_bias[...] = normal(2, *mixer.norm_bias.shape)
    x, gamma = np.abs(normal(3, 2, T, D)), np.linspace(0, 0.9, 6)
    z, state = jax.jit(lambda x: mixer.mix(x, Context.of(x, **bounded(gamma)), None))(x)
    z_ref, h_ref = hgrn_as_published(mixer, x.astype(np.float64), gamma)
    assert_close("z", z, z_ref, TOLERANCE["fp32_op"])
    assert_close("h", state["memory"], h_ref, TOLERANCE["fp32_op"])


def test_hgrn_cannot_forget_more_than_its_layer_may() -> None:
    """With all gates at 0, h_t = γ h_{t-1} + (1 - γ) c: nothing is kept in the first layer and outside of a model."""
    mixer = made(hgrn.HGRN)
    mixer.forget.kernel[...] = -1e4 * jnp.ones((D, D))
    x, gamma = jnp.ones((1, T, D)), jnp.linspace(0.1, 0.8, D)

    def last(**facts: object) -> np.ndarray:
        memory = jax.jit(lambda x: mixer.mix(x, Context.of(x, **facts), None)[1]["memory"])(x)
        return np.asarray(memory)[0, 0]

    c = np.asarray(jax.nn.silu(mixer.input(x)))[0, 0, 0]
    assert_close("second layer", last(**bounded(gamma)), (1 - np.asarray(gamma) ** T) * c, TOLERANCE["fp32_op"])
    assert_equal("first layer", last(**bounded(gamma) | {"layer_index": 0}), c)
    assert_equal("no model", last(), c)


def test_hgrn_bounds_receive_gradients_at_zero() -> None:
    mixer, x = made(hgrn.HGRN), normal(4, 1, T, D)
    grad = jax.jit(jax.grad(lambda gamma: mixer(x, Context.of(x, **bounded(gamma)))[0].sum()))(jnp.zeros(D))
    assert np.isfinite(grad).all() and np.abs(grad).min() > 0


@pytest.mark.parametrize("split", [1, 6])
def test_complex_hgrn_continues_from_its_real_state(split: int) -> None:
    mixer = made(hgrn.HGRN, complex=True)
    x = jnp.asarray(normal(5, 2, T, D))
    y, state = run(mixer, x)
    y_a, middle = run(mixer, x[:, :split], mixer.init_state(2, T, jnp.float32))
    y_b, last = run(mixer, x[:, split:], middle)
    assert_close("y", jnp.concatenate([y_a, y_b], axis=1), y, TOLERANCE["fp32_op"])
    assert_close("state", last["memory"], state["memory"], TOLERANCE["fp32_op"])
    assert last["memory"].dtype == jnp.float32
    assert last["memory"].shape == mixer.init_state(2, T, jnp.float32)["memory"].shape == (2, 2, D)


def test_mamba_is_linear_attention_with_a_head_for_every_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """H = V, K states as keys, values of width 1: q = c, k = b, v = Δ x, log-decay Δ A."""
    mixer, x = made(mamba.Mamba), jnp.asarray(normal(6, 2, T, D))
    y, state = run(mixer, x)

    def attend(x, dt, A, b, c, *, initial_state, chunk_size, shards, **facts):
        q, k = (jnp.broadcast_to(a[:, :, None], (*x.shape, a.shape[-1])) for a in (c, b))
        o, memory = linear_attention(q, k, (dt * x)[..., None], dt[..., None] * A, scale=1.0, **facts)
        return o[..., 0], memory[..., 0]

    monkeypatch.setattr(mamba, "selective_scan", attend)
    y_ref, state_ref = run(mixer, x)
    assert_close("y", y, y_ref, TOLERANCE["fp32_op"])
    assert_close("memory", state["memory"], state_ref["memory"], TOLERANCE["fp32_op"])


def mamba_as_published(mixer: mamba.Mamba, u: np.ndarray) -> np.ndarray:
    """y of the equations in arXiv 2312.00752, token by token in fp64; δ, b and c RMS-normed (arXiv 2403.19887)."""
    p = {"/".join(map(str, n)): np.asarray(v[...], np.float64) for n, v in nnx.to_flat_state(nnx.state(mixer))}
    taps, W = p["x_conv/weight"], mixer.cfg.conv_width
    inner = np.pad(u @ p["x/kernel"], ((0, 0), (W - 1, 0), (0, 0)))
    x = silu(sum(taps[i] * inner[:, i : i + u.shape[1]] for i in range(W)) + p["x_conv/bias"])
    low = {name: x @ p[f"{name}/kernel"] for name in ("b", "c", "step_down")}
    for name, norm in (("b", "b_norm"), ("c", "c_norm"), ("step_down", "step_norm")):
        y = low[name]
        low[name] = y / np.sqrt((y**2).mean(-1, keepdims=True) + mixer.cfg.norm_eps) * p[f"{norm}/weight"]
    dt = np.logaddexp(0, low["step_down"] @ p["step_up/kernel"] + p["dt_bias"])
    h, o = np.zeros((len(u), *p["A_log"].shape)), np.zeros_like(x)
    for t in range(u.shape[1]):
        decay = np.exp(-dt[:, t, :, None] * np.exp(p["A_log"]))
        h = decay * h + (dt[:, t] * x[:, t])[..., None] * low["b"][:, t, None]
        o[:, t] = (h * low["c"][:, t, None]).sum(-1) + p["skip"] * x[:, t]
    return (o * silu(u @ p["gate/kernel"])) @ p["project/kernel"]


def test_mamba_norms_steps_keys_and_queries() -> None:
    """Inputs so small that the epsilon of the norms counts."""
    mixer, u = made(mamba.Mamba, bcdt_norm=True), 0.02 * normal(7, 2, T, D)
    for i, norm in enumerate((mixer.b_norm, mixer.c_norm, mixer.step_norm)):
        norm.weight[...] = 1 + 0.3 * normal(i, *norm.weight.shape)
    want = mamba_as_published(mixer, u.astype(np.float64))
    assert_close("y", run(mixer, jnp.asarray(u))[0], want, TOLERANCE["fp32_op"])
    paths = {path[0] for path, _ in nnx.to_flat_state(nnx.state(made(mamba.Mamba)))}
    assert not paths & {"b_norm", "c_norm", "step_norm"}


def test_mamba_starts_as_published() -> None:
    mixer = mamba.Mamba(64, mamba.Config(value_dim=4096, dt_rank=16).fill(64), rngs=nnx.Rngs(0))
    assert_close("A", jnp.exp(mixer.A_log[...]), np.tile(np.arange(1, 17), (4096, 1)), TOLERANCE["fp32_op"])
    assert_equal("D", mixer.skip[...], np.ones(4096))
    dt = jax.nn.softplus(mixer.dt_bias[...])
    assert DT_RANGE[0] * (1 - 1e-4) < dt.min() < 1.1e-3 and 0.09 < dt.max() < DT_RANGE[1] * (1 + 1e-4)
    assert_close("spread of W_up", jnp.std(mixer.step_up.kernel[...]), np.sqrt(1 / (3 * 16)), 0.02)
    for kept in (mixer.A_log, mixer.dt_bias, mixer.skip):  # in fp32, and out of reach of weight decay and Muon
        assert [kept.get_metadata(key) for key in ("cast", "decay", "matrix")] == [False, False, None]


def test_complex_hgrn_starts_with_the_angles_of_rope() -> None:
    mixer = made(hgrn.HGRN, complex=True)
    assert_close("θ", mixer.theta[...], 10000.0 ** (-2 * np.arange(D) / D), TOLERANCE["fp32_op"])
    assert [mixer.theta.get_metadata(key) for key in ("cast", "decay", "matrix")] == [False, False, None]


@pytest.mark.parametrize(
    ("cfg", "d_model", "expected"),
    [
        (hgrn.Config(), 48, {"value_dim": 48}),
        (mamba.Config(), 1024, {"value_dim": 2048, "key_dim": 16, "dt_rank": 64}),
        (mamba.Config(), 40, {"value_dim": 80, "dt_rank": 3}),
        (mamba.Config(value_dim=7, dt_rank=2), 40, {"value_dim": 7, "dt_rank": 2}),
    ],
)
def test_widths_that_follow_from_the_model(cfg: object, d_model: int, expected: dict) -> None:
    filled = cfg.fill(d_model)
    assert {name: dataclasses.asdict(filled)[name] for name in expected} == expected
    assert filled.fill(d_model) == filled
