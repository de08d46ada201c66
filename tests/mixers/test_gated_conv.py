"""What is particular to gated_conv: what its kernels see, its published forms, and each kernel by a loop in fp64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax.core.build import ConfigError, build
from hydrax.core.typing import Array
from hydrax.mixers import Context
from hydrax.mixers.average.gated_conv import Config, GatedConv
from hydrax.nn.long_conv import NO_RESTART, Implicit
from hydrax.parallel.shards import Shards
from tests.contract import test_mixers as contract
from tests.contract.cases import case, normal
from tests.parallel import test_product as product
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


# --------------------------------------------------------------------------------------------------- the other kernels

KERNELS: dict[str, dict[str, Any]] = {
    "lka": {"kernel": "lka", "lka": {"width": 3, "spaced_width": 4, "dilation": 3}},
    "ema": {"kernel": "long", "conv_width": 3, "modes": 3, "conv_activation": "silu"},
    "implicit": {"kernel": "long", "conv_width": 2, "filter": "implicit", "horizon": 9},
}
LKA, EMA = 0, 1  # among the variants of the contract
EACH = pytest.mark.parametrize("variant", [LKA, EMA], ids=["lka", "ema"])


def named(module: GatedConv) -> dict[str, np.ndarray]:
    """The parameters by name, moved off zeros and equal numbers."""
    flat = {"/".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(nnx.state(module))}
    return {name: np.asarray(v, np.float64) + 0.1 * normal(i, *v.shape) for i, (name, v) in enumerate(flat.items())}


def by_taps(x: np.ndarray, w: np.ndarray, b: np.ndarray, dilation: int = 1) -> np.ndarray:
    y = np.zeros_like(x) + b
    for t, i in np.ndindex(len(x), len(w)):
        s = t - dilation * (len(w) - 1 - i)
        y[t] += w[i] * x[s] if s >= 0 else 0
    return y


def filtered(P: dict[str, np.ndarray], cfg: Config, u: np.ndarray) -> np.ndarray:
    """Token by token: the averages, or the kernel of the network, distance by distance."""
    y = np.zeros_like(u)
    if cfg.filter == "ema":
        p, a = (1 / (1 + np.exp(-P[f"filter/{n}"])) for n in ("delta", "alpha"))
        h = np.zeros_like(p)
        for t in range(len(u)):
            h = (1 - p * a) * h + p * P["filter/beta"] * u[t][:, None]
            y[t] = (P["filter/gamma"] * h).sum(-1) / cfg.modes**0.5
        return y
    for t in range(len(u)):
        for s in range(t + 1):
            tau = (t - s) / cfg.horizon
            angles = 2 * np.pi * tau * np.arange(1, 9)
            place = np.concatenate([[tau], np.cos(angles), np.sin(angles)])
            hidden = np.maximum(place @ P["filter/first"] + P["filter/offset"], 0)
            k = (hidden @ P["filter/second"] + P["filter/level"]) * np.exp(-np.log1p(np.exp(P["filter/rate"])) * tau)
            y[t] += k * u[s]
    return y


def oracle(P: dict[str, np.ndarray], cfg: Config, x: np.ndarray) -> np.ndarray:
    """One document [T,D]."""
    u = x @ P["u/kernel"]
    if cfg.kernel == "lka":
        near = by_taps(u, P["conv/near/weight"], P["conv/near/bias"])
        far = by_taps(near, P["conv/far/weight"], P["conv/far/bias"], cfg.lka.dilation)
        return ((far @ P["conv/channels/kernel"] + P["conv/channels/bias"]) * u) @ P["project/kernel"]
    c = by_taps(u, P["conv/weight"], P["conv/bias"]) + filtered(P, cfg, u)
    c = silu(c) if cfg.conv_activation == "silu" else c
    return (silu(x @ P["gate/kernel"]) * c) @ P["project/kernel"]


def of_parameters(module: GatedConv) -> Any:
    """The mixer as a function of its parameters by name, and an input of whole rows."""
    graph, state = nnx.split(module)
    paths = {"/".join(map(str, path)): (path, v) for path, v in nnx.to_flat_state(state)}

    def call(P: dict[str, Array], x: Array) -> Array:
        flat = [(path, v.replace(P[name])) for name, (path, v) in paths.items()]
        return nnx.merge(graph, nnx.from_flat_state(flat))(x, Context.of(x))[0]

    return call


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_their_loops(name: str):
    """Outputs, and the slopes of a weighted sum along a random direction of every parameter and of the input."""
    module = make(**KERNELS[name])
    P, x, dy = named(module), normal(100, T, D).astype(np.float64), normal(101, T, D).astype(np.float64)
    call = of_parameters(module)
    with jax.enable_x64(True):
        y, pullback = jax.vjp(jax.jit(call), P, jnp.asarray(x)[None])
        assert_close("fp64", y[0], oracle(P, module.cfg, x), TOLERANCE["fp64"])
        dP, dx = jax.tree.map(np.asarray, pullback(jnp.asarray(dy)[None]))
    for i, (what, gradient) in enumerate((dP | {"x": dx[0]}).items()):
        d = 1e-5 * normal(200 + i, *gradient.shape)

        def loss(sign: int, what: str = what, d: np.ndarray = d) -> float:
            moved = {n: a + sign * d * (n == what) for n, a in [*P.items(), ("x", x)] if n == what}
            return float((dy * oracle(P | moved, module.cfg, moved.get("x", x))).sum())

        assert_close(f"d{what}", (gradient * d).sum(), (loss(1) - loss(-1)) / 2, 1e-6)


def test_lka_sees_its_taps_and_nothing_else():
    module = make(**KERNELS["lka"])
    graph, state = nnx.split(module)
    y = jax.jit(lambda x: nnx.merge(graph, state)(x, Context.of(x))[0])
    x, t, reach = normal(0, 1, T, D), 2, 2 + 3 * 3
    changed = np.where(np.arange(T)[:, None] == t, 100 * normal(1, T, D), x)
    before, after = (np.asarray(y(jnp.asarray(a)))[0] for a in (x, changed))
    assert np.all(np.any(before != after, axis=-1)[t : t + reach + 1])
    outside = np.r_[:t, t + reach + 1 : T]
    assert_equal("outputs that do not see the token", after[outside], before[outside])


@pytest.mark.slow
def test_a_filter_without_weight_leaves_the_taps():
    """Outputs, and gradients of all that both have."""
    short, long = make(conv_width=3, conv_activation="silu"), make(**KERNELS["ema"])
    P, x = named(long), normal(0, 2, T, D)
    P = {n: jnp.asarray(a * (n != "filter/gamma"), jnp.float32) for n, a in P.items()}
    (a, da), (b, db) = (jax.jit(jax.vjp, static_argnums=0)(of_parameters(m), P, x) for m in (long, short))
    assert_close("y", a, b, TOLERANCE["fp32_op"])
    (da, dxa), (db, dxb) = (pull(jnp.asarray(normal(1, *x.shape))) for pull in (da, db))
    assert_close("dx", dxa, dxb, TOLERANCE["fp32_op"])
    for name in set(P) - {n for n in P if n.startswith("filter")}:
        assert_close(name, da[name], db[name], TOLERANCE["fp32_op"])


@EACH
def test_the_state_is_what_the_table_says(variant: int):
    contract.test_state_is_what_the_table_says(case("gated_conv", variant), jnp.bfloat16)


def test_a_document_restarts_and_decodes():
    contract.test_prefill_then_steps_at_every_split(case("gated_conv", LKA), contract.PACKED, jnp.float32)


@pytest.mark.slow
@EACH
@pytest.mark.parametrize(
    "test",
    [
        lambda mixer: contract.test_prefill_then_steps_at_every_split(mixer, contract.PACKED, jnp.float32),
        lambda mixer: contract.test_prefill_then_steps_at_every_split(mixer, None, jnp.bfloat16),
        lambda mixer: contract.test_two_calls_equal_one_at_every_split(mixer, contract.PACKED),
        lambda mixer: contract.test_the_future_does_not_change_the_past(mixer, 1e3),
        contract.test_packed_equals_separate,
        contract.test_documents_padding_and_neighbours_do_not_leak,
        contract.test_a_row_of_padding_leaves_the_state_alone,
        contract.test_starts_forgets_the_state,
        contract.test_long_rows_in_bf16,
        lambda mixer: contract.test_extremes_stay_finite(mixer, jnp.float32),
    ],
)
def test_the_rest_of_the_contract(variant: int, test: Any):
    test(case("gated_conv", variant))


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_divided_rows(variant: int, layout: str):
    options: dict[str, Any] = {"dtype": jnp.float32, "tolerance": TOLERANCE["fp32_op"], "variant": variant}
    product.compare("gated_conv", "ring_state", layout, 2, **options)


def test_what_an_implicit_filter_cannot_do():
    module, x = make(**KERNELS["implicit"]), jnp.asarray(normal(0, 1, T, D))
    line = f"filter = 'implicit': {NO_RESTART}"
    for refused in (
        lambda: module.init_state(1, T, jnp.float32),
        lambda: module(x, Context.of(x, jnp.ones((1, T), jnp.int32))),
    ):
        with pytest.raises(ConfigError) as error:
            refused()
        assert str(error.value) == line
    divided = Shards((), jnp.ones((1, 2), bool), jnp.ones((1, 2), bool))
    with pytest.raises(ConfigError, match=r"mesh.context = 2: filter = 'implicit' transforms whole rows: expected 1"):
        module.filter(module.u(x), Context.of(x, shards=divided), None)


def test_an_implicit_filter_has_the_size_of_its_input():
    """At first, and its kernels decay at many rates."""
    k = np.asarray(Implicit(64, 256, rngs=nnx.Rngs(0)).kernel(1024))
    assert 0.05 < np.sqrt((k**2).sum(0)).mean() < 2
    energy = np.cumsum(k**2, axis=0) / (k**2).sum(0)
    reach = np.argmax(energy > 0.9, axis=0)
    assert reach[:8].mean() < 30 < reach[-8:].mean() / 1.2 and reach.max() < 256
