"""Rotary positions and learned phases: rotations written with complex numbers, and what depends on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import ConfigError, build
from hydrax.nn.attention import QKV, AttentionConfig
from hydrax.nn.position import Rope, lrpe, lrpe_phases, rope, turned_by
from tests.tolerances import TOLERANCE, assert_close, assert_equal

X = jax.random.normal(jax.random.key(0), (2, 7, 3, 12))
POSITIONS = jnp.asarray([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 500, 100_000]], jnp.int32)


@pytest.mark.parametrize(("fraction", "turned"), [(1.0, 12), (0.5, 6), (0.7, 8), (0.3, 2)])
def test_channels_turn_as_complex_numbers(fraction: float, turned: int) -> None:
    half = turned // 2
    x, p = np.asarray(X, np.float64), np.asarray(POSITIONS)[:, :, None, None]
    z = (x[..., :half] + 1j * x[..., half:turned]) * np.exp(1j * p * 500.0 ** (-2 * np.arange(half) / turned))
    expected = np.concatenate([z.real, z.imag, x[..., turned:]], axis=-1)
    assert_close("x", rope(X, POSITIONS, 500.0, fraction), expected, TOLERANCE["fp32_op"])


def test_a_fraction_of_zero_has_no_positions() -> None:
    assert_equal("x", rope(X, POSITIONS, fraction=0.0), X)


@pytest.mark.parametrize("shift", [37, 1_000_000, 2**24 - 8])
def test_scores_depend_on_the_distance_alone(shift: int) -> None:
    def scores(shift: int) -> jax.Array:
        q, k = rope(X, POSITIONS[:1] + shift), rope(X[::-1], POSITIONS[:1] + shift)
        return jnp.einsum("bthk,bshk->bhts", q, k, precision="highest")

    assert_close("scores", scores(shift), scores(0), TOLERANCE["fp32_op"])


def test_bf16_is_turned_in_fp32() -> None:
    x = X.astype(jnp.bfloat16)
    actual = rope(x, POSITIONS)
    assert actual.dtype == jnp.bfloat16
    assert_equal("x", actual, rope(x.astype(jnp.float32), POSITIONS).astype(jnp.bfloat16))


def test_options_are_checked() -> None:
    assert build(Rope, {}) == Rope(theta=10000.0, fraction=1.0)
    for key, value in {"theta": 0.0, "fraction": 1.5}.items():
        with pytest.raises(ConfigError, match=f"rope.{key} = {value}"):
            build(Rope, {key: value}, "rope")


@pytest.mark.parametrize("theta", [0.01, 10000.0])
def test_angles_are_exact_up_to_whole_turns(theta: float) -> None:
    """At long, negative and half positions, and at frequencies above a turn per token."""
    frequencies = theta ** -(np.arange(8) / 8)
    for positions in (np.array([0, 1, -1, -77_777, 200_001, 2**24 - 1], np.int32), np.float32([0.5, 1.5, 100_000.5])):
        found = turned_by(jnp.asarray(positions), frequencies, jnp.dtype(jnp.float32))
        turns = (np.asarray(found, np.float64) - positions[:, None] * frequencies) / (2 * np.pi)
        assert np.abs(turns - np.round(turns)).max() < 1e-6


@pytest.mark.parametrize(("style", "last"), [("interleaved", 4 / 5), ("torchscale", 1.0)])
def test_interleaved_channels_turn_as_complex_numbers(style: str, last: float) -> None:
    """Neighbours are real and imaginary parts; the slowest pair of RetNet turns by 1/theta itself."""
    x, p = np.asarray(X, np.float64), np.asarray(POSITIONS)[:, :, None, None] % 1000
    z = (x[..., :10:2] + 1j * x[..., 1:10:2]) * np.exp(1j * p * 500.0 ** -np.linspace(0, last, 5))
    expected = np.concatenate([np.stack([z.real, z.imag], axis=-1).reshape(2, 7, 3, 10), x[..., 10:]], axis=-1)
    actual = rope(X, POSITIONS % 1000, 500.0, 10 / 12, style)
    assert_close("x", actual, expected, TOLERANCE["fp32_op"])
    assert_equal("turn", Rope(500.0, 10 / 12, style).turn(X, POSITIONS % 1000), actual)


def test_attention_turns_queries_and_keys_in_the_style_it_is_given() -> None:
    cfg = AttentionConfig(heads=2, rope=Rope(500.0, 0.5, "interleaved")).with_head_width(8)
    qkv, x = QKV(12, cfg, rngs=nnx.Rngs(0)), X[:, :, 0]
    q, k, _ = qkv(x, POSITIONS)
    for turned, linear in ((q, qkv.q), (k, qkv.k)):
        assert_equal("x", turned, rope(linear(x), POSITIONS, 500.0, 0.5, "interleaved"))


def test_learned_phases_make_scores_of_cosines() -> None:
    phases = np.asarray(lrpe_phases(jax.random.key(0), (3, 12), jnp.float32), np.float64)
    assert_close("at first", phases.ravel(), 10000.0 ** (-np.arange(36) / 18), TOLERANCE["fp32_op"])
    phases = phases + 0.3
    p = POSITIONS[1:] % 64
    q, k = (lrpe(x, p, jnp.asarray(phases, jnp.float32)) for x in (X[:1], X[1:]))
    assert q.shape == (1, 7, 3, 24)
    apart = np.asarray(p)[0, :, None] - np.asarray(p)[0]
    cosines = np.cos(apart[None, :, :, None] * phases[:, None, None])  # [H,T,S,K]
    expected = np.einsum("thk,shk,htsk->hts", *np.asarray(X, np.float64), cosines)
    assert_close("scores", np.einsum("bthk,bshk->hts", q, k), expected, TOLERANCE["fp32_op"])
    assert lrpe(X.astype(jnp.bfloat16), POSITIONS, jnp.asarray(phases, jnp.float32)).dtype == jnp.bfloat16
