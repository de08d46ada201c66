"""Constants of a scaling law are found again in losses made from them."""

import dataclasses

import numpy as np
import pytest

from hydrax.core.build import ConfigError
from hydrax.eval import scaling
from hydrax.eval.scaling import PUBLISHED, Law, fit, token_ratio

TRUE = PUBLISHED["2203.15556"]
N, D = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e10, 6), np.geomspace(1e8, 1e11, 6)))


def noisy(scale, seed=0):
    return TRUE(N, D) * np.exp(scale * np.random.default_rng(seed).normal(size=N.shape))


@pytest.mark.parametrize("law", PUBLISHED.values(), ids=PUBLISHED)
def test_exact_losses_give_back_the_constants(law):
    found = fit(N, D, law(N, D))
    np.testing.assert_allclose(dataclasses.astuple(found.law), dataclasses.astuple(law), rtol=1e-6)
    assert found.residual < 1e-9
    assert found.low is None


def test_intervals_hold_the_constants_and_widen_with_noise():
    narrow, wide = (fit(N, D, noisy(scale), resamples=40) for scale in (0.001, 0.01))
    for name in ("E", "alpha", "beta"):
        low, true, high = getattr(narrow.low, name), getattr(TRUE, name), getattr(narrow.high, name)
        assert low - 0.02 * true < true < high + 0.02 * true, name
        assert high - low < getattr(wide.high, name) - getattr(wide.low, name), name


def test_an_outlier_moves_little():
    losses = noisy(1e-4)
    losses[7] *= 1.2
    assert abs(fit(N, D, losses).law.alpha - TRUE.alpha) < 0.01


def test_the_gradient_is_that_of_the_loss():
    logs = np.log(np.stack([N, D, noisy(0.01)]))
    x = np.array([0.5, 6.0, 6.0, 0.34, 0.28])
    value, gradient = scaling._objective(x, logs)
    for i in range(5):
        step = np.eye(5)[i] * 1e-6
        difference = scaling._objective(x + step, logs)[0] - scaling._objective(x - step, logs)[0]
        np.testing.assert_allclose(gradient[i], difference / 2e-6, rtol=1e-4)
    assert value > 0


def test_the_token_ratio_is_that_of_equal_loss():
    better = dataclasses.replace(TRUE, B=TRUE.B / 2)
    ratio = float(token_ratio(better, TRUE, 1e9, 1e10))
    np.testing.assert_allclose(better(1e9, ratio * 1e10), TRUE(1e9, 1e10))
    np.testing.assert_allclose(ratio, 0.5 ** (1 / TRUE.beta))
    assert token_ratio(Law(3.0, 1.0, 1.0, 1.0, 1.0), TRUE, 1e9, 1e10) == np.inf


@pytest.mark.parametrize("few", [slice(5), slice(6)], ids=["five runs", "one number of tokens"])
def test_too_few_runs_are_refused(few):
    with pytest.raises(ConfigError, match="expected at least 6 runs, 2 sizes and 2 numbers of tokens"):
        fit(N[few], D[few], TRUE(N, D)[few])
