"""Schedules at the points that define them."""

import typing

import numpy as np
import pytest

from hydrax.train.schedule import SHAPES, Name, make_schedule

STEPS, WARMUP, PEAK = 100, 20, 2.0

# name -> factor of the peak after 20, 60, 84, 92 and 100 of 100 steps (decay: the last 16), final rate 0.1
EXPECTED = {
    "constant": (1, 1, 1, 1, 1),
    "cosine": (1, 0.55, None, None, 0.1),
    "wsd": (1, 1, 1, 0.55, 0.1),
    "wsd_sqrt": (1, 1, 1, 0.1 + 0.9 * (1 - 0.5**0.5), 0.1),
}


def schedule(name, **options):
    settings = {"peak": PEAK, "steps": STEPS, "warmup": WARMUP, "decay_fraction": 0.2, "final_fraction": 0.1}
    return make_schedule(name, **(settings | options))


def test_every_row_can_be_configured():
    assert set(typing.get_args(Name)) == set(SHAPES) == set(EXPECTED)


@pytest.mark.parametrize("name", SHAPES)
def test_shape(name):
    for n, factor in zip((20, 60, 84, 92, 100), EXPECTED[name], strict=True):
        if factor is not None:
            np.testing.assert_allclose(schedule(name)(n), PEAK * factor, rtol=1e-6, err_msg=f"after {n} steps")


@pytest.mark.parametrize("name", SHAPES)
def test_warmup_is_linear_and_starts_above_zero(name):
    np.testing.assert_allclose([schedule(name)(n) for n in (0, 9, 19)], PEAK * np.array([0.05, 0.5, 1]), rtol=1e-6)


@pytest.mark.parametrize("options", [{"warmup": 0}, {"warmup": 300}, {"decay_fraction": 0.0}, {"final_fraction": 0.0}])
@pytest.mark.parametrize("name", SHAPES)
def test_extreme_settings_stay_finite(name, options):
    rates = np.array([schedule(name, **options)(n) for n in range(STEPS + 2)])
    assert np.isfinite(rates).all()
    assert (rates >= 0).all()
    assert rates.max() <= PEAK
    assert rates[0] > 0
