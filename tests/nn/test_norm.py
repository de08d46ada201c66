"""LayerNorm against its formula in fp64, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hydrax.nn.norm import NORMS, LayerNorm
from tests.tolerances import TOLERANCE, assert_close

EPS = 1e-3


def test_layer_norm_and_its_gradients() -> None:
    """Over the last two of four dimensions; the gradient of x by hand: ĝ = g ⊙ w, (ĝ - mean ĝ - x̂ mean ĝ x̂) / σ."""
    rng = np.random.default_rng(0)
    x, g = rng.normal(2.0, 3.0, (2, 5, 3, 4)), rng.normal(size=(2, 5, 3, 4))
    w, b = rng.normal(size=(2, 3, 4))
    norm = LayerNorm((3, 4), axes=("heads", "state_v"), eps=EPS, rngs=nnx.Rngs(0))
    graph, state = nnx.split(norm)
    state["weight"][...], state["bias"][...] = (jnp.asarray(a, jnp.float32) for a in (w, b))

    y, pullback = jax.vjp(lambda s, x: nnx.merge(graph, s)(x), state, jnp.asarray(x, jnp.float32))
    dp, dx = pullback(jnp.asarray(g, jnp.float32))
    dims = (-2, -1)
    spread = np.sqrt(x.var(dims, keepdims=True) + EPS)
    unit, gw = (x - x.mean(dims, keepdims=True)) / spread, g * w
    slope = gw - gw.mean(dims, keepdims=True) - unit * (gw * unit).mean(dims, keepdims=True)
    want = {"y": unit * w + b, "x": slope / spread, "weight": (g * unit).sum((0, 1)), "bias": g.sum((0, 1))}
    got = {"y": y, "x": dx, "weight": dp["weight"][...], "bias": dp["bias"][...]}
    for name, value in want.items():
        assert_close(name, got[name], value, TOLERANCE["fp32_op"])


def test_it_removes_a_common_shift_and_no_other_norm_does() -> None:
    """Statistics are those of the given numbers in fp32: x and x + 64 are exact in bfloat16."""
    x = jnp.asarray(np.random.default_rng(1).integers(-32, 32, (3, 16)) / 2, jnp.bfloat16)
    for name, make in NORMS.items():
        norm = make(16, axes=("norm",), rngs=nnx.Rngs(0), eps=1e-6)
        moved = np.abs(np.asarray(norm(x + 64) - norm(x), np.float32)).max()
        assert norm(x).dtype == jnp.bfloat16
        assert (moved < 0.02) == (name == "layernorm"), (name, moved)
