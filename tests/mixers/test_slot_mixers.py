"""abc and gsa against their definitions in numpy fp64; what slots that hold nothing do; widths and presets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import ConfigError, build
from hydrax.mixers.base import Context
from hydrax.mixers.linear import abc, gsa
from tests.tolerances import TOLERANCE, assert_close

pytestmark = pytest.mark.thorough

D, T = 32, 37
WIDTHS = {"heads": 2, "slots": 8, "key_dim": 8, "value_dim": 16, "chunk_size": 16}


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rotate(x: np.ndarray) -> np.ndarray:
    """RoPE of [T,H,K]."""
    half = x.shape[-1] // 2
    turns = np.exp(1j * np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(half) / half))
    z = (x[..., :half] + 1j * x[..., half:]) * turns
    return np.concatenate([z.real, z.imag], axis=-1)


def read(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """Σ_m softmax_m(scale q·keys_m) values_m for every token and head."""
    scores = np.exp(scale * np.einsum("thk,thmk->thm", q, keys))
    return np.einsum("thm,thmv->thv", scores / scores.sum(-1, keepdims=True), values)


def normalise(o: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return o / np.sqrt((o**2).mean(axes, keepdims=True) + 1e-5)


def made(mixer: type, x: np.ndarray, **options: object) -> tuple:
    """The mixer, its heads z [T,H,V] on x [T,D], its state, and its projections of x by name, in fp64."""
    cfg = build(mixer.Config, WIDTHS | options).fill(x.shape[-1])
    m = mixer(x.shape[-1], cfg, rngs=nnx.Rngs(0))
    return m, *run(m, x)


@nnx.jit
def _mix(m, x):
    return m.mix(x, Context.of(x), None)


def run(m, x: np.ndarray) -> tuple:
    z, state = _mix(m, jnp.asarray(x[None], jnp.float32))
    names = [name for name, part in vars(m).items() if hasattr(part, "kernel") and name != "project"]
    y = {n: np.einsum("td,dhk->thk", x, np.asarray(getattr(m, n).kernel[...], np.float64)) for n in names}
    return np.asarray(z[0]), jax.tree.map(lambda a: np.asarray(a[0]), state["memory"]), y


def inputs() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(T, D)).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("size", [1.0, 40.0], ids=["usual", "clamped"])
def test_abc_holds_running_averages(size: float) -> None:
    """As cumulative sums, which the mixer runs as a gated recurrence; logits stop at ±32."""
    x = inputs()
    m, *_ = made(abc.ABC, x)
    m.logits.kernel[...] *= size
    z, state, y = run(m, x)
    weights = np.exp(np.clip(y["logits"], -32, 32))
    total = np.cumsum(weights, axis=0)
    keys, values = (
        np.cumsum(weights[..., None] * a[:, :, None], axis=0) / total[..., None] for a in (rotate(y["k"]), y["v"])
    )
    o = read(rotate(y["q"]), keys, values, 8**-0.5)
    assert_close("z", z, normalise(o, (-1,)) * silu(y["gate"]), TOLERANCE["fp32_op"])
    for name, value in {"k": keys[-1], "v": values[-1], "z": total[-1]}.items():
        assert_close(f"state {name}", state[name], value, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("options", [{}, {"feature": "relu", "gate_divisor": 2.0, "scale": 0.5, "norm_affine": False}])
def test_gsa_is_its_definition(options: dict) -> None:
    x = inputs()
    m, z, state, y = made(gsa.GSA, x, **options)
    assert (m.norm.weight is None) == (not m.cfg.norm_affine)
    feature = silu if m.cfg.feature == "silu" else lambda a: np.maximum(a, 0)
    alpha = (1 + np.exp(-y["forget"])) ** (-1 / m.cfg.gate_divisor)
    keys, values = np.zeros((T, 2, 8, 8)), np.zeros((T, 2, 8, 16))
    for t in range(T):
        for slots, a in ((keys, feature(y["k"])), (values, silu(y["v"]))):
            slots[t] = alpha[t][..., None] * slots[t - 1] + (1 - alpha[t])[..., None] * a[t][:, None]
    o = read(feature(y["q"]), keys, values, m.cfg.scale)
    assert_close("z", z, normalise(silu(o), (-2, -1)), TOLERANCE["fp32_op"])
    for name, value in {"k": keys[-1], "v": values[-1]}.items():
        assert_close(f"state {name}", state[name], value, TOLERANCE["fp32_op"])


def test_abc_with_a_slot_per_token_is_softmax_attention() -> None:
    """Where token m alone has weight in slot m, the last token attends to all tokens."""
    n = 16
    x = np.concatenate([np.eye(n), np.random.default_rng(1).normal(size=(n, D - n))], axis=1)
    x = x.astype(np.float32).astype(np.float64)
    m, *_ = made(abc.ABC, x, slots=n)
    kernel = np.zeros(m.logits.kernel.shape, np.float32)
    kernel[:n] = 64 * np.eye(n)[:, None] - 32
    m.logits.kernel[...] = jnp.asarray(kernel)
    z, _, y = run(m, x)
    q, k = rotate(y["q"])[-1:], rotate(y["k"])
    o = read(q, np.moveaxis(k, 0, 1)[None], np.moveaxis(y["v"], 0, 1)[None], 8**-0.5)
    assert_close("last token", z[-1:], normalise(o, (-1,)) * silu(y["gate"][-1:]), TOLERANCE["fp32_op"])


def test_empty_slots_are_not_masked() -> None:
    """A slot that never takes anything up keeps its share of the softmax, with score and value 0; also in the first
    token of a document, and after another document has filled the slots."""
    x = np.tile(inputs()[:1], (2, 1))
    m, *_ = made(gsa.GSA, x, gate_divisor=1.0, norm_affine=False)
    signs = np.where(np.arange(8) == 0, -1, 1)  # slot 0 takes all of every token, the others nothing
    direction = x[0] / (x[0] ** 2).sum()
    m.forget.kernel[...] = jnp.asarray(direction[:, None, None] * 100 * signs + np.zeros((1, 2, 1)), jnp.float32)
    _, _, y = run(m, x)
    q, k, v = (silu(y[n][0]) for n in "qkv")
    score = np.exp((q * k).sum(-1))
    want = normalise(silu((score / (score + 7))[:, None] * v), (-2, -1))
    for seg in (None, jnp.asarray([[1, 2]])):
        z, _ = m.mix(jnp.asarray(x[None], jnp.float32), Context.of(x[None], seg), None)
        for t in range(2):
            assert_close(f"token {t}", z[0, t], want, TOLERANCE["fp32_op"])


@pytest.mark.parametrize(
    ("cfg", "d_model", "expected"),
    [
        (abc.Config(), 1024, {"slots": 64, "key_dim": 128, "value_dim": 256}),
        (gsa.Config(), 1024, {"slots": 64, "key_dim": 256, "value_dim": 256, "scale": 1.0, "gate_divisor": 8.0}),
        (gsa.Config(key_dim=8), 64, {"key_dim": 8, "value_dim": 16}),
    ],
)
def test_widths_that_follow_from_the_model(cfg, d_model: int, expected: dict) -> None:
    filled = cfg.fill(d_model)
    assert {name: getattr(filled, name) for name in expected} == expected
    assert filled.fill(d_model) == filled


@pytest.mark.parametrize("config", [abc.Config, gsa.Config])
def test_widths_that_do_not_fit_are_refused(config) -> None:
    with pytest.raises(ConfigError, match="heads = 3: expected a divisor of d_model = 64"):
        config(heads=3).fill(64)


def test_presets_of_gsa_are_the_published_training_configs() -> None:
    small, large = (build(gsa.Config, gsa.Config.PRESETS[name]) for name in ("flame_340m", "flame_1p3b"))
    assert (small.gate_divisor, large.gate_divisor) == (4.0, 8.0)
    assert dataclasses.replace(small, gate_divisor=8.0) == large == gsa.Config(norm_affine=False)
