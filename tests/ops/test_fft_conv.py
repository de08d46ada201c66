"""`fft_conv`: both forms against NumPy's convolution and SciPy's, with every gradient, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from hydrax.core.typing import Array
from hydrax.ops.conv import short_conv
from hydrax.ops.conv.long import fft_conv
from hydrax.ops.ema import ema
from tests.tolerances import TOLERANCE, assert_close

SHAPES = [(2, 1, (3,), 1), (2, 17, (2, 2), 17), (1, 33, (3,), 5), (2, 63, (3,), 64), (1, 64, (2,), 100)]
"""B, T, C, L: odd and even rows, kernels of one tap, shorter than the row, and longer."""
DEFINED = SHAPES[2]


def inputs(B: int, T: int, C: tuple[int, ...], L: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(T)
    return rng.normal(size=(B, T, *C)), rng.normal(size=(L, *C))


def oracle(x: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Row by row and channel by channel."""
    y = np.zeros_like(x)
    for b, *c in np.ndindex(x.shape[0], *x.shape[2:]):
        at = (slice(None), *c)
        y[b][at] = np.convolve(x[b][at], k[at])[: x.shape[1]]
    return y


def transposed(dy: np.ndarray, k: np.ndarray, L: int) -> np.ndarray:
    """Σ_t dy_t k_{t-j} for j < L, of arrays [T]: by SciPy, without a transform."""
    full = signal.correlate(dy, k, mode="full", method="direct")[len(k) - 1 :]
    return np.pad(full, (0, max(0, L - len(full))))[:L]


def gradients(x: np.ndarray, k: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """dx_j = Σ_t dy_t k_{t-j} and dk_τ = Σ_t dy_t x_{t-τ}."""
    dx, dk = np.zeros_like(x), np.zeros_like(k)
    for b, *c in np.ndindex(x.shape[0], *x.shape[2:]):
        at = (slice(None), *c)
        dx[b][at] = transposed(dy[b][at], k[at], x.shape[1])
        dk[at] += transposed(dy[b][at], x[b][at], k.shape[0])
    return dx, dk


@jax.jit
def by_fft(x: Array, k: Array) -> Array:
    return fft_conv(x, k)


@pytest.mark.parametrize(
    ("shape", "impl"),
    [
        pytest.param(shape, impl, marks=[] if impl == "chunked" or shape == DEFINED else [pytest.mark.slow])
        for shape in SHAPES
        for impl in ("recurrent", "chunked")
    ],
    ids=str,
)
def test_outputs_and_gradients_are_those_of_a_convolution(shape: tuple, impl: str) -> None:
    x, k = inputs(*shape)
    dy = np.random.default_rng(0).normal(size=x.shape)

    @jax.jit
    def run(x: Array, k: Array, dy: Array) -> tuple:
        y, pullback = jax.vjp(lambda x, k: fft_conv(x, k, impl=impl), x, k)
        return y, *pullback(dy)

    wanted = oracle(x, k), *gradients(x, k, dy)
    with jax.enable_x64(True):
        exact = run(*map(jnp.asarray, (x, k, dy)))
    low = run(*(jnp.asarray(a, jnp.float32) for a in (x, k, dy)))
    for name, a, b, want in zip(("y", "dx", "dk"), exact, low, wanted, strict=True):
        assert_close(f"fp64 {name}", a, want, 1e-12)
        assert_close(f"fp32 {name}", b, want, TOLERANCE["fp32_op"])


def test_the_error_is_bounded_by_the_norms() -> None:
    """Also where outputs are far smaller than inputs: an error relative to them has no bound."""
    x, k = inputs(1, 5001, (4,), 5001)
    x[:, : 5001 // 2] *= 1e-3
    y = np.asarray(by_fft(jnp.asarray(x, jnp.float32), jnp.asarray(k, jnp.float32)), np.float64)
    wanted = np.stack([signal.fftconvolve(x[0, :, c], k[:, c])[:5001] for c in range(4)], axis=-1)
    size = np.linalg.norm(x[0], axis=0) * np.linalg.norm(k, axis=0)
    assert np.all(np.abs(y[0] - wanted).max(0) <= TOLERANCE["fft"] * size)
    rounding = TOLERANCE["fft"] * size / 100
    assert np.any(np.abs(y[0] - wanted).max(0) > rounding), "the bound is far from what it bounds"


def test_the_future_moves_the_past_by_rounding_alone() -> None:
    """A circular product would move it by whole taps."""
    x, k = (jnp.asarray(a, jnp.float32) for a in inputs(1, 47, (3,), 47))
    other = x.at[:, 30:].multiply(100)
    size = np.linalg.norm(other[0], axis=0) * np.linalg.norm(k, axis=0)
    moved = np.abs(np.asarray(by_fft(other, k) - by_fft(x, k)))[0]
    assert np.all(moved[:30] <= TOLERANCE["fft"] * size)
    assert np.all(moved[30:].max(0) > 1)


def test_bf16_is_computed_in_fp32() -> None:
    x, k = (jnp.asarray(a, jnp.bfloat16) for a in inputs(2, 33, (3,), 33))
    y = by_fft(x, k)
    assert y.dtype == jnp.bfloat16
    assert_close("y", y, oracle(*(np.asarray(a, np.float64) for a in (x, k))), TOLERANCE["bf16_output"])


def test_other_convolutions_are_cases_of_it() -> None:
    """Few taps, an average, and two kernels added."""
    x, k = (jnp.asarray(a, jnp.float32) for a in inputs(2, 33, (3,), 33))
    taps, decay = k[:4], -0.1 * jnp.arange(1.0, 4.0)[:, None]
    averages = jax.jit(lambda x, g: ema(x, g, jnp.ones((3, 1)), jnp.ones((3, 1)))[0])(x, decay)
    few = jax.jit(lambda x, w: short_conv(x, w[::-1])[0])(x, taps)
    assert_close("taps", by_fft(x, taps), few, TOLERANCE["fp32_op"])
    assert_close("average", by_fft(x, jnp.exp(jnp.arange(33)[:, None] * decay.T)), averages, TOLERANCE["fp32_op"])
    assert_close("sum", by_fft(x, k.at[:4].add(taps)), by_fft(x, k) + few, TOLERANCE["fp32_op"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segment_ids": jnp.ones((2, 5), jnp.int32)}, r"fft_conv: segment_ids: .*chunked_ema \(hydrax.ops.ema\) can$"),
        ({"initial_state": jnp.ones((2, 4, 3))}, r"fft_conv: initial_state: .*chunked_ema \(hydrax.ops.ema\) can$"),
        ({"k": jnp.ones((0, 3))}, r"k \(0, 3\): expected \('L', 3\) for x \(2, 5, 3\)"),
        ({"impl": "magic"}, "fft_conv: impl = 'magic': expected one of recurrent, chunked"),
    ],
)
def test_what_cannot_be_served_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fft_conv(**{"x": jnp.ones((2, 5, 3)), "k": jnp.ones((5, 3)), **change})
