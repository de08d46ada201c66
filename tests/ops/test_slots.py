"""`slot_attention` and `slot_softmax`: both forms against the recurrence in fp64, with every gradient; and the decay
that makes a softmax."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from hydrax.ops import slots, spans
from hydrax.ops.slots import slot_attention, slot_softmax, softmax_decay
from hydrax.ops.slots.cases import CASES, Case
from tests.ops import matrix_state as ms
from tests.tolerances import TOLERANCE, assert_close, assert_equal

pytestmark = pytest.mark.thorough

CHUNKED = {"impl": "chunked", "chunk_size": 32}


def op(k, initial_state, **x):
    """The op with keys and values of the slots in one array [B,H,M,K+V], for `matrix_state`."""
    cut = [k.shape[-1]]
    o, state = slot_attention(k=k, initial_state=tuple(jnp.split(initial_state, cut, axis=-1)), **x)
    return o, jnp.concatenate(state, axis=-1)


def summarize(**x):
    P, U = slots.summarize(**x)
    return P, jnp.concatenate(U, axis=-1)


def inputs(case: Case) -> ms.Inputs:
    rng = np.random.default_rng(0)
    x = {name: rng.normal(size=(case.B, case.T, case.H, case.K)) for name in "qk"}
    x["v"] = rng.normal(size=(case.B, case.T, case.H, case.V))
    x["log_decay"] = -np.logaddexp(0, rng.normal(size=(case.B, case.T, case.H, case.M)))
    x["write"] = rng.uniform(size=x["log_decay"].shape)
    return x | {"initial_state": rng.normal(size=(case.B, case.H, case.M, case.K + case.V))}


def problem(name: str) -> tuple[ms.Inputs, np.ndarray]:
    case = CASES[name]
    return inputs(case), ms.documents(case.B, case.T)


def oracle(x: ms.Inputs, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Output and final state, token by token."""
    K = x["k"].shape[-1]
    o, states = np.zeros_like(x["v"]), x["initial_state"].copy()
    for b in range(len(ids)):
        S = states[b]
        for t in range(ids.shape[1]):
            if ids[b, t] == 0:
                break
            if t and ids[b, t] != ids[b, t - 1]:
                S = np.zeros_like(S)
            written = np.concatenate([x["k"][b, t], x["v"][b, t]], axis=-1)
            S = np.exp(x["log_decay"][b, t])[..., None] * S + x["write"][b, t][..., None] * written[:, None]
            scores = np.exp(np.einsum("hk,hmk->hm", x["q"][b, t], S[..., :K]) / np.sqrt(K))
            o[b, t] = np.einsum("hm,hmv->hv", scores / scores.sum(-1, keepdims=True), S[..., K:])
        states[b] = S
    return {"o": o, "state": states}


@pytest.mark.parametrize("name", CASES)
def test_chunked_equals_the_recurrence(name: str) -> None:
    x, ids = problem(name)
    expected = ms.in_fp64(op, x, ids)
    for what, value in oracle(x, ids).items():
        assert_close(what, expected[what], value, 1e-12)
    ms.assert_matches(ms.in_fp32(ms.evaluator(op, **CHUNKED), x, ids), expected)


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
def test_gradients_match_finite_differences(impl: str) -> None:
    x, ids = problem("odd")
    actual = ms.in_fp64(op, x, ids, impl)
    for what, (direction, value) in ms.directional_derivatives(x, ids, oracle).items():
        assert_close(what, (actual[what] * direction).sum(), value, 1e-7)


@pytest.mark.parametrize("chunk_size", [16, 48, 64, 128, 256])
def test_results_do_not_depend_on_the_chunk_size(chunk_size: int) -> None:
    case = Case(2, 270, 1, 8, 8, 4)
    x, ids = inputs(case), ms.documents(case.B, case.T)
    actual = ms.in_fp32(ms.evaluator(op, impl="chunked", chunk_size=chunk_size), x, ids)
    ms.assert_matches(actual, ms.in_fp64(op, x, ids))


