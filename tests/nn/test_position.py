"""Rotary positions: the rotation written with complex numbers, and what depends on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.build import ConfigError, build
from hydrax.nn.position import Rope, rope
from tests.tolerances import TOLERANCE, assert_close, assert_equal

X = jax.random.normal(jax.random.key(0), (2, 7, 3, 12))
POSITIONS = jnp.asarray([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 500, 100_000]], jnp.int32)


@pytest.mark.parametrize(("fraction", "turned"), [(1.0, 12), (0.5, 6), (0.7, 8), (0.3, 2)])
def test_channels_turn_as_complex_numbers(fraction: float, turned: int) -> None:
    half = turned // 2
    x, p = np.asarray(X, np.float64), np.asarray(POSITIONS)[:, :, None, None]
    z = (x[..., :half] + 1j * x[..., half:turned]) * np.exp(1j * p * 500.0 ** (-2 * np.arange(half) / turned))
    expected = np.concatenate([z.real, z.imag, x[..., turned:]], axis=-1)
    actual = rope(X, POSITIONS, 500.0, fraction)
    short = np.asarray(POSITIONS) < 1000  # fp32 angles keep 1e-5 of a turn only up to here
    assert_close("short", actual[short], expected[short], TOLERANCE["fp32_op"])
    assert_close("long", actual, expected, 5e-3)


def test_a_fraction_of_zero_has_no_positions() -> None:
    assert_equal("x", rope(X, POSITIONS, fraction=0.0), X)


def test_scores_depend_on_the_distance_alone() -> None:
    def scores(shift: int) -> jax.Array:
        q, k = rope(X, POSITIONS[:1] + shift), rope(X[::-1], POSITIONS[:1] + shift)
        return jnp.einsum("bthk,bshk->bhts", q, k, precision="highest")

    assert_close("scores", scores(37), scores(0), TOLERANCE["fp32_op"])


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
