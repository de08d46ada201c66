"""The comparison all other tests rest on can itself fail."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

REFERENCE = np.linspace(-1, 1, 12).reshape(3, 4)


@pytest.mark.parametrize("tolerance", TOLERANCE.values(), ids=TOLERANCE.keys())
def test_the_limit_is_the_relative_rms(tolerance):
    assert_close("x", REFERENCE * (1 + 0.9 * tolerance), REFERENCE, tolerance)
    with pytest.raises(AssertionError, match=r"x \(3, 4\): relative RMS"):
        assert_close("x", REFERENCE * (1 + 1.1 * tolerance), REFERENCE, tolerance)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite_is_a_failure(value):
    broken = REFERENCE.copy()
    broken[1, 2] = value
    for actual, expected in ((broken, REFERENCE), (REFERENCE, broken), (broken, broken)):
        with pytest.raises(AssertionError, match=r"1 of 12 entries not finite, first at \(1, 2\)"):
            assert_close("x", actual, expected, 1e-2)


def test_a_zero_reference_asks_for_zero():
    zero = jnp.zeros(5, jnp.bfloat16)
    assert_close("x", zero, zero, 1e-5)
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close("x", zero + 1e-6, zero, 1e-5)


def test_shapes_and_trees():
    with pytest.raises(AssertionError, match=r"shape \(3,\), expected \(3, 1\)"):
        assert_close("x", np.ones(3), np.ones((3, 1)), 1e-2)
    with pytest.raises(AssertionError, match=r"state \['a'\]\[1\]"):
        assert_trees_close("state", {"a": [REFERENCE, REFERENCE]}, {"a": [REFERENCE, 2 * REFERENCE]}, 1e-2)
    with pytest.raises(AssertionError, match="differ in structure"):
        assert_trees_close("state", {"a": REFERENCE}, {"b": REFERENCE}, 1e-2)


def test_equal_means_every_bit():
    assert_equal("x", REFERENCE, REFERENCE.copy())
    with pytest.raises(AssertionError, match=r"1 of 12 differ, first at \(0, 3\)"):
        assert_equal("x", REFERENCE, np.where(np.arange(12).reshape(3, 4) == 3, np.nextafter(REFERENCE, 9), REFERENCE))
