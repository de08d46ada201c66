"""stochastic: against a loop in fp64, what its windows reduce to, and which permutation is read when."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hydrax import mixers
from hydrax.core.build import ConfigError, build
from hydrax.mixers import Context
from hydrax.mixers.sparse.stochastic import ranks
from hydrax.ops.softmax import attention
from hydrax.ops.sparse import permuted, permuted_window
from tests.contract.cases import case, inside, normal, segments
from tests.tolerances import TOLERANCE, assert_close, assert_equal, assert_trees_close

pytestmark = pytest.mark.thorough

T, H, G, K = 37, 4, 2, 4
SEG = np.stack([segments((20, 17), T), segments((1, 30), T)])
POSITIONS = inside(SEG)[0]
REAL = (SEG != 0)[..., None, None]
FACTS = {"positions": jnp.asarray(POSITIONS), "segment_ids": jnp.asarray(SEG)}
TABLE = np.random.default_rng(0).permutation(16)
RANKS = POSITIONS // 16 * 16 + TABLE[POSITIONS % 16]


def inputs(seed: int = 0) -> dict[str, jax.Array]:
    shapes = {"q": (2, T, H, K), "k": (2, T, G, K), "v": (2, T, G, 5)}
    return {name: jnp.asarray(normal(10 * seed + i, *shape)) for i, (name, shape) in enumerate(shapes.items())}


def graded(f: Any, x: dict[str, jax.Array]) -> Any:
    dy = normal(9, 2, T, H, 5) * REAL
    return jax.jit(jax.value_and_grad(lambda x: jnp.sum(dy * f(**x))))(x)


@pytest.mark.parametrize("width", [1, 6, 11])
@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
def test_the_window_is_that_of_the_loop(impl: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks as well, of 5 queries."""
    monkeypatch.setattr(permuted, "BLOCK", 5)
    x = inputs()
    o = jax.jit(lambda x: permuted_window(**x, width=width, ranks=jnp.asarray(RANKS), impl=impl, **FACTS))(x)
    q, k, v = (np.asarray(x[name], np.float64) for name in "qkv")
    want = np.zeros(o.shape)
    for b, t in np.argwhere(SEG):
        seen = (SEG[b] == SEG[b, t]) & (np.arange(T) <= t) & (np.abs(RANKS[b] - RANKS[b, t]) <= width / 2)
        for h in range(H):
            e = np.exp(k[b, seen, h // 2] @ q[b, t, h] * K**-0.5)
            want[b, t, h] = e @ v[b, seen, h // 2] / e.sum()
    assert_close("o", o * REAL, want, TOLERANCE["fp32_op"])


def test_blocks_have_the_gradients_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permuted, "BLOCK", 5)
    facts = {"width": 6, "ranks": jnp.asarray(RANKS), **FACTS}
    got, want = (
        graded(lambda impl=i, **x: permuted_window(**x, impl=impl, **facts), inputs(1)) for i in permuted.FORMS
    )
    assert_trees_close("value and gradients", got, want, TOLERANCE["fp32_op"])


def test_a_wide_window_is_attention() -> None:
    x = inputs(2)
    got = graded(lambda **x: permuted_window(**x, width=4 * T, ranks=jnp.asarray(RANKS), **FACTS), x)
    assert_trees_close("value and gradients", got, graded(lambda **x: attention(**x, **FACTS), x), TOLERANCE["fp32_op"])


def test_without_a_permutation_it_is_a_sliding_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of half the width and the query's own key."""
    monkeypatch.setattr(permuted, "BLOCK", 5)
    x = inputs(3)
    got = graded(lambda **x: permuted_window(**x, width=8, ranks=jnp.asarray(POSITIONS), **FACTS), x)
    want = graded(lambda **x: attention(**x, window=5, **FACTS), x)
    assert_trees_close("value and gradients", got, want, TOLERANCE["fp32_op"])


def test_positions_beyond_the_table_have_ranks_of_their_own() -> None:
    found = np.asarray(ranks(jnp.asarray(TABLE), jnp.arange(40)[None]))[0]
    assert len(set(found)) == 40
    assert sorted(found[:16]) == list(range(16)) and sorted(found[16:32]) == list(range(16, 32))


def test_every_layer_and_step_has_its_permutation() -> None:
    """With noise that of the step, else the fixed one; with `resample` off the fixed one is read in training too."""
    c = case("stochastic")
    x = normal(4, 1, T, 32)

    def table(layer: int = 1, noise: Any = None, **options: Any) -> np.ndarray:
        mixer = c.merge(c.params)
        mixer.cfg = dataclasses.replace(mixer.cfg, **options)
        return np.asarray(mixer._table(Context.of(x, layer_index=layer, noise=noise)))

    assert_equal("evaluation", table(), table())
    noises = [table(noise=jax.random.key(i)) for i in (6, 7)]
    distinct = [table(), table(2), table(seed=1), *noises]
    assert len({tuple(t) for t in distinct}) == 5 and all(sorted(t) == list(range(16)) for t in distinct)
    assert_equal("not resampled", table(noise=jax.random.key(7), resample=False), table())


def test_decoding_reads_the_permutation_that_training_does_without_noise() -> None:
    c, x = case("stochastic"), normal(5, 1, T, 32)
    full = jax.jit(lambda p, x: c(p, x)[0])(c.params, x)
    noisy = jax.jit(lambda p, x: c(p, x, noise=jax.random.key(3))[0])(c.params, x)
    assert np.abs(full - noisy).max() > 1e-2
    state, step = c.init(1, T), jax.jit(lambda p, x, t, s: c(p, x, positions=t, state=s))
    for t in range(T):
        y, state = step(c.params, x[:, t : t + 1], np.full((1, 1), t, np.int32), state)
        assert_close(f"y at {t}", y[:, 0], full[:, t], TOLERANCE["fp32_op"])


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"kv": "shared"}])
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    (key,) = options
    with pytest.raises(ConfigError, match=rf"^{key} = .*: expected "):
        build(mixers.get("stochastic").Config, options)
