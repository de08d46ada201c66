"""Recurrent mixers as linear systems: superposition, rows as products of A_t, documents, and what A_t looks like."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hydrax import mixers
from hydrax.core.build import build
from hydrax.interp import state_space
from hydrax.mixers import Context
from tests.contract import cases
from tests.tolerances import TOLERANCE, assert_close, assert_equal

T = 8
IDS = np.stack([cases.segments([3, 4], T), cases.segments([T], T)])
X = cases.normal(40, 2, T, cases.D)
SERIAL = [name for name in mixers.names() if mixers.row(name).transition == "nonlinear"]
CHEAP = {"deltanet", "gla", "rglru"}
LINEAR = [name for name in mixers.names() if mixers.row(name).linear]
EACH = pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in CHEAP else pytest.mark.slow) for n in LINEAR])


def layer(name: str) -> tuple[mixers.Mixer, Context]:
    case = cases.case(name)
    ctx = Context.of(jnp.asarray(X), jnp.asarray(IDS), lower_bounds=case.lower_bounds, **cases.LAYER)
    return case.merge(case.params), ctx


@functools.cache
def systems(name: str) -> dict[str, state_space.System]:
    """Of every part that the table names."""
    mixer, ctx = layer(name)
    run = jax.jit(lambda x: [vars(state_space.as_ltv(mixer, part, x, ctx)) for part in mixers.row(name).linear])
    found = (state_space.System(**jax.tree.map(np.asarray, s)) for s in run(X))
    return dict(zip(mixers.row(name).linear, found, strict=True))


def superposition(name: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """f(S) + f(S') and f(S + S') + f(0), for the token after a row."""
    mixer, ctx = layer(name)

    @jax.jit
    def run(x):
        _, state = mixer(x, ctx, mixer.init_state(2, T + 1, x.dtype))
        facts = {key: a[2] for key, a in state_space.by_token(x, ctx).items()}
        facts |= {"positions": ctx.positions.max(1) + 1, "segment_ids": ctx.segment_ids.max(1)}
        f = state_space.update(mixer, part, ctx, state, facts)
        S = state_space.flat(state, part)
        one, other = (jnp.asarray(cases.normal(i, *S.shape)) for i in (41, 42))
        return f(one) + f(other), f(one + other) + f(jnp.zeros_like(S))

    return run(X)


@EACH
def test_what_the_table_calls_linear_is_linear(name: str) -> None:
    for part in mixers.row(name).linear:
        assert_close(part, *superposition(name, part), TOLERANCE["fp32_op"])


@pytest.mark.parametrize("name", SERIAL)
def test_serial_mixers_are_not_linear(name: str) -> None:
    assert mixers.row(name).linear == ()
    apart, joint = superposition(name, "memory")
    assert np.abs(apart - joint).max() > 0.1


def test_the_table_leaves_out_no_recurrence() -> None:
    """What is carried over a whole document is declared, or serial."""
    for name in mixers.names():
        cls = mixers.get(name)
        cfg = build(cls.Config, mixers.row(name).tiny).fill(cases.D)
        state = nnx.eval_shape(
            lambda cls=cls, cfg=cfg: cls(cases.D, cfg, rngs=nnx.Rngs(0)).init_state(1, 1, jnp.float32)
        )
        carried = "memory" in state
        assert bool(mixers.row(name).linear) == (carried and name not in SERIAL), name


@EACH
def test_a_call_is_the_product_of_its_tokens(name: str) -> None:
    """The form that trains goes from any state to the one that the matrices lead to."""
    mixer, ctx = layer(name)

    @functools.partial(jax.jit, static_argnums=2)
    def run(x, start, part):
        state = state_space.replaced(mixer.init_state(2, T, x.dtype), part, start)
        return state_space.flat(mixer(x, ctx, state)[1], part)

    for part, system in systems(name).items():
        start = cases.normal(43, 2, system.B.shape[-1])
        for first in (0 * start, start):
            S = first.astype(np.float64)
            for t in range(T):
                S = np.einsum("bij,bj->bi", system.A[:, t].astype(np.float64), S) + system.B[:, t]
            assert_close(part, run(X, first, part), S, TOLERANCE["fp32_op"])


@EACH
def test_documents_cut_the_system_and_padding_rests(name: str) -> None:
    for part, system in systems(name).items():
        assert_equal(f"{part}: A at the start of a document", system.A[0, 3], 0 * system.A[0, 3])
        assert_equal(f"{part}: A at padding", system.A[0, 7], np.eye(system.A.shape[-1]))
        assert_equal(f"{part}: B at padding", system.B[0, 7], 0 * system.B[0, 7])


@EACH
def test_transitions_look_as_the_table_says(name: str) -> None:
    row = mixers.row(name)
    for part, system in systems(name).items():
        A = system.A[1, 1:]
        diagonal = np.diagonal(A, axis1=1, axis2=2)
        beside = A - diagonal[..., None] * np.eye(A.shape[-1])
        if row.transition == "full":
            assert np.abs(beside).max() > 1e-3
        if row.transition in ("none", "scalar", "diag"):
            assert_equal(f"{part} beside the diagonal", beside, 0 * beside)
        if row.transition in ("none", "scalar"):
            by_head = diagonal.reshape(T - 1, getattr(cases.case(name).cfg, row.head_option), -1)
            assert_equal(f"{part} of a head", by_head, np.broadcast_to(by_head[..., :1], by_head.shape))
        if row.transition == "none":
            assert_equal(f"{part} on the diagonal", diagonal, np.ones_like(diagonal))


def test_what_has_no_system_is_refused() -> None:
    mixer, ctx = layer("gla")
    with pytest.raises(ValueError, match="no part 'cache' in a state of memory"):
        state_space.as_ltv(mixer, "cache", X, ctx)
    x = jnp.zeros((1, 2048, cases.D))
    with pytest.raises(ValueError, match="2048 tokens, 256 numbers: expected at most 67108864"):
        state_space.as_ltv(mixer, "memory", x, Context.of(x))
