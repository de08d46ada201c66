"""Two ways to read one memory: attention written out, the recurrence's own layer, and what a schedule may change."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax.core.typing import Array, PyTree
from hydrax.mixers import Context
from tests.models.small import (
    D,
    Layer,
    attention,
    below,
    conv,
    drawn,
    fp64,
    layers,
    normal,
    plan,
    rms,
    rope,
    silu,
    tokens,
    visible,
)
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

T, LENGTHS = 13, (6, 5)
X = normal("x", 2, T, D)
SEG = jnp.asarray([[1] * T, [1] * 6 + [2] * 5 + [0] * 2], jnp.int32)
DOCUMENTS = [(0, slice(0, T)), (1, slice(0, 6)), (1, slice(6, 11))]
RANDOM = jnp.asarray(np.random.default_rng(0).integers(0, 2, (2, T)), jnp.int32)
PLAIN = {"qk_norm": "none", "rope": {"fraction": 0.0}, "softcap": 1.5}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gdn": ("gdn", {"heads": 2, "key_dim": 4, "value_dim": 4}, {}),
    "gdn grouped": ("gdn", {"heads": 2, "value_heads": 4, "key_dim": 4, "value_dim": 4}, PLAIN),
    "mamba2": ("mamba2", {"heads": 2, "value_heads": 4, "key_dim": 4, "value_dim": 4}, {"rope": {"theta": 30.0}}),
    "gla": ("gla", {"heads": 2, "key_dim": 4, "value_dim": 4}, {}),
    "mamba2 bare": ("mamba2", {"value_heads": 2, "key_dim": 4, "value_dim": 4, "conv_activation": "none"}, PLAIN),
}


@functools.cache
def layer(case: str, default: str = "attn") -> tuple[Layer, Layer]:
    """The layer of two modes, and that of its recurrence with the same parameters."""
    name, own, options = CASES[case]
    block = {"mixer": f"modes({name})", "options": {"default": default, **options}}
    (spec,) = layers("x", blocks={"x": block}, mixers={name: own})
    both, single = Layer.of(spec.mix), Layer.of(spec.mix.members[0])
    same = below(both.params, "linear/") | {"project/kernel": both.params["project/kernel"]}
    assert same.keys() == single.params.keys()
    single.params.update(same)
    return both, single


@functools.partial(jax.jit, static_argnums=0)
def output(made: Layer, modes: Array | None) -> Array:
    return made(made.params, X, segment_ids=SEG, modes=modes, impl="recurrent")[0]


def by_attention(case: str, x: np.ndarray) -> np.ndarray:
    """y of one document [1,n,D], every token read by softmax attention over convolved keys and values."""
    name, own, options = CASES[case]
    p = fp64(layer(case)[0].params)
    kv, n = below(p, "linear/"), x.shape[1]
    act = silu if own.get("conv_activation") != "none" else np.asarray

    def convolved(which: str, source: str) -> np.ndarray:
        bias = kv.get(f"{source}_conv/bias", 0.0)
        return act(conv(np.tensordot(x, kv[f"{which}/kernel"], 1), kv[f"{source}_conv/weight"], bias))

    prefix = "inputs/" if name == "gdn" else ""
    k, v = (convolved(f"{prefix}{w}", f"{prefix}{w}") for w in ("kv" if name == "gdn" else "bx"))
    q = np.tensordot(x, p["q/kernel"], 1)
    if options.get("qk_norm") != "none":
        q, k = rms(q, p["q_norm/weight"]), rms(k, p["k_norm/weight"])
    positions = np.arange(n)[None]
    turned = options.get("rope", {}).get("fraction") != 0.0
    if turned:
        theta = options.get("rope", {}).get("theta", 10000.0)
        q, k = rope(q, positions, theta), rope(k, positions, theta)
    seen = visible(positions, np.ones((1, n), int))
    o = attention(q, k, v, seen, options.get("softcap"))
    gate = silu(np.tensordot(x, kv["gate/kernel"], 1))
    if name == "gdn":
        z = rms(o, kv["norm/weight"], eps=1e-5) * gate
    else:
        groups = own.get("heads", 1)
        z = ((o + kv["skip"][:, None] * v) * gate).reshape(1, n, groups, -1, v.shape[-1])
        weight = kv["norm_weight"].reshape(groups, -1, v.shape[-1])
        z = rms(z, weight, axes=(-2, -1), eps=1e-5).reshape(v.shape)
    return np.tensordot(z, p["project/kernel"], 2)


EVERY_CASE = pytest.mark.parametrize("case", [case for case in CASES if case != "gla"])


@EVERY_CASE
def test_attention_everywhere_is_softmax_attention_over_convolved_keys(case: str):
    y = output(layer(case)[0], jnp.ones((2, T), jnp.int32))
    for row, span in DOCUMENTS:
        want = by_attention(case, np.asarray(X[row : row + 1, span], np.float64))
        assert_close(f"document {row} {span}", y[row : row + 1, span], want, TOLERANCE["fp32_op"])


@EVERY_CASE
def test_the_recurrence_everywhere_is_its_own_layer(case: str):
    both, single = layer(case)
    assert_equal("y", output(both, jnp.zeros((2, T), jnp.int32)), output(single, None))


@EVERY_CASE
def test_a_mode_decides_how_its_own_token_is_read_and_nothing_else(case: str):
    both, _ = layer(case)
    linear, attn = (output(both, jnp.full((2, T), mode, jnp.int32)) for mode in (0, 1))
    assert np.all(np.abs(linear - attn)[np.asarray(SEG) != 0].max(-1) > 1e-3)
    assert_equal("y", output(both, RANDOM), np.where(np.asarray(RANDOM)[..., None], attn, linear))


def test_tokens_without_modes_have_the_layers_own():
    for default, mode in (("attn", 1), ("linear", 0)):
        both, _ = layer("gla", default)
        own = output(both, None)
        assert_equal(default, own, output(both, jnp.full((2, T), mode, jnp.int32)))
        some = output(both, jnp.where(RANDOM == 1, -1, 1 - mode))  # -1: the layer's own, token by token
        other = output(both, jnp.full((2, T), 1 - mode, jnp.int32))
        assert_equal(default, some, np.where(np.asarray(RANDOM)[..., None] == 1, own, other))


@pytest.mark.parametrize("case", ["gdn grouped", "mamba2"])
def test_both_states_advance_whatever_is_read(case: str):
    """So prefill and single steps in any modes end in the states that the recurrence and a cache of keys have alone."""
    both, single = layer(case)

    @jax.jit
    def after(modes: Array) -> tuple[Array, PyTree]:
        state = both.merge().init_state(2, T, jnp.float32)
        return both(both.params, X, state, modes=modes, impl="recurrent")

    @jax.jit
    def stepwise(modes: Array) -> tuple[Array, PyTree]:
        mixer = both.merge()

        def step(state: PyTree, inputs: tuple) -> tuple[PyTree, Array]:
            x, mode, t = inputs
            ctx = Context(jnp.full((2, 1), t), modes=mode[:, None], impl="recurrent")
            y, state = mixer(x[:, None], ctx, state)
            return state, y[:, 0]

        start = mixer.init_state(2, T, jnp.float32)
        state, y = jax.lax.scan(step, start, (X.swapaxes(0, 1), modes.T, jnp.arange(T, dtype=jnp.int32)))
        return y.swapaxes(0, 1), state

    y, state = after(RANDOM)
    for modes in (jnp.zeros_like(RANDOM), jnp.ones_like(RANDOM)):
        assert_trees_equal(after(modes)[1], state)
    alone = jax.jit(
        lambda: single(single.params, X, single.merge().init_state(2, T, jnp.float32), impl="recurrent")[1]
    )()
    assert_trees_close("state of the recurrence", state["linear"], alone, TOLERANCE["fp32_op"])
    steps, last = stepwise(RANDOM)
    assert_close("y", steps, y, TOLERANCE["fp32_op"])
    assert_trees_close("state", last, state, TOLERANCE["fp32_op"])


def assert_trees_equal(actual: PyTree, expected: PyTree) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_equal("state", a, b)


def test_switching_changes_no_output_before_it():
    """In a model of several layers, where later layers read what earlier ones wrote in another mode."""
    made = plan("2*modes(gla)", ffn="none")
    params, ids = drawn(made.shapes), tokens(2, T)
    run = jax.jit(lambda modes: made.merge(params).hidden(ids, SEG, modes=modes))
    whole, t = run(RANDOM), 7
    late = run(RANDOM.at[:, t].set(1 - RANDOM[:, t]))
    assert_equal("before", late[:, :t], whole[:, :t])
    changed = np.abs(late - whole).max(-1) > 1e-5
    assert changed[0, t:].all()
    assert changed[1, t:11].all() and not changed[1, 11:].any(), "padding is no token of that document"
    other = run(RANDOM.at[1, 2].set(1 - RANDOM[1, 2]))
    assert_equal("another document", other[1, 6:11], whole[1, 6:11])
    assert_equal("another row", other[0], whole[0])


def test_two_modes_share_all_but_queries():
    """A layer of two modes has the parameters of its recurrence, one projection to queries and two norms."""
    both, single = layer("gdn")
    extra = {"q/kernel": (D, 2, 4), "q_norm/weight": (4,), "k_norm/weight": (4,)}
    assert {path: p.shape for path, p in both.params.items() if not path.startswith(("linear/", "project/"))} == extra
    count = lambda params: sum(p.size for p in params.values())  # noqa: E731
    assert count(both.params) == count(single.params) + D * 2 * 4 + 2 * 4
