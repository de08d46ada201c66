"""What is particular to gated_conv: it sees its taps and nothing else, and its two published forms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import ConfigError, build
from hydrax.mixers import Context
from hydrax.mixers.average.gated_conv import Config, GatedConv
from tests.contract.cases import normal
from tests.tolerances import TOLERANCE, assert_close, assert_equal

pytestmark = pytest.mark.thorough

D, T = 8, 20


def make(**options: Any) -> GatedConv:
    return GatedConv(D, build(Config, options).fill(D), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("width", [1, 3, 7])
def test_nothing_beyond_the_receptive_field(width: int):
    module = make(conv_width=width)
    graph, state = nnx.split(module)
    y = jax.jit(lambda state, x: nnx.merge(graph, state)(x, Context.of(x))[0])
    x, t = normal(0, 1, T, D), 5
    changed = np.where(np.arange(T)[:, None] == t, 100 * normal(1, T, D), x)
    before, after = (np.asarray(y(state, jnp.asarray(a)))[0] for a in (x, changed))
    assert np.all(np.any(before != after, axis=-1)[t : t + width])
    outside = np.r_[:t, t + width : T]
    assert_equal("outputs that do not see the token", after[outside], before[outside])


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(("preset", "width"), [("based", 3), ("mambaout", 7)])
def test_presets_are_their_formulas(preset: str, width: int):
    module, x = make(**Config.PRESETS[preset]), normal(0, 2, T, D)
    u, z = (np.einsum("btd,de->bte", x, p.kernel[...]) for p in (module.u, module.gate))
    assert u.shape == (2, T, 2 * D)
    past = np.pad(u, ((0, 0), (width - 1, 0), (0, 0)))
    c = sum(module.conv.weight[i] * past[:, i : i + T] for i in range(width)) + module.conv.bias[...]
    gated = {"based": silu(c) * z, "mambaout": c * silu(z)}[preset]
    y, state = module(x, Context.of(x), module.init_state(2, T, jnp.float32))
    assert_close("y", y, gated @ np.asarray(module.project.kernel[...]), TOLERANCE["fp32_op"])
    assert state.keys() == {"conv"}
    assert_close("state", state["conv"], u[:, T - width + 1 :], TOLERANCE["fp32_op"])


def test_the_default_is_mambaout():
    assert Config(**Config.PRESETS["mambaout"]) == Config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_width": 0}, "conv_width = 0: expected an integer >= 1"),
        ({"gate_activation": "gelu"}, "gate_activation = 'gelu': expected one of none, silu"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error:
        make(**options)
    assert message in str(error.value)
