"""What is particular to rglru: the equations as published, where documents start, a root of bounded slope."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import ConfigError
from hydrax.core.numerics import fp32
from hydrax.mixers import Context
from hydrax.mixers.linear.rglru import MAX_SLOPE, RGLRU, Config, bounded_sqrt
from tests.contract.cases import inside, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal

pytestmark = pytest.mark.thorough

D, H, T = 8, 2, 13
SEG = np.stack([segments([1, 5, 7], T), segments([10], T)])


def made(d_model: int = D, **options: object) -> RGLRU:
    return RGLRU(d_model, Config(**{"heads": H, **options}).fill(d_model), rngs=nnx.Rngs(0))


def moved(seed: int, **options: object) -> RGLRU:
    """With no parameter at zero."""
    mixer = made(**options)
    graph, state = nnx.split(mixer)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + 0.3 * normal(seed, *x.shape)), state))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def as_published(mixer: RGLRU, x: np.ndarray, seg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y and the last h of the equations in arXiv 2402.19427 §2.4, token by token in fp64."""
    p = {"/".join(map(str, k)): np.asarray(v[...], np.float64) for k, v in nnx.to_flat_state(nnx.state(mixer))}
    positions, _ = inside(seg)
    u_in, gate = (np.tensordot(x, p[f"{n}/kernel"], 1) + p[f"{n}/bias"] for n in ("x", "gate"))
    taps, found, last = p["x_conv/weight"], np.zeros(gate.shape), np.zeros((len(x), *p["rate"].shape))
    for row, t in np.argwhere(seg != 0):
        past = range(min(len(taps), positions[row, t] + 1))
        u = p["x_conv/bias"] + sum(taps[-1 - i] * u_in[row, t - i] for i in past)
        r, i = (sigmoid(np.einsum("hv,hvw->hw", u, p[f"{n}/kernel"]) + p[f"{n}/bias"]) for n in ("keep", "write"))
        log_a = -8 * r * np.logaddexp(0, p["rate"])
        a, factor = (np.exp(log_a), np.sqrt(-np.expm1(2 * log_a))) if positions[row, t] else (0, 1)
        last[row] = found[row, t] = a * last[row] + factor * i * u
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return np.tensordot(gelu * found, p["project/kernel"], 2) + p["project/bias"], last


@pytest.mark.parametrize("rate", [0.0, -12.0], ids=["usual", "a decay of almost 1"])
def test_it_follows_the_published_equations(rate: float) -> None:
    """Also where 1 - a² is as small as e^-10: a difference from 1 would have few digits left."""
    mixer = moved(1)
    mixer.rate[...] += rate
    x = normal(2, 2, T, D)
    y, state = jax.jit(lambda x: mixer(x, Context.of(x, jnp.asarray(SEG))))(x)
    y_ref, h_ref = as_published(mixer, x.astype(np.float64), SEG)
    real = SEG[..., None] != 0
    assert_close("y", y * real, y_ref * real, TOLERANCE["fp32_op"])
    assert_close("h", state["memory"], h_ref, TOLERANCE["fp32_op"])


def test_without_a_recurrence_gate_the_state_is_kept_and_nothing_written() -> None:
    """r = 0; only the first token of a document is read all the same."""
    mixer, x = moved(3), jnp.asarray(normal(4, 1, T, D))
    mixer.keep.bias[...] -= 1e4
    begin = jax.jit(lambda x: mixer(x, Context.of(x))[1]["memory"])
    first = begin(x[:, :1])
    assert np.abs(first).min() > 1e-3
    assert_close("h of a document", begin(x), first, TOLERANCE["fp32_op"])
    given = {"memory": jnp.asarray(normal(5, 1, H, D // H)), "x": jnp.zeros((1, 3, H, D // H))}
    later = Context(positions=jnp.arange(4, 4 + T)[None])
    assert_equal("h of a continuation", jax.jit(lambda x: mixer(x, later, given)[1]["memory"])(x), given["memory"])


def test_gradients_of_a_token_that_keeps_all_are_finite() -> None:
    """a = 1 exactly, where the square root has no derivative: the bound takes its place."""
    graph, state = nnx.split(moved(6))
    state["keep"]["bias"][...] -= 1e4
    x = jnp.asarray(normal(7, 1, T, D))
    grads = jax.jit(jax.grad(lambda state: nnx.merge(graph, state)(x, Context.of(x))[0].sum()))(state)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_the_slope_of_the_root_is_bounded() -> None:
    x = jnp.asarray([0.0, 1e-8, MAX_SLOPE**-2 / 4, 1e-6, 0.25, 1.0])
    expected = [MAX_SLOPE, MAX_SLOPE, MAX_SLOPE, 500, 1, 0.5]
    assert_close("root", bounded_sqrt(x), np.sqrt(np.asarray(x, np.float64)), 1e-6)
    assert_close("backwards", jax.vmap(jax.grad(bounded_sqrt))(x), expected, 1e-5)
    assert_close("forwards", jax.jvp(bounded_sqrt, (x,), (jnp.ones_like(x),))[1], expected, 1e-5)


def test_gates_and_state_are_fp32_in_every_dtype() -> None:
    mixer, x = moved(8), normal(9, 1, T, D)
    u = jnp.asarray(normal(10, 1, T, H, D // H), jnp.bfloat16)
    kernel = fp32(mixer.keep.kernel[...].astype(jnp.bfloat16))
    gate = sigmoid(np.einsum("bthv,hvw->bthw", fp32(u), kernel) + np.asarray(mixer.keep.bias[...]))
    assert mixer.keep(u).dtype == jnp.float32
    assert_close("r", mixer.keep(u), gate, TOLERANCE["fp32_op"])
    y, state = mixer(jnp.asarray(x, jnp.bfloat16), Context.of(x))
    assert (y.dtype, state["memory"].dtype, state["x"].dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)


def test_initial_values() -> None:
    """ρ² uniform between 0.9² and 0.999², ρ = exp(-softplus(Λ)); the convolution small, biases zero."""
    mixer = made(64, heads=8, value_dim=512)
    squares = np.sort(np.exp(-2 * np.asarray(jax.nn.softplus(fp32(mixer.rate[...])), np.float64)).ravel())
    assert_close("ρ²", squares, np.linspace(0.9**2, 0.999**2, squares.size), 5e-3)
    assert_close("spread of taps", jnp.std(mixer.x_conv.weight[...]), 0.1 / np.sqrt(4), 0.03)
    assert_close("spread of gates", jnp.std(mixer.keep.kernel[...]), 512**-0.5, 0.01)
    for part in (mixer.x, mixer.x_conv, mixer.keep, mixer.write, mixer.gate, mixer.project):
        assert_equal("bias", part.bias[...], jnp.zeros_like(part.bias[...]))
    assert [mixer.rate.get_metadata(key) for key in ("cast", "decay", "matrix")] == [False, False, None]


def test_widths_follow_from_the_model() -> None:
    assert Config(heads=10).fill(2560) == Config(**Config.PRESETS["griffin"])
    with pytest.raises(ConfigError, match="heads = 3: expected a divisor of d_model = 8"):
        Config(heads=3).fill(8)
