"""What is particular to token_gate: its formula token by token with all gradients, what it sees, and how it starts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.mixers import Context
from hydrax.mixers.average.token_gate import Config, TokenGate
from tests.contract.cases import normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_slopes

pytestmark = pytest.mark.thorough

D, T = 6, 16
SEG = np.stack([segments((3, 1, 8), T), segments((T,), T)])
X = normal(0, 2, T, D).astype(np.float64)
Weights = dict[str, np.ndarray]
OPERATORS = [{"operator": "conv", "taps": 3}, {"operator": "ema", "modes": 2, "chunk_size": 4}]


def make(**options: Any) -> TokenGate:
    return TokenGate(D, build(Config, {"inner_dim": 10, **options}).fill(D), rngs=nnx.Rngs(0))


# ------------------------------------------------------------------------------------- the recurrence, in numpy


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))


def layer_norm(p: Weights, name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + 1e-6) * p[f"{name}/weight"] + p[f"{name}/bias"]


class Taps:
    def __init__(self, p: Weights, name: str):
        self.w, self.b, self.seen = p[f"{name}/conv/weight"], p[f"{name}/conv/bias"], []

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.seen.append(x)
        return self.b + sum(w * u for w, u in zip(self.w[::-1], self.seen[::-1], strict=False))


class Averages:
    def __init__(self, p: Weights, name: str):
        a, d, theta, re, im, self.skip = (
            p[f"{name}/averages/{part}"] for part in ("alpha", "delta", "theta", "real", "imaginary", "omega")
        )
        N = a.shape[1]
        turn = np.exp(2j * np.pi * np.arange(1, N + 1) / N * sigmoid(theta)[:, None])
        self.alpha, self.read = sigmoid(a), (re + 1j * im) / np.sqrt(N)
        self.keep, self.h = (1 - sigmoid(a) * sigmoid(d)) * turn, np.zeros(a.shape, complex)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        self.h = self.keep * self.h + self.alpha * x[:, None]
        return (self.read * self.h).real.sum(1) + self.skip * x


def recurrence(p: Weights, x: np.ndarray, operator: str) -> np.ndarray:
    """y [B,T,D] one token at a time, zero at padding."""
    y, make_operator = np.zeros_like(x), {"conv": Taps, "ema": Averages}[operator]
    for b, t in np.argwhere(SEG):
        if t == 0 or SEG[b, t] != SEG[b, t - 1]:
            first, second = make_operator(p, "first"), make_operator(p, "second")
        n = x[b, t]
        r = 1 + n + second(gelu(first(layer_norm(p, "token_norm", n))))
        inner = gelu(layer_norm(p, "channel_norm", r) @ p["up/kernel"] + p["up/bias"])
        g = r + inner @ p["down/kernel"] + p["down/bias"]
        y[b, t] = (g * (n @ p["value/kernel"] + p["value/bias"])) @ p["project/kernel"]
    return y


@pytest.mark.parametrize("options", OPERATORS, ids=["conv", "ema"])
def test_the_recurrence_and_its_gradients(options: dict[str, Any]):
    """Gradients by central differences of the recurrence, along a direction in every parameter and in x."""
    graph, state = nnx.split(make(**options))
    flat = {"/".join(map(str, path)): p for path, p in nnx.to_flat_state(state)}
    p = {name: np.asarray(v[...], np.float64) + 0.1 * normal(i, *v.shape) for i, (name, v) in enumerate(flat.items())}
    weights = normal(99, 2, T, D) * (SEG != 0)[..., None]

    def total(p: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = nnx.from_flat_state([(tuple(name.split("/")), v.replace(p[name])) for name, v in flat.items()])
        y = nnx.merge(graph, values)(x, Context.of(x, jnp.asarray(SEG)))[0]
        return jnp.sum(weights * y), y

    with jax.enable_x64(True):
        gradients, y = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(jax.tree.map(jnp.asarray, p), X)
    real = (SEG != 0)[..., None]
    assert_close("y", np.asarray(y) * real, recurrence(p, X, options["operator"]), TOLERANCE["fp64"])

    def reference(given: Weights) -> float:
        return float(np.sum(weights * recurrence(given, given["x"], options["operator"])))

    assert_slopes(reference, {**p, "x": X}, {**gradients[0], "x": gradients[1]}, TOLERANCE["fp32_op"])


# ------------------------------------------------------------------------------------------- what it sees, options


def test_convolutions_see_two_windows_and_averages_the_whole_past():
    t, taps = 3, 3
    x = normal(1, 1, T, D)
    changed = np.where(np.arange(T)[:, None] == t, x + 3 * normal(2, 1, T, D), x)
    for options, end in ((OPERATORS[0], t + 2 * taps - 1), (OPERATORS[1], T)):
        module = make(**options)
        graph, state = nnx.split(module)
        run = jax.jit(lambda state, x, graph=graph: nnx.merge(graph, state)(x, Context.of(x))[0])
        y, other = (np.asarray(run(state, jnp.asarray(a)))[0] for a in (x, changed))
        assert np.all(np.any(y != other, axis=-1)[t:end])
        outside = np.r_[:t, end:T]
        assert_equal("outputs that do not see the token", y[outside], other[outside])


def test_without_what_it_learns_the_gate_is_one_more_than_the_input():
    """With operator and network at zero, what the projection reads is (1 + x) ⊙ W x."""
    module = make()
    for linear in (module.second.conv.weight, module.second.conv.bias, module.down.kernel, module.down.bias):
        linear[...] = jnp.zeros_like(linear[...])
    x = X.astype(np.float32)
    z = jax.jit(lambda x: module.mix(x, Context.of(x), None)[0][:, :, 0])(x)
    assert_close("z", z, (1 + x) * (x @ np.asarray(module.value.kernel[...])), TOLERANCE["fp32_op"])


def test_state_bytes_of_both_operators():
    row = mixers.row("token_gate")
    conv, ema = (build(Config, options).fill(D) for options in OPERATORS)
    assert row.state_bytes(conv, 100, 2) == 2 * 2 * D * 2  # two operators, 2 bytes, 2 inputs
    assert row.state_bytes(ema, 100, 2) == 2 * 8 * D * 2  # two operators, complex fp32, 2 modes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operator": "dense"}, "operator = 'dense': expected one of conv, ema"),
        ({"taps": 0}, "taps = 0: expected an integer >= 1"),
        ({"width": D + 1}, f"width = {D + 1}: expected d_model = {D}, or nothing"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        make(**options)
    assert message in str(error.value)
