"""The tap "keys": what every mixer with keys shows is what it writes with, before norm, feature map and positions."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.typing import Array
from hydrax.mixers import Context, Mixer
from hydrax.mixers.linear import hgrn2
from tests.contract.cases import LAYER, D, case, normal
from tests.tolerances import TOLERANCE, assert_close, assert_equal

pytestmark = pytest.mark.thorough

T = 11


def convolved(mixer: Any, x: Array) -> Array:
    """Of the delta rules."""
    return mixer.inputs.k_conv(mixer.inputs.k(x))[0]


def projected(mixer: Any, x: Array) -> Array:
    return mixer.k(x)


KEYS: dict[str, Callable[[Any, Array], Array]] = {
    "aaren": projected,
    "agent": projected,
    "based": projected,
    "deltanet": convolved,
    "efficient": projected,
    "fastmax": projected,
    "flow": projected,
    "gdn": convolved,
    "gla": projected,
    "hgrn2": lambda mixer, x: hgrn2.forget_gates(mixer.forget(x), jnp.zeros((2, 8)))[1],
    "inline": projected,
    "kda": convolved,
    "lightning": projected,
    "linear_attn": projected,
    "mamba2": lambda mixer, x: mixer.b_conv(mixer.b(x))[0],
    "retention": projected,
    "taylor": projected,
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_can_be_seen_and_replaced(name: str) -> None:
    made = case(name)
    mixer: Mixer = made.merge(made.params)
    x = jnp.asarray(normal(0, 2, T, D))
    seen = []

    def run(tap: Callable[[Array], Array] | None) -> Array:
        return mixer(x, Context.of(x, **LAYER, taps={} if tap is None else {"keys": tap}))[0]

    plain, tapped = run(None), run(lambda k: seen.append(k) or k)
    assert_equal("y under an identity tap", tapped, plain)
    assert len(seen) == 1 and seen[0].shape[:2] == (2, T) and seen[0].ndim == 4
    assert_close("keys", seen[0], KEYS[name](mixer, x), TOLERANCE["fp32_op"])
    other = run(lambda k: k.at[:, 3].set(k[:, 3, ..., ::-1]))
    assert_equal("y before the key that was replaced", other[:, :3], plain[:, :3])
    assert np.any(np.asarray(other[:, 3:] != plain[:, 3:])), "the tap has no effect"


def test_a_delta_rule_norms_what_the_tap_returns() -> None:
    made = case("gdn")
    mixer = made.merge(made.params)
    x = jnp.asarray(normal(0, 2, T, D))
    scaled = mixer.inputs(x, Context.of(x, taps={"keys": lambda k: 50 * k}), None)[0][1]
    size = jnp.linalg.norm(scaled, axis=-1)
    assert_close("norm of the keys", size, jnp.ones_like(size), TOLERANCE["fp32_op"])