@pytest.mark.parametrize("gate", ms.SATURATED)
def test_saturated_gates(gate: str) -> None:
    x, ids = problem("even")
    x["log_decay"] = ms.SATURATED[gate](x["log_decay"].shape)
    ms.assert_matches(ms.in_fp32(ms.evaluator(op, **CHUNKED), x, ids), ms.in_fp64(op, x, ids))


def test_several_spans_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x, ids = problem("long")
    monkeypatch.setitem(spans.SPANS, "cpu", 64)
    run = ms.evaluator(op, impl="chunked", chunk_size=16)  # compiled in no other test
    ms.assert_matches(ms.in_fp32(run, x, ids), ms.in_fp64(op, x, ids))


def test_bf16_keeps_fp32_states_and_gates() -> None:
    x, ids = problem("odd")
    rounded = {n: jnp.asarray(a, jnp.bfloat16 if n in "qkv" else jnp.float32) for n, a in x.items()}
    actual = ms.evaluator(op, **CHUNKED)(rounded, ids)
    assert (actual["o"].dtype, actual["state"].dtype) == (jnp.bfloat16, jnp.float32)
    expected = ms.in_fp64(op, {n: np.asarray(a, np.float64) for n, a in rounded.items()}, ids)
    for what, value in expected.items():
        assert_close(what, actual[what], value, ms.bf16_tolerance(what))


def test_the_past_does_not_depend_on_the_future() -> None:
    ms.assert_bit_causal(op, *problem("odd"), **CHUNKED)


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
def test_a_row_of_padding_keeps_its_state(impl: str) -> None:
    x, ids = problem("even")
    actual = ms.in_fp32(ms.evaluator(op, impl=impl), x, 0 * ids)
    assert_equal("o", actual["o"], np.zeros_like(x["v"]))
    assert_equal("state", actual["state"], x["initial_state"].astype(np.float32))


@pytest.mark.parametrize("packed", [False, True])
def test_summaries_compose_to_the_whole(packed: bool) -> None:
    x, ids = problem("odd")
    ids = ids if packed else np.ones_like(ids)
    (Pa, Ua), (Pb, Ub), (P, U) = ms.summaries(summarize, x, ids, 32)
    assert_close("P", Pb * Pa, P, TOLERANCE["fp32_op"])
    assert_close("U", Pb[..., None] * Ua + Ub, U, TOLERANCE["fp32_op"])
    state = ms.in_fp32(ms.evaluator(op, **CHUNKED), x, ids)["state"]
    assert_close("state", P[..., None] * x["initial_state"] + U, state, TOLERANCE["fp32_op"])


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
def test_a_slot_per_token_is_softmax_attention(impl: str) -> None:
    """Slot m written by token m alone: the last token attends to all. Earlier ones also see the slots that are still
    empty, with score 0 and value 0: nothing is masked."""
    T, K = 33, 8
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, T, 2, K)).astype(np.float32)
    write = np.broadcast_to(np.eye(T, dtype=np.float32)[None, :, None], (1, T, 2, T))
    o, _ = jax.jit(functools.partial(slot_attention, impl=impl, chunk_size=16))(q, k, v, write, np.zeros_like(write))
    scores = np.exp(np.einsum("bihk,bjhk->bhij", q, k, dtype=np.float64) / np.sqrt(K)) * np.tri(T)
    empty = T - 1 - np.arange(T)
    p = scores / (scores.sum(-1) + empty)[..., None]
    assert_close("last p", p[0, :, -1].sum(-1), np.ones(2), 1e-12)
    assert_close("o", o, np.einsum("bhij,bjhv->bihv", p, v), TOLERANCE["fp32_op"])


# ------------------------------------------------------------------------------------------------------ softmax_decay


def averages(k, s, initial_state, segment_ids, impl, **x):
    """Slots as running averages under the logits s; the state is (K̃, Ṽ, log z)."""
    facts = {"segment_ids": segment_ids, "impl": impl}
    g, z = softmax_decay(s, initial_state=jnp.exp(initial_state[..., -1]), **facts)
    o, state = op(k=k, write=-jnp.expm1(g), log_decay=g, initial_state=initial_state[..., :-1], **facts, **x)
    return o, jnp.concatenate([state, jnp.log(z)[..., None]], axis=-1)


