"""boom against its formula in fp64, and where it can stand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import ConfigError, build
from hydrax.models.spec import ModelConfig, resolve
from hydrax.nn.ffn import FFN
from tests.tolerances import TOLERANCE, assert_close

D, F = 6, 18


def test_boom_adds_up_its_channels() -> None:
    """Values, and gradients against central differences of the formula."""
    rng = np.random.default_rng(0)
    ffn = FFN(D, F, "boom", bias=True, rngs=nnx.Rngs(0))
    x, W, b, g = rng.normal(size=(2, 5, D)), rng.normal(size=(D, F)), rng.normal(size=F), rng.normal(size=(2, 5, D))
    graph, state = nnx.split(ffn)
    assert {"/".join(path) for path, _ in nnx.to_flat_state(state)} == {"up/kernel", "up/bias"}

    def formula(x: np.ndarray, W: np.ndarray, b: np.ndarray) -> np.ndarray:
        a = x @ W + b
        a = a / (1 + np.exp(-1.702 * a))
        return sum(a[..., i : i + D] for i in range(0, F, D))

    def run(x: jax.Array, W: jax.Array, b: jax.Array) -> jax.Array:
        flat = {"up": {"kernel": W, "bias": b}}
        return nnx.merge(graph, jax.tree.map(lambda v, new: v.replace(new), state, nnx.State(flat), is_leaf=is_param))(
            x
        )

    given = (x, W, b)
    y, pullback = jax.vjp(run, *(jnp.asarray(a, jnp.float32) for a in given))
    assert_close("y", y, formula(*given), TOLERANCE["fp32_op"])
    for i, gradient in enumerate(pullback(jnp.asarray(g, jnp.float32))):
        along = rng.normal(size=given[i].shape)
        ends = [formula(*(a + s * 1e-5 * along if j == i else a for j, a in enumerate(given))) for s in (1, -1)]
        slope = np.sum(g * (ends[0] - ends[1])) / 2e-5
        assert_close(f"gradient {i}", np.sum(np.asarray(gradient) * along), slope, TOLERANCE["fp32_op"])


def is_param(x: object) -> bool:
    return isinstance(x, nnx.Param)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"ffn": "boom", "ffn_dim": 48}, "ffn_dim = 48: expected a multiple of d_model = 32 for ffn = boom"),
        ({"ffn": "moe", "moe": {"kind": "boom"}}, "moe.kind = 'boom': expected one of swiglu, geglu, reglu, sglu, mlp"),
    ],
)
def test_what_boom_cannot_do_ends_in_one_line(values: dict, line: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)):
        resolve(build(ModelConfig, {"d_model": 32, "pattern": "lstm", **values}))


def test_boom_is_four_times_as_wide_as_the_stream() -> None:
    (layer,) = resolve(build(ModelConfig, {"d_model": 40, "pattern": "lstm", "ffn": "boom"}))
    assert layer.ffn_dim == 160