def running_averages(x: ms.Inputs, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The definition: K̃_t = (z_0 K̃_0 + Σ_{i<=t} e^{s_i} k_i) / z_t, Ṽ_t alike, by cumulative sums."""
    K, z = x["k"].shape[-1], np.exp(x["initial_state"][..., -1:])
    initial = np.concatenate([z * x["initial_state"][..., :-1], z], axis=-1)
    taken = np.concatenate([x["k"], x["v"], np.ones_like(x["v"][..., :1])], axis=-1)
    taken = np.exp(x["s"])[..., None] * taken[..., None, :]
    o, states = np.zeros_like(x["v"]), np.zeros_like(initial)
    for b, row in enumerate(ids):
        for document in dict.fromkeys(row[row > 0]):
            tokens = row == document
            sums = initial[b] * (document == row[0]) + np.cumsum(taken[b, tokens], axis=0)
            S = sums[..., :-1] / sums[..., -1:]
            scores = np.exp(np.einsum("thk,thmk->thm", x["q"][b, tokens], S[..., :K]) / np.sqrt(K))
            o[b, tokens] = np.einsum("thm,thmv->thv", scores / scores.sum(-1, keepdims=True), S[..., K:])
            states[b] = np.concatenate([S[-1], np.log(sums[-1, ..., -1:])], axis=-1)
    return {"o": o, "state": states}


LOGITS = {
    "usual": lambda rng, shape: rng.normal(size=shape),
    "bursts": lambda rng, shape: np.where(np.arange(shape[1])[:, None, None] % 8, -5, 20) + rng.normal(size=shape),
    "rising": lambda rng, shape: np.linspace(-32, 32, shape[1])[:, None, None] + rng.normal(size=shape),
    "falling": lambda rng, shape: np.linspace(32, -32, shape[1])[:, None, None] + rng.normal(size=shape),
    "extreme": lambda rng, shape: rng.choice([-32.0, 32.0], size=shape),
}
"""Logits from one end of their range to the other."""


def averages_problem(logits: str, *, empty: bool = False) -> tuple[ms.Inputs, np.ndarray]:
    x, ids = problem("odd")
    del x["write"]
    x["s"] = LOGITS[logits](np.random.default_rng(4), x.pop("log_decay").shape)
    state = (
        [0 * x["initial_state"], np.full_like(x["s"][:, 0], -np.inf)]
        if empty
        else [x["initial_state"], x["s"][:, 0] + 1]
    )
    return x | {"initial_state": np.concatenate([state[0], state[1][..., None]], axis=-1)}, ids


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("logits", LOGITS)
def test_running_averages(logits: str, empty: bool) -> None:
    x, ids = averages_problem(logits, empty=empty)
    expected = ms.in_fp64(averages, x, ids)
    for what, value in running_averages(x, ids).items():
        assert_close(what, expected[what], value, 1e-12)
    ms.assert_matches(ms.in_fp32(ms.evaluator(averages, **CHUNKED), x, ids), expected)


def test_gradients_of_running_averages_match_finite_differences() -> None:
    x, ids = averages_problem("usual")
    actual = ms.in_fp64(averages, x, ids)
    for what, (direction, value) in ms.directional_derivatives(x, ids, running_averages).items():
        assert_close(what, (actual[what] * direction).sum(), value, 1e-7)


def test_first_tokens_replace_what_is_not_there() -> None:
    """A state of zeros is "nothing yet": the first token of a document is taken whole, whatever its logit."""
    s = jnp.asarray([32.0, -32.0, 5.0, -32.0])[None, :, None, None]
    g, z = softmax_decay(s, segment_ids=jnp.asarray([[1, 2, 2, 3]]))
    assert_equal("writes", -jnp.expm1(g)[0, [0, 1, 3], 0, 0], np.ones(3))
    assert_close("g", g[0, 2, 0, 0], -np.log1p(np.exp(37.0)), TOLERANCE["fp32_op"])
    assert_close("z", z, np.exp([[[-32.0]]]), TOLERANCE["fp32_op"], floor=0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shapes reach the op as they do for a user, without the annotations that tests check."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "magic"}, "impl = 'magic'"),
        ({"log_decay": jnp.ones((2, 64, 2, 3))}, "log_decay"),
        ({"v": jnp.ones((2, 64, 4, 8))}, r"v \(2, 64, 4, 8\)"),
        ({"initial_state": (jnp.ones((2, 2, 4, 8)), jnp.ones((2, 2, 8, 4)))}, "initial_state"),
    ],
    ids=["impl", "log_decay", "v", "initial_state"],
)
def test_what_cannot_be_served_is_refused(change: dict, message: str) -> None:
    x = {n: a for n, a in ms.in_jax(problem("even")[0]).items() if n != "initial_state"}
    with pytest.raises(ValueError, match=message):
        slot_attention(**x | change)


# ------------------------------------------------------------------------------------------------------- slot_softmax

EXPONENT = 16
"""Of every slot of the initial states; they are integers, so they are no input with a gradient."""

SCORES = LOGITS | {
    "huge": lambda rng, shape: 2.0**-4 * rng.integers(-(2**15), 2**15, shape),
    "rare": lambda rng, shape: np.where(rng.integers(9, size=shape) == 0, 3e4, -3e4) + rng.integers(-2, 3, size=shape),
}
"""Scores of any size, those beyond 32 exact in fp32."""


def softmax_op(initial_state, **x):
    """The op with a state [B,H,M,V+1] of numerators and denominators, for `matrix_state`; the exponents show in their
    sizes."""
    exponents = jnp.full(initial_state.shape[:-1], EXPONENT)
    state = exponents, initial_state[..., :-1], initial_state[..., -1]
    o, (_, numerator, denominator) = slot_softmax(initial_state=state, **x)
    return o, jnp.concatenate([numerator, denominator[..., None]], axis=-1)


def softmax_problem(scores: str, case: Case = CASES["odd"]) -> tuple[ms.Inputs, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (case.B, case.T, case.H, case.M)
    x = {"q": rng.normal(size=shape), "scores": SCORES[scores](rng, shape)}
    x["v"] = rng.normal(size=(*shape[:3], case.V))
    x["initial_state"] = np.concatenate(
        [rng.normal(size=(case.B, case.H, case.M, case.V)), rng.uniform(1, 2, (case.B, case.H, case.M, 1))], axis=-1
    )
    return x, ms.documents(case.B, case.T)


def averages_of_slots(x: ms.Inputs, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The definition, token by token over all tokens it sees, each time with weights relative to the largest."""
    o, states = np.zeros_like(x["v"]), x["initial_state"].copy()
    for b, t in np.argwhere(ids > 0):
        seen = (np.arange(ids.shape[1]) <= t) & (ids[b] == ids[b, t])
        s, sums = x["scores"][b, seen], np.concatenate([x["v"], np.ones_like(x["v"][..., :1])], axis=-1)[b, seen]
        sums = np.broadcast_to(sums[:, :, None], (*s.shape, sums.shape[-1]))
        if ids[b, t] == ids[b, 0]:
            s = np.concatenate([np.full_like(s[:1], EXPONENT), s])
            sums = np.concatenate([x["initial_state"][b, None], sums])
        largest = np.maximum(16 * np.round(s / 16), -1e9).max(0)
        S = (np.exp(s - largest)[..., None] * sums).sum(0)
        o[b, t] = np.einsum("hm,hmv->hv", x["q"][b, t], S[..., :-1] / S[..., -1:])
        states[b] = S
    return {"o": o, "state": states}


@pytest.mark.parametrize("scores", SCORES)
def test_slots_average_under_scores_of_any_size(scores: str) -> None:
    x, ids = softmax_problem(scores)
    expected = ms.in_fp64(softmax_op, x, ids)
    for what, value in averages_of_slots(x, ids).items():
        assert_close(what, expected[what], value, 1e-12)
    ms.assert_matches(ms.in_fp32(ms.evaluator(softmax_op, **CHUNKED), x, ids), expected)


@pytest.mark.parametrize("name", CASES)
def test_chunked_averages_equal_the_recurrence(name: str) -> None:
    x, ids = softmax_problem("usual", CASES[name])
    for how in (CHUNKED, {}):
        ms.assert_matches(ms.in_fp32(ms.evaluator(softmax_op, **how), x, ids), ms.in_fp64(softmax_op, x, ids))


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
def test_gradients_of_slots_match_finite_differences(impl: str) -> None:
    x, ids = softmax_problem("bursts")
    actual = ms.in_fp64(softmax_op, x, ids, impl)
    for what, (direction, value) in ms.directional_derivatives(x, ids, averages_of_slots).items():
        assert_close(what, (actual[what] * direction).sum(), value, 1e-7)


def test_averages_in_bf16_keep_fp32_sums() -> None:
    x, ids = softmax_problem("usual")
    rounded = {n: jnp.asarray(a, jnp.bfloat16 if n in "qv" else jnp.float32) for n, a in x.items()}
    actual = ms.evaluator(softmax_op, **CHUNKED)(rounded, ids)
    assert (actual["o"].dtype, actual["state"].dtype) == (jnp.bfloat16, jnp.float32)
    expected = ms.in_fp64(softmax_op, {n: np.asarray(a, np.float64) for n, a in rounded.items()}, ids)
    for what, value in expected.items():
        assert_close(what, actual[what], value, ms.bf16_tolerance(what))


def test_averages_do_not_depend_on_the_future() -> None:
    ms.assert_bit_causal(softmax_op, *softmax_problem("usual"), **CHUNKED)


@pytest.mark.parametrize("impl", ["recurrent", "chunked"])
def test_empty_slots_stay_empty_in_padding_and_take_the_first_token_whole(impl: str) -> None:
    """Zeros are "nothing yet", whatever the scores; also after another document, and in a row of padding."""
    s, v = jnp.asarray([-1e30, 7.0, -41.0])[None, :, None, None], jnp.asarray([2.0, 3.0, 5.0])[None, :, None, None]
    run = jax.jit(functools.partial(slot_softmax, impl=impl))
    o, state = run(jnp.ones_like(s), s, v, segment_ids=jnp.asarray([[1, 2, 3]]))
    assert_close("o", o, v, TOLERANCE["fp32_op"])
    assert_equal("exponent", state[0], [[[-48]]])
    assert_close("numerator", state[1], np.exp(7) * v[:, 2:], TOLERANCE["fp32_op"])
    (o, (exponent, *sums)), pullback = jax.vjp(lambda *x: run(*x, segment_ids=jnp.zeros((1, 3), jnp.int32)), s, s, v)
    none = np.zeros(exponent.shape, jax.dtypes.float0)
    for value in (o, exponent, *sums, *pullback((o + 1, (none, *(x + 1 for x in sums))))):
        assert_equal("of padding", value, np.zeros_like(value))


def test_states_of_adjacent_tokens_make_one() -> None:
    x, _ = softmax_problem("rising")
    q, s, v = (jnp.asarray(x[n], jnp.float32) for n in ("q", "scores", "v"))
    run = jax.jit(lambda *x: slot_softmax(*x)[1])
    first, second, whole = (run(q[:, part], s[:, part], v[:, part]) for part in np.s_[:29, 29:, :])
    p = np.maximum(first[0], second[0])
    assert_equal("exponents", whole[0], p)
    for i, name in ((1, "numerators"), (2, "denominators")):
        scaled = [np.exp(part[0] - p).reshape(part[i].shape[:3] + (1,) * (2 - i)) * part[i] for part in (first, second)]
        assert_close(name, sum(scaled), whole[i], TOLERANCE["fp32_op"])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "magic"}, "slot_softmax: impl = 'magic'"),
        ({"scores": jnp.ones((2, 65, 2, 3))}, "scores"),
        ({"initial_state": (jnp.ones((2, 2, 4)),) * 3}, "initial_state"),
    ],
    ids=["impl", "scores", "initial_state"],
)
def test_averages_that_cannot_be_formed_are_refused(change: dict, message: str) -> None:
    x = {n: a for n, a in ms.in_jax(softmax_problem("usual")[0]).items() if n != "initial_state"}
    with pytest.raises(ValueError, match=message):
        slot_softmax(**x | change)
